"""Stage one: every image through the frozen encoder once, into a store, overlapped and resumable.

Decoding runs in threads ahead of the encoder (Pillow releases the lock), the encoder in the calling thread, and one
thread behind it writes finished shards, so the device waits for neither. Features reach the store in whole shards of
fixed composition: the stored numbers do not depend on where a run was interrupted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import cache
from pipeline.data import Dataset
from pipeline.encoders import Encoder, Prepared
from pipeline.errors import DataError
from pipeline.overlap import ahead
from pipeline.progress import Progress, silent
from pipeline.scan import Scan, scan


@dataclass
class Clock:
    """Seconds spent in each part of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time inside the `with` block to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class ExtractReport:
    """What a run of stage one did.

    Attributes:
        store: Path of the finished store.
        rows: Samples in the store.
        encoded: Images that went through the encoder in this run.
        reused: Samples whose features were already stored.
        set_aside: Reason by sample id, for images that are not in the store.
        seconds: Wall time of the parts seen from the encoder's thread: `scan`, `wait for decode`, `encode`,
            `wait for write`, `commit`; and `total`.
        advice: One line if the encoder was starved, else empty.
    """

    store: Path
    rows: int
    encoded: int
    reused: int
    set_aside: Mapping[str, str]
    seconds: Mapping[str, float]
    advice: str = ""


def fingerprint(encoder: Encoder, reading: Mapping[str, object], dtype: str) -> cache.Fingerprint:
    """Everything that the stored numbers depend on, apart from the source pixels that each row names itself.

    Args:
        encoder: The frozen encoder; it answers for weights, preprocessing, precision, taps and pool.
        reading: How files become RGB where that is a choice (see `pipeline.data.reading_rules`).
        dtype: `"float16"` or `"float32"`, the type of the stored numbers.
    """
    return cache.Fingerprint({**encoder.fingerprint(), "reading": dict(reading), "dtype": dtype})


def extract(
    dataset: Dataset,
    encoder: Encoder,
    path: Path,
    *,
    reading: Mapping[str, object],
    dtype: str = "float16",
    shard_mib: int = 64,
    batch_size: int = 8,
    workers: int = 2,
    reuse: Sequence[Path] = (),
    replace: bool = False,
    strict: bool = False,
    recheck: bool = False,
    provenance: Mapping[str, object] | None = None,
    progress: Progress = silent,
) -> ExtractReport:
    """Encode what is not stored yet and leave a complete store at `path`.

    Args:
        dataset: The images; their order becomes the row order.
        encoder: The frozen encoder.
        path: `NAME.zarr` or `NAME.h5`.
        reading: See `fingerprint`.
        dtype: Type of the stored numbers.
        shard_mib: Size of the largest tap's shard files, MiB.
        batch_size: Images per encoder call.
        workers: Decoding threads.
        reuse: Older stores of the same fingerprint whose rows may be taken.
        replace: Swap out a store of another fingerprint once the new one is complete, instead of refusing.
        strict: Stop at the first bad image instead of setting it aside.
        recheck: Decode every image again, also those whose file size and time have not changed.
        provenance: What the store should remember about its making (not compared).
        progress: Called after each image.

    Raises:
        DataError: An image cannot be read and `strict` is set, or none can.
        cache.StoreError: The store refuses, for example for another fingerprint; the message says what to do.
    """
    clock = Clock()
    started = time.perf_counter()
    with clock("scan"):
        memory = path.with_name(path.name + ".seen.npz")
        seen = scan(dataset, memory, recheck=recheck, workers=workers, strict=strict, progress=progress)
    if not seen.readable.any():
        reason = next(iter(seen.set_aside.values()), "it has no samples")
        message = f"none of the {len(dataset.samples)} images of {dataset.name!r} can be read: {reason}"
        raise DataError(message)
    identity = fingerprint(encoder, reading, dtype)
    taps = {name: cache.TapSpec(*shape, dtype) for name, shape in encoder.taps.items()}
    rows = [cache.Row(dataset.samples[i].id, seen.digests[i].tobytes()) for i in seen.rows]
    with cache.create_store(
        path,
        fingerprint=identity,
        taps=taps,
        rows=rows,
        provenance=provenance,
        shard_mib=shard_mib,
        reuse=reuse,
        replace=replace,
    ) as writer:
        to_encode = sum(len(plan.rows) for plan in writer.pending)
        _check_disk(path, to_encode, taps)
        set_aside = _encode_shards(dataset, encoder, writer, seen, dtype, batch_size, workers, strict, clock, progress)
        with clock("commit"):
            store = writer.commit()
    clock.seconds["total"] = time.perf_counter() - started
    return ExtractReport(
        store=path,
        rows=len(store),
        encoded=to_encode,
        reused=writer.reused,
        set_aside={**seen.set_aside, **{rows[row].id: reason for row, reason in set_aside.items()}},
        seconds=clock.seconds,
        advice=_advice(clock.seconds, workers),
    )


