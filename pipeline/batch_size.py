"""How many images the encoder takes at once: by device and input size, halved when memory runs out."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.encoders import Encoder

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
        self._device = next(encoder.parameters()).device.type
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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a smaller batch may succeed."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
