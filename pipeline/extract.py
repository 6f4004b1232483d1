"""Stage one: every image through the frozen encoder once, into a store, overlapped and resumable.

Decoding runs in threads ahead of the encoder (Pillow releases the lock), the encoder in the calling thread, and one
thread behind it writes finished shards, so the device waits for neither. Features reach the store in whole shards of
fixed composition: the stored numbers do not depend on where a run was interrupted.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import cache
from pipeline.data import Dataset
from pipeline.encode import BatchSize, Flight, Shard, launch, out_of_memory
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


JSON = Any  # a value that `json` writes


def fingerprint(encoder: Encoder, reading: Mapping[str, JSON], dtype: str) -> cache.Fingerprint:
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
    reading: Mapping[str, JSON],
    dtype: str = "float16",
    shard_mib: int = 64,
    batch_size: int | None = None,
    workers: int = 2,
    reuse: Sequence[Path] = (),
    replace: bool = False,
    strict: bool = False,
    recheck: bool = False,
    provenance: Mapping[str, JSON] | None = None,
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
        batch_size: Images per encoder call; None chooses (see `pipeline.encode.BatchSize`).
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
    with clock("total"):
        with clock("scan"):
            memory = path.with_name(path.name + ".seen.npz")
            seen = scan(dataset, memory, recheck=recheck, workers=workers, strict=strict, progress=progress)
        if not seen.readable.any():
            reason = next(iter(seen.set_aside.values()), "it has no samples")
            message = f"none of the {len(dataset.samples)} images of {dataset.name!r} can be read: {reason}"
            raise DataError(message)
        taps = {name: cache.TapSpec(*shape, dtype) for name, shape in encoder.taps.items()}
        with cache.create_store(
            path,
            fingerprint=fingerprint(encoder, reading, dtype),
            taps=taps,
            rows=[cache.Row(dataset.samples[i].id, seen.digests[i].tobytes()) for i in seen.rows],
            provenance=provenance,
            shard_mib=shard_mib,
            reuse=reuse,
            replace=replace,
        ) as writer:
            encoded = sum(len(plan.rows) for plan in writer.pending)
            _announce(path, encoded, writer.reused, taps, progress)
            sizes = BatchSize(encoder, batch_size, path.with_name(path.name + ".batch.json"))
            set_aside = _Encoding(seen, encoder, writer, dtype, sizes, workers, strict, clock, progress).run()
            with clock("commit"):
                store = writer.commit()
    return ExtractReport(
        store=path,
        rows=len(store),
        encoded=encoded,
        reused=writer.reused,
        set_aside={**seen.set_aside, **set_aside},
        seconds=clock.seconds,
        advice=_advice(clock.seconds, workers),
    )


@dataclass
class _Encoding:
    """The loop over pending shards: decoding ahead of the encoder, writing behind it."""

    seen: Scan
    encoder: Encoder
    writer: cache.StoreWriter
    dtype: str
    sizes: BatchSize
    workers: int
    strict: bool
    clock: Clock
    progress: Progress

    def __post_init__(self) -> None:
        self._done = 0
        self._total = sum(len(plan.rows) for plan in self.writer.pending)
        self._began = time.perf_counter()

    def run(self) -> dict[str, str]:
        """Encode and write every pending shard; returns the samples set aside, with the reason."""
        set_aside: dict[str, str] = {}
        with ThreadPoolExecutor(self.workers, "decode") as decoders, ThreadPoolExecutor(1, "write") as writers:
            writing: Future[None] | None = None
            plans = deque(self.writer.pending)
            decoded = self._decode_ahead(plans, decoders)
            while plans:
                try:
                    shard = self._encode(plans[0], decoded)
                except Exception as error:
                    if not out_of_memory(error) or not self.sizes.halve():
                        raise
                    decoded.close()
                    decoded = self._decode_ahead(plans, decoders)  # the shard in hand again, in smaller batches
                    continue
                plan = plans.popleft()
                bad = self._set_aside(plan, shard)
                set_aside.update({self._id(row): reason for row, reason in bad.items()})
                with self.clock("wait for write"):
                    if writing is not None:
                        writing.result()
                writing = writers.submit(self.writer.write, plan, shard.features, shard.extents, bad)
            with self.clock("wait for write"):
                if writing is not None:
                    writing.result()
        return set_aside

    def _encode(self, plan: cache.ShardPlan, decoded: Iterator[Prepared]) -> Shard:
        """Encode the rows of one shard, with one batch in flight while the next is launched."""
        shard = Shard(self.encoder.taps, len(plan.rows), self.dtype)
        flight: Flight | None = None
        for start in range(0, len(plan.rows), self.sizes.images):
            with self.clock("wait for decode"):
                batch = list(islice(decoded, min(self.sizes.images, len(plan.rows) - start)))
            with self.clock("encode"):
                ahead_of_it = launch(self.encoder, batch, start, getattr(torch, self.dtype))
                if flight is not None:
                    shard.land(flight)
                flight = ahead_of_it
            self._report(start + len(batch))
        with self.clock("encode"):
            if flight is not None:
                shard.land(flight)
        self._done += len(plan.rows)
        return shard

    def _decode_ahead(self, plans: Iterable[cache.ShardPlan], pool: ThreadPoolExecutor) -> Generator[Prepared]:
        """Prepared images of the plans' rows, in order, decoded up to two batches ahead."""
        indices = self.seen.rows

        def decode(row: int) -> Prepared:
            return self.encoder.prepare(self.seen.image(int(indices[row])))

        rows = [row for plan in plans for row in plan.rows]
        return ahead(decode, rows, pool, depth=2 * self.sizes.images + self.workers)

    def _set_aside(self, plan: cache.ShardPlan, shard: Shard) -> dict[int, str]:
        """Reason by row for the rows of a shard that must not be stored."""
        bad = {plan.rows[i]: "the encoder gave a feature that is not finite" for i in shard.non_finite()}
        if bad and self.strict:
            row = min(bad)
            message = f"sample {self._id(row)!r}: {bad[row]}; without --strict such images are set aside"
            raise DataError(message)
        return bad

    def _id(self, row: int) -> str:
        return self.seen.dataset.samples[int(self.seen.rows[row])].id

    def _report(self, in_shard: int) -> None:
        done = self._done + in_shard
        seconds = time.perf_counter() - self._began
        self.progress("encode", done, self._total, images_per_s=done / seconds)


def _announce(path: Path, rows: int, reused: int, taps: Mapping[str, cache.TapSpec], progress: Progress) -> None:
    """Say what is about to happen, and refuse to start work whose result cannot fit on the disk."""
    packed_again = path.suffix != ".zarr"  # shards first, then one file
    needed = rows * sum(tap.row_bytes for tap in taps.values()) * (2 if packed_again else 1)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    mib = 2**20
    progress("plan", 1, 1, encode=rows, reuse=reused, needed_mib=needed / mib, free_mib=free / mib)
    if needed > free:
        message = (
            f"{path}: {rows} rows need {needed / mib:.0f} MiB and {free / mib:.0f} MiB are free; "
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
