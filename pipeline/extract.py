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


@dataclass(frozen=True)
class Ranks:
    """One of several processes that make one store: the first leads and commits, the others help.

    Attributes:
        rank: Number of this process, from 0.
        world: How many there are.
        wait_seconds: How long a helper waits for the leader's scan.
    """

    rank: int = 0
    world: int = 1
    wait_seconds: float = 24 * 3600.0


ALONE = Ranks()


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
    ranks: Ranks = ALONE,
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
        ranks: This process among those that make the store together.
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
        store = _Store(
            path,
            fingerprint=fingerprint(encoder, reading, dtype),
            taps={name: cache.TapSpec(*shape, dtype) for name, shape in encoder.taps.items()},
            rows=[cache.Row(dataset.samples[i].id, seen.digests[i].tobytes()) for i in seen.rows],
            reuse=tuple(reuse),
        )
        sizes = BatchSize(encoder, batch_size, path.with_name(path.name + ".batch.json"))
        encoding = _Encoding(seen, encoder, dtype, sizes, workers, strict, ranks, clock, progress)
        if ranks.rank:
            reused = _help(store, encoding)
        else:
            reused = _lead(store, encoding, provenance=provenance, shard_mib=shard_mib, replace=replace)
    return ExtractReport(
        store=path,
        rows=len(store.rows) - len(encoding.set_aside),
        encoded=encoding.encoded,
        reused=reused,
        set_aside={**seen.set_aside, **encoding.set_aside},
        seconds=clock.seconds,
        advice=_advice(clock.seconds, workers),
    )


@dataclass(frozen=True)
class _Store:
    """The store to be, as all ranks describe it."""

    path: Path
    fingerprint: cache.Fingerprint
    taps: Mapping[str, cache.TapSpec]
    rows: Sequence[cache.Row]
    reuse: Sequence[Path]


def _lead(
    store: _Store,
    encoding: _Encoding,
    *,
    provenance: Mapping[str, JSON] | None,
    shard_mib: int,
    replace: bool,
) -> int:
    """Plan the store, encode what no other rank takes, commit; returns how many rows were stored already."""
    with cache.create_store(
        store.path,
        fingerprint=store.fingerprint,
        taps=store.taps,
        rows=store.rows,
        provenance=provenance,
        shard_mib=shard_mib,
        reuse=store.reuse,
        replace=replace,
    ) as writer:
        _announce(store, writer, encoding.progress)
        encoding.run(writer)
        with encoding.clock("commit"):
            writer.commit().close()
    return writer.reused


def _help(store: _Store, encoding: _Encoding) -> int:
    """Encode shards of a store that another process leads."""
    worker = cache.join_store(
        store.path,
        fingerprint=store.fingerprint,
        taps=store.taps,
        rows=store.rows,
        reuse=store.reuse,
        wait_seconds=encoding.ranks.wait_seconds,
    )
    encoding.run(worker)
    return len(store.rows) - sum(len(plan.rows) for plan in worker.pending)


@dataclass
class _Encoding:
    """The loop over pending shards: decoding ahead of the encoder, writing behind it.

    Attributes:
        encoded: Images that went through the encoder.
        set_aside: Reason by sample id, for features that are not finite.
    """

    seen: Scan
    encoder: Encoder
    dtype: str
    sizes: BatchSize
    workers: int
    strict: bool
    ranks: Ranks
    clock: Clock
    progress: Progress
    encoded: int = 0
    set_aside: dict[str, str] = field(default_factory=dict)

    def run(self, writer: cache.StoreWriter | cache.StoreWorker) -> None:
        """Encode and write every pending shard that this process gets hold of."""
        self._total = sum(len(plan.rows) for plan in writer.pending)
        self._began = time.perf_counter()
        with ThreadPoolExecutor(self.workers, "decode") as decoders, ThreadPoolExecutor(1, "write") as writers:
            writing: Future[None] | None = None
            for plan in writer.claims():
                shard = self._encode(plan, decoders)
                bad = self._non_finite(plan, shard)
                with self.clock("wait for write"):
                    if writing is not None:
                        writing.result()
                    writing = writers.submit(writer.write, plan, shard.features, shard.extents, bad)
                    if self.ranks.world > 1:
                        writing.result()  # a claim ends when the next is asked for, and the shard must be there by then
            with self.clock("wait for write"):
                if writing is not None:
                    writing.result()

    def _encode(self, plan: cache.ShardPlan, decoders: ThreadPoolExecutor) -> Shard:
        """Encode the rows of one shard; from its start in smaller batches when memory runs out."""
        while True:
            try:
                return self._encode_in_batches(plan, decoders)
            except RuntimeError as error:
                if not out_of_memory(error) or not self.sizes.halve():
                    raise

    def _encode_in_batches(self, plan: cache.ShardPlan, decoders: ThreadPoolExecutor) -> Shard:
        """Encode the rows of one shard, with one batch in flight while the next is launched."""
        shard = Shard(self.encoder.taps, len(plan.rows), self.dtype)
        decoded = ahead(self._decode, plan.rows, decoders, depth=2 * self.sizes.images + self.workers)
        flight: Flight | None = None
        for start in range(0, len(plan.rows), self.sizes.images):
            with self.clock("wait for decode"):
                batch = list(islice(decoded, self.sizes.images))
            with self.clock("encode"):
                following = launch(self.encoder, batch, start, getattr(torch, self.dtype))
                if flight is not None:
                    shard.land(flight)
                flight = following
            self._report(self.encoded + start + len(batch))
        with self.clock("encode"):
            if flight is not None:
                shard.land(flight)
        self.encoded += len(plan.rows)
        return shard

    def _decode(self, row: int) -> Prepared:
        return self.encoder.prepare(self.seen.image(int(self.seen.rows[row])))

    def _non_finite(self, plan: cache.ShardPlan, shard: Shard) -> dict[int, str]:
        """Reason by row for the rows of a shard that must not be stored."""
        bad = {plan.rows[i]: "the encoder gave a feature that is not finite" for i in shard.non_finite()}
        by_id = {self.seen.dataset.samples[int(self.seen.rows[row])].id: reason for row, reason in bad.items()}
        if bad and self.strict:
            sample, reason = next(iter(by_id.items()))
            message = f"sample {sample!r}: {reason}; without --strict such images are set aside"
            raise DataError(message)
        self.set_aside.update(by_id)
        return bad

    def _report(self, done: int) -> None:
        seconds = time.perf_counter() - self._began
        self.progress("encode", done, self._total, images_per_s=done / seconds)


def _announce(store: _Store, writer: cache.StoreWriter, progress: Progress) -> None:
    """Say what is about to happen, and refuse to start work whose result cannot fit on the disk."""
    rows = sum(len(plan.rows) for plan in writer.pending)
    packed_again = store.path.suffix != ".zarr"  # shards first, then one file
    needed = rows * sum(tap.row_bytes for tap in store.taps.values()) * (2 if packed_again else 1)
    existing = next(parent for parent in (store.path, *store.path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    mib = 2**20
    progress("plan", 1, 1, encode=rows, reuse=writer.reused, needed_mib=needed / mib, free_mib=free / mib)
    if needed > free:
        message = (
            f"{store.path}: {rows} rows need {needed / mib:.0f} MiB and {free / mib:.0f} MiB are free; "
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