def _encode_shards(
    dataset: Dataset,
    encoder: Encoder,
    writer: cache.StoreWriter,
    seen: Scan,
    dtype: str,
    batch_size: int,
    workers: int,
    strict: bool,
    clock: Clock,
    progress: Progress,
) -> dict[int, str]:
    """Encode and write every pending shard; returns the rows set aside for a non-finite feature, with the reason."""
    plans = writer.pending
    total = sum(len(plan.rows) for plan in plans)
    set_aside: dict[int, str] = {}
    done = 0

    indices = seen.rows

    def decode(row: int) -> Prepared:
        return encoder.prepare(seen.image(int(indices[row])))

    with ThreadPoolExecutor(workers, "decode") as decoders, ThreadPoolExecutor(1, "write") as writers:
        decoded = ahead(decode, (row for plan in plans for row in plan.rows), decoders, depth=2 * batch_size + workers)
        writing: Future[None] | None = None
        try:
            for plan in plans:
                shard = _ShardBuffer(encoder.taps, len(plan.rows), dtype)
                for start in range(0, len(plan.rows), batch_size):
                    count = min(batch_size, len(plan.rows) - start)
                    with clock("wait for decode"):
                        batch = [next(decoded) for _ in range(count)]
                    with clock("encode"):
                        shard.fill(start, batch, encoder)
                    done += count
                    progress("encode", done, total)
                bad = {plan.rows[i]: "the encoder gave a feature that is not finite" for i in shard.non_finite()}
                if bad and strict:
                    first = dataset.samples[indices[min(bad)]].id
                    message = f"sample {first!r}: {bad[min(bad)]}; run without --strict to set such images aside"
                    raise DataError(message)
                set_aside.update(bad)
                with clock("wait for write"):
                    if writing is not None:
                        writing.result()
                writing = writers.submit(writer.write, plan, shard.features, shard.extents, bad)
            with clock("wait for write"):
                if writing is not None:
                    writing.result()
        except BaseException:
            decoders.shutdown(wait=False, cancel_futures=True)
            raise
    return set_aside


class _ShardBuffer:
    """Host memory of one shard in the making: every tap's rows, and which of them are finite."""

    def __init__(self, taps: Mapping[str, tuple[int, int, int]], rows: int, dtype: str) -> None:
        self.features: dict[str, npt.NDArray[np.generic]] = {
            tap: np.empty((rows, *shape), dtype) for tap, shape in taps.items()
        }
        self.extents = np.empty((rows, 2), np.float32)
        self._finite = np.ones(rows, bool)

    def fill(self, start: int, batch: Sequence[Prepared], encoder: Encoder) -> None:
        """Encode a batch of prepared images into rows `start` onwards."""
        pixels = torch.stack([image.pixels for image in batch])
        sizes = torch.tensor([image.size for image in batch])
        stop = start + len(batch)
        self.extents[start:stop] = sizes.numpy() / np.float32(encoder.input_px)
        for tap, feature in encoder.encode(pixels, sizes).items():
            rows = torch.from_numpy(self.features[tap][start:stop])
            stored = feature.to(rows.dtype)
            self._finite[start:stop] &= stored.isfinite().flatten(1).all(1).cpu().numpy()
            rows.copy_(stored)

    def non_finite(self) -> list[int]:
        """Rows with a value that is not finite in some tap, after rounding to the stored type."""
        return [int(i) for i in np.flatnonzero(~self._finite)]


def _check_disk(path: Path, rows: int, taps: Mapping[str, cache.TapSpec]) -> None:
    """Refuse to start work whose result cannot fit; a store is packed once more where it becomes a single file."""
    row_bytes = sum(t.channels * t.height * t.width * np.dtype(t.dtype).itemsize for t in taps.values())
    copies = 1 if path.suffix == ".zarr" else 2
    needed = rows * row_bytes * copies
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        message = (
            f"{path}: {rows} rows need {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; "
            f"make space, raise encoder.pool, or list fewer taps"
        )
        raise cache.NoSpaceError(message)


def _advice(seconds: Mapping[str, float], workers: int) -> str:
    """One line of what to change if the encoder waited for more than a tenth of its time, else nothing."""
    encode = seconds.get("encode", 0.0)
    for part, remedy in (
        ("wait for decode", f"raise resources.workers above {workers}, or keep the images in a smaller format"),
        ("wait for write", "the disk is the limit: a faster disk, or a larger encoder.pool"),
    ):
        waited = seconds.get(part, 0.0)
        if encode > 0 and waited > 0.1 * encode and waited > 1.0:
            return f"the encoder spent {waited:.0f} s on '{part}' against {encode:.0f} s of work: {remedy}"
    return ""
