"""The loop of stage one: decoding ahead of the encoder, one batch in flight on the device, writing behind it.

While the device works on a batch, the results of the one before travel back and the images of the next travel there.
On a CPU the same code is simply one batch after the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import cache
from pipeline.data.resize import squared
from pipeline.errors import DataError
from pipeline.extract.batch_size import BatchSize, Told, out_of_memory
from pipeline.extract.plan import Contents
from pipeline.image_tap import IMAGE
from pipeline.overlap import ahead, threads
from pipeline.progress import Progress, silent

if TYPE_CHECKING:
    from pipeline.encoders import Encoder, Prepared


class Shard:
    """One shard in host memory: what encoding it gives, and writing it takes.

    Args:
        plan: Which rows it has.
        taps: Its arrays, by tap.

    Attributes:
        plan: Which rows it has.
        features: Tap to (rows, C, h, w), images among them; of packed taps the arrays that `cache.pack` gives.
        extents: (rows, 2) float32, the part of the grid's height and width that is image.
        bad: Reason by row, for rows that must not be stored.
    """

    def __init__(self, plan: cache.ShardPlan, taps: Mapping[str, cache.TapSpec]) -> None:
        rows = len(plan.rows)
        self.plan = plan
        self.features: dict[str, npt.NDArray[np.generic]] = {
            name: np.empty((rows, *array.shape), array.array_dtype) for name, array in cache.arrays_of(taps).items()
        }
        self._taps = taps
        self.extents = np.empty((rows, 2), np.float32)
        self.bad: dict[int, str] = {}
        self._finite = np.ones(rows, bool)

    def land(self, flight: Flight) -> None:
        """Take in a batch, waiting until it is there."""
        if flight.arrived is not None:
            flight.arrived.synchronize()
        rows = slice(flight.start, flight.start + len(flight.extents))
        self.extents[rows] = flight.extents
        self._finite[rows] = flight.finite.numpy()
        for tap, feature in flight.features.items():
            for name, values in cache.pack(tap, self._taps[tap], feature.numpy()).items():
                self.features[name][rows] = values

    def keep_images(self, start: int, images: Sequence[Tensor | None]) -> None:
        """Take in the images (3, S, S) uint8 of a batch, where images are stored."""
        for row, image in enumerate(images, start=start):
            if image is not None:
                self.features[IMAGE][row] = image.numpy()

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


def launch(encoder: Encoder, batch: Sequence[Prepared], start: int, size: int, dtype: torch.dtype) -> Flight:
    """Send a batch through the encoder and on its way back, without waiting for it where the device allows.

    A short batch is filled up with its last image, because the last bits of a feature depend on the size of the batch
    (not on the company or the place in it): so an image encoded again later, alone, gets the very same numbers.

    Args:
        encoder: The frozen encoder.
        batch: Images that it prepared.
        start: Their first row in the shard.
        size: Images in a full batch.
        dtype: Type of the features, to which they are rounded.
    """
    device = encoder.device
    full = [*batch, *[batch[-1]] * (size - len(batch))]
    pixels = torch.stack([image.pixels for image in full])
    sizes = torch.tensor([image.size for image in batch])
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    features = encoder.encode(pixels, sizes, dtype)
    finite = torch.stack([feature.isfinite().flatten(1).all(1) for feature in features.values()]).all(0)
    return Flight(
        start=start,
        extents=(sizes.numpy() / encoder.input_px).astype(np.float32),
        features={tap: _to_host(feature) for tap, feature in features.items()},
        finite=_to_host(finite),
        arrived=_record_event(device),
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


@dataclass
class Clock:
    """Seconds spent in each part of a run, by whichever thread."""

    seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time inside the `with` block to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - start)

    def add(self, part: str, seconds: float) -> None:
        """Add time to `part` that was taken elsewhere."""
        with self._lock:
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds


@dataclass
class Encoding:
    """Encodes shards of a store, whoever planned them: `encode` one, `write_shard` it, or `run` them all, overlapped.

    Attributes:
        encoder: The frozen encoder.
        read: What the encoder reads of a row of the plan; called from the decoding threads.
        names: Sample id of each row.
        contents: What the store holds.
        sizes: Images per encoder call.
        workers: Decoding threads.
        strict: Stop at an image that the encoder refuses, or of which a feature is not finite, instead of setting its
            sample aside.
        shared: Whether other processes encode shards of the same store.
        clock: Where the time went.
        progress: Called after each batch.
        encoded: Images that went through the encoder.
        set_aside: Reason by sample id, for images that the encoder refuses and features that are not finite.
    """

    encoder: Encoder
    read: Callable[[int], npt.NDArray[Any]]
    names: Sequence[str]
    contents: Contents
    sizes: BatchSize | Told
    workers: int = 2
    strict: bool = False
    shared: bool = False
    clock: Clock = field(default_factory=Clock)
    progress: Progress = silent
    encoded: int = 0
    set_aside: dict[str, str] = field(default_factory=dict)
    _refused: dict[int, str] = field(default_factory=dict)
    _total: int = 0
    _began: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> str:
        """Where it encodes, as torch names it."""
        return str(self.encoder.device)

    @property
    def nodes(self) -> Sequence[Mapping[str, Any]]:
        """None: this is no cluster."""
        return ()

    def run(self, writer: cache.StoreWriter | cache.StoreWorker) -> None:
        """Encode and write every pending shard that this process gets hold of."""
        self._total = sum(len(plan.rows) for plan in writer.pending)
        self._began = time.perf_counter()
        self._report(0)
        self.sizes.fit(writer.shard_rows)
        with threads(self.workers, "decode") as decoders, threads(1, "write") as writers:
            writing: Future[None] | None = None
            for plan in writer.claims():
                shard = self.encode(plan, decoders)
                with self.clock("wait for write"):
                    if writing is not None:
                        writing.result()
                    writing = writers.submit(self._write, writer, shard)
                    if self.shared:
                        writing.result()  # a claim ends when the next is asked for, and the shard must be there by then
            with self.clock("wait for write"):
                if writing is not None:
                    writing.result()

    def encode(self, plan: cache.ShardPlan, decoders: ThreadPoolExecutor) -> Shard:
        """Encode the rows of one shard; from its start in smaller batches when memory runs out.

        Raises:
            DataError: `strict` is set, and a row must not be stored.
        """
        while True:
            try:
                shard = self._encode_in_batches(plan, decoders)
            except RuntimeError as error:
                if not out_of_memory(error) or not self.sizes.halve():
                    raise
            else:
                shard.bad = self._bad_rows(shard)
                return shard

    def _encode_in_batches(self, plan: cache.ShardPlan, decoders: ThreadPoolExecutor) -> Shard:
        """Encode the rows of one shard, with one batch in flight while the next is launched."""
        shard = Shard(plan, self.contents.taps)
        decoded = ahead(self._decode, plan.rows, decoders, depth=2 * self.sizes.images + self.workers)
        dtype = getattr(torch, cache.Roundings(self.contents.dtype).given)
        flight: Flight | None = None
        for start in range(0, len(plan.rows), self.sizes.images):
            with self.clock("wait for decode"):
                batch, images = zip(*islice(decoded, self.sizes.images), strict=True)
                shard.keep_images(start, images)
            with self.clock("encode"):
                following = launch(self.encoder, batch, start, self.sizes.images, dtype)
                if flight is not None:
                    shard.land(flight)
                flight = following
            self._report(self.encoded + start + len(batch))
        with self.clock("encode"):
            if flight is not None:
                shard.land(flight)
        self.encoded += len(plan.rows)
        return shard

    def _decode(self, row: int) -> tuple[Prepared, Tensor | None]:
        side_px = self.contents.image_px
        with self.clock("decode"):
            image = self.read(row)
            kept = None if side_px is None else squared(image, side_px)
            try:
                return self.encoder.prepare(image), kept
            except DataError as error:
                self._refused[row] = str(error)
                side = self.encoder.input_px
                return self.encoder.prepare(np.zeros((side, side, 3), np.uint8)), kept

    def _write(self, writer: cache.StoreWriter | cache.StoreWorker, shard: Shard) -> None:
        with self.clock("write"):
            write_shard(writer, shard)

    def _bad_rows(self, shard: Shard) -> dict[int, str]:
        """Reason by row for the rows of a shard that must not be stored."""
        rows = shard.plan.rows
        bad = {rows[i]: "the encoder gave a feature that is not finite" for i in shard.non_finite()}
        bad |= {row: self._refused[row] for row in rows if row in self._refused}
        by_id = {self.names[row]: reason for row, reason in bad.items()}
        if bad and self.strict:
            sample, reason = next(iter(by_id.items()))
            message = f"sample {sample!r}: {reason}; without --strict such images are set aside"
            raise DataError(message)
        self.set_aside.update(by_id)
        return bad

    def _report(self, done: int) -> None:
        report_encoding(self.progress, self.contents, self._total, self._began, done)


def report_encoding(
    progress: Progress, contents: Contents, total: int, began: float, done: int, **info: float | str
) -> None:
    """Report how many images of a run that began at a time are encoded, how fast, and how many MiB that makes."""
    mib = contents.row_bytes / 2**20
    rate = {"images_per_s": done / (time.perf_counter() - began)} if done else {}
    progress("encode", done, total, **rate, mib=f"{done * mib:.4g}/{total * mib:.4g}", **info)


def write_shard(writer: cache.StoreWriter | cache.StoreWorker, shard: Shard) -> None:
    """Write an encoded shard, whole and synced; its bad rows are left out and their reasons kept."""
    writer.write(shard.plan, shard.features, shard.extents, shard.bad)
