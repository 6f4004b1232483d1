"""The device's side of stage one: prepared images in, the rows of a shard out, one batch always in flight.

While the device works on a batch, the results of the one before travel back and the images of the next travel there.
On a CPU the same code is simply one batch after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.encoders import Encoder, Prepared

CPU_BATCH, GPU_BATCH = 1, 32  # at 1024 px; smaller inputs take as many more as they have fewer pixels
LARGEST_BATCH = 256


class BatchSize:
    """How many images the encoder takes at once: given, else by device and input size, halved when memory runs out.

    On a CPU larger batches than about 1024 x 1024 pixels pay nothing. The size for a GPU is a guess that has not been
    measured on one. A size that memory forced is kept in a file, so that the next run starts with it.

    Args:
        encoder: Whose batches they are.
        given: The size that a person asked for.
        memory: File that remembers a halving.
    """

    def __init__(self, encoder: Encoder, given: int | None, memory: Path) -> None:
        self._memory = memory
        self._device = device_of(encoder).type
        at_1024_px = CPU_BATCH if self._device == "cpu" else GPU_BATCH
        fitting = max(1, min(LARGEST_BATCH, at_1024_px * (1024 // encoder.input_px) ** 2))
        self.images = min(given or fitting, self._remembered())

    def halve(self) -> bool:
        """Take half as many from now on, in later runs too; False if one image is too many already."""
        if self.images == 1:
            return False
        self.images //= 2
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        self._memory.write_text(json.dumps({"device": self._device, "largest_batch": self.images}))
        return True

    def _remembered(self) -> int:
        try:
            known = json.loads(self._memory.read_text())
            return max(1, int(known["largest_batch"])) if known["device"] == self._device else LARGEST_BATCH
        except (OSError, ValueError, KeyError, TypeError):
            return LARGEST_BATCH  # nothing is remembered


class Shard:
    """Host memory of one shard in the making.

    Args:
        taps: (C, h, w) by tap.
        rows: How many rows it has.
        dtype: Stored type, numpy's name.

    Attributes:
        features: Tap to (rows, C, h, w).
        extents: (rows, 2) float32, the part of the grid's height and width that is image.
    """

    def __init__(self, taps: Mapping[str, tuple[int, int, int]], rows: int, dtype: str) -> None:
        self.features: dict[str, npt.NDArray[np.generic]] = {
            tap: np.empty((rows, *shape), dtype) for tap, shape in taps.items()
        }
        self.extents = np.empty((rows, 2), np.float32)
        self._finite = np.ones(rows, bool)

    def land(self, flight: Flight) -> None:
        """Take in a batch, waiting until it is there."""
        if flight.arrived is not None:
            flight.arrived.synchronize()
        rows = slice(flight.start, flight.start + len(flight.extents))
        self.extents[rows] = flight.extents
        self._finite[rows] = flight.finite.numpy()
        for tap, feature in flight.features.items():
            self.features[tap][rows] = feature.numpy()

    def non_finite(self) -> list[int]:
        """Rows with a value that is not finite in some tap, after rounding to the stored type."""
        return [int(i) for i in np.flatnonzero(~self._finite)]


@dataclass(frozen=True)
class Flight:
    """A batch on its way back from the device.

    Attributes:
        start: Its first row in the shard.
        extents: (B, 2) float32.
        features: Tap to (B, C, h, w) on the host, complete once `arrived`.
        finite: (B,) bool on the host, likewise.
        arrived: The device's event after the copies; None where nothing is asynchronous.
    """

    start: int
    extents: npt.NDArray[np.float32]
    features: Mapping[str, Tensor]
    finite: Tensor
    arrived: torch.cuda.Event | None


def launch(encoder: Encoder, batch: Sequence[Prepared], start: int, dtype: torch.dtype) -> Flight:
    """Send a batch through the encoder and on its way back, without waiting for it where the device allows.

    Args:
        encoder: The frozen encoder.
        batch: Images that it prepared.
        start: Their first row in the shard.
        dtype: Stored type.
    """
    device = device_of(encoder)
    pixels = torch.stack([image.pixels for image in batch])
    sizes = torch.tensor([image.size for image in batch])
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    features = {tap: feature.to(dtype) for tap, feature in encoder.encode(pixels, sizes).items()}
    finite = torch.stack([feature.isfinite().flatten(1).all(1) for feature in features.values()]).all(0)
    return Flight(
        start=start,
        extents=(sizes.numpy() / encoder.input_px).astype(np.float32),
        features={tap: _to_host(feature) for tap, feature in features.items()},
        finite=_to_host(finite),
        arrived=_record_event(device),
    )


def device_of(encoder: Encoder) -> torch.device:
    """Where an encoder's weights are."""
    return next(encoder.parameters()).device


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a smaller batch may succeed."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _record_event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
