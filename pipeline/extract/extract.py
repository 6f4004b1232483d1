"""Stage one: every image through the frozen encoder once, into a store, overlapped and resumable.

Decoding runs in threads ahead of the encoder, the encoder in the calling thread, and one thread behind it writes
finished shards, so the device waits for neither. Threads suffice, because decoders and digests release the lock: two
read X-rays 1.9 times as fast as one, as PNG and as JPEG (`python -m tests.benchmarks.extract`). Features reach the
store in whole shards of fixed composition: the stored numbers do not depend on where a run was interrupted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cache
from pipeline.data import Dataset
from pipeline.data.scan import memory_of, scan
from pipeline.encoders.family import Encoder
from pipeline.encoders.known_mask.encoder import KnownMask
from pipeline.extract.batch_size import BatchSize
from pipeline.extract.encode import Clock, Encoding
from pipeline.extract.plan import Contents, Rows, masks_sha256, refuse_another_data_set, unchanged
from pipeline.mask_tap import is_masks
from pipeline.progress import Progress, silent

if TYPE_CHECKING:
    from pipeline.encoders import Described
    from pipeline.extract.on_ray import OnRay, RayEncoding

_POLL_SECONDS = 0.2
_MASKED_ROWS = 64  # of a shard: the masks of an image take seconds, and a stop loses the shard that is not full yet
JSON = Any  # a value that `json` writes


@dataclass(frozen=True)
class ExtractReport:
    """What a run of stage one did.

    Attributes:
        store: Path of the finished store.
        rows: Samples in the store.
        encoded: Images that went through the encoder in this run.
        reused: Samples whose features were already stored.
        set_aside: Reason by sample id, for images that are not in the store; of several processes the first one's
            report has all of them, the others' have none.
        seconds: Wall time of the parts seen from the encoder's thread: `scan`, `wait for decode`, `encode`,
            `wait for write`, `commit`; and `total`. `decode` and `write` are the time that other threads were busy
            meanwhile. Only `scan` and `total` where nothing was to do. A helper's `scan` has its wait for the first's.
        advice: One line if the encoder was starved, else empty.
        device: Where it encoded, as torch names it, or people where it was a cluster; empty where nothing was to do.
        nodes: What each node of a cluster did: its name, workers, images and seconds.
    """

    store: Path
    rows: int
    encoded: int
    reused: int
    set_aside: Mapping[str, str]
    seconds: Mapping[str, float]
    advice: str = ""
    device: str = ""
    nodes: Sequence[Mapping[str, JSON]] = ()


@dataclass(frozen=True)
class Ranks:
    """One of several processes of one machine that make one store: the first leads and commits, the others help.

    Attributes:
        rank: Number of this process, from 0.
        world: How many there are.
        wait_seconds: How long a helper waits for the leader's scan, whose digests it takes over.
    """

    rank: int = 0
    world: int = 1
    wait_seconds: float = 24 * 3600.0


ALONE = Ranks()


def extract(
    dataset: Dataset,
    encoder: Described,
    path: Path,
    *,
    reading: Mapping[str, JSON],
    dtype: str = "float16",
    image_px: int | None = None,
    shard_mib: int = 64,
    batch_size: int | None = None,
    workers: int = 2,
    reuse: Sequence[Path] = (),
    replace: bool = False,
    strict: bool = False,
    recheck: bool = False,
    provenance: Mapping[str, JSON] | None = None,
    ranks: Ranks = ALONE,
    on: OnRay | None = None,
    progress: Progress = silent,
) -> ExtractReport:
    """Encode what is not stored yet and leave a complete store at `path`.

    Args:
        dataset: The images; their order becomes the row order.
        encoder: The frozen encoder; where a cluster encodes it need only say what it is (see `on_node.Plain`).
        path: `NAME.zarr` or `NAME.h5`.
        reading: See `Contents`.
        dtype: Type of the stored numbers.
        image_px: Side of the images to store beside the features (see `pipeline.image_tap`); None for none.
        shard_mib: Size of the largest tap's shard files, MiB; with masks they hold few rows whatever it is.
        batch_size: Images per encoder call at most; None chooses (see `pipeline.extract.batch_size`).
        workers: Decoding threads.
        reuse: Older stores of the same fingerprint whose rows may be taken.
        replace: Swap out a store of another fingerprint or another data set once the new one is complete, instead of
            refusing.
        strict: Stop at the first bad image instead of setting it aside.
        recheck: Decode every image again, also those whose file size and time have not changed.
        provenance: What the store should remember about its making (not compared).
        ranks: This process among those that make the store together.
        on: The cluster that looks at the images and encodes them in place of this process.
        progress: Called after each image.

    Raises:
        DataError: An image cannot be read and `strict` is set, or none can; or the store at `path` holds none of these
            images, so that all of its features would go.
        cache.StoreError: The store refuses, for example for another fingerprint; the message says what to do.
    """
    if isinstance(encoder, KnownMask):
        encoder.check(dataset.name, dataset.mask(0))
    clock = Clock()
    with clock("total"):
        with clock("scan"):
            rows = Rows(
                scan(
                    dataset,
                    memory_of(path),
                    recheck=recheck,
                    workers=workers,
                    strict=strict,
                    look=None if on is None else partial(on.look, dataset),
                    wait=partial(_await_leader, path, ranks.wait_seconds) if ranks.rank else None,
                    progress=progress,
                )
            )
            if isinstance(encoder, KnownMask):
                encoder.know(masks_sha256(rows.mask, rows.ids, workers=workers, progress=progress))
        wanted = Contents(encoder.fingerprint(), encoder.taps, reading, dtype, image_px)
        if not recheck and unchanged(dataset, path, wanted, rows.all_digests, progress):
            return ExtractReport(path, len(rows), 0, len(rows), {}, clock.seconds)
        if not (replace or ranks.rank):
            refuse_another_data_set(path, wanted.fingerprint, rows)
        store = _Store(path, wanted, rows, tuple(reuse))
        memory = path.with_name(path.name + ".batch.json")
        encoding: Encoding | RayEncoding
        if on is not None:
            encoding = on.encoding(dataset, store.rows, wanted, memory, clock, progress)
        else:
            assert isinstance(encoder, Encoder)
            encoding = Encoding(
                encoder,
                store.rows.mask if encoder.reads == "mask" else store.rows.image,
                store.rows.ids,
                wanted,
                BatchSize(encoder, batch_size, memory),
                workers,
                strict=strict,
                shared=ranks.world > 1,
                clock=clock,
                progress=progress,
            )
        if ranks.rank:
            assert isinstance(encoding, Encoding)
            reused = _help(store, encoding, ranks.wait_seconds)
            kept, bad = len(store.rows), dict[str, str]()
        else:
            encoding.sizes.fit(_shard_rows(wanted, shard_mib))
            encoding.sizes.search(len(store.rows))
            reused, kept, bad = _lead(store, encoding, provenance=provenance, shard_mib=shard_mib, replace=replace)
            bad = {**rows.set_aside, **bad}
    return ExtractReport(
        store=path,
        rows=kept,
        encoded=encoding.encoded,
        reused=reused,
        set_aside=bad,
        seconds=clock.seconds,
        advice=_advice(clock.seconds, encoding.workers),
        device=encoding.device,
        nodes=encoding.nodes,
    )


@dataclass(frozen=True)
class _Store:
    """The store to be, as all ranks describe it."""

    path: Path
    contents: Contents
    rows: Rows
    reuse: Sequence[Path]


def _lead(
    store: _Store,
    encoding: Encoding | RayEncoding,
    *,
    provenance: Mapping[str, JSON] | None,
    shard_mib: int,
    replace: bool,
) -> tuple[int, int, dict[str, str]]:
    """Plan the store, encode what no other rank takes, commit.

    Returns:
        How many rows were stored already, how many the store has now, and what gave no feature, whichever rank found
        that out: reason by sample id.
    """
    with cache.create_store(
        store.path,
        fingerprint=store.contents.fingerprint,
        taps=store.contents.taps,
        rows=store.rows,
        provenance=provenance,
        shard_mib=shard_mib,
        shard_rows=_shard_rows(store.contents, shard_mib),
        reuse=store.reuse,
        replace=replace,
    ) as writer:
        _announce(store, writer, encoding.progress)
        encoding.run(writer)
        with encoding.clock("commit"):
            finished = writer.commit()
        with finished:
            return writer.reused, len(finished), dict(finished.set_aside)


def _shard_rows(contents: Contents, shard_mib: int) -> int:
    """Rows of a full shard of a new store: as many as its size allows, with masks few."""
    fitting = shard_mib * 2**20 // max(array.row_bytes for array in cache.arrays_of(contents.taps).values())
    return max(1, min(fitting, _MASKED_ROWS) if any(is_masks(tap) for tap in contents.taps) else fitting)


def _await_leader(path: Path, wait_seconds: float, has_looked: Callable[[], bool]) -> None:
    """Wait for the first process to have looked at all images, so that the others need not: they read its memory.

    Another store at `path` than at first says so, too: the first process has finished it.
    """
    give_up, store = time.monotonic() + wait_seconds, _named(path)
    while time.monotonic() < give_up and not has_looked() and _named(path) == store:
        time.sleep(_POLL_SECONDS)


def _named(path: Path) -> int | None:
    """Number of the file or folder that has a name now."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _help(store: _Store, encoding: Encoding, wait_seconds: float) -> int:
    """Encode shards of a store that another process leads."""
    worker = cache.join_store(
        store.path,
        fingerprint=store.contents.fingerprint,
        taps=store.contents.taps,
        rows=store.rows,
        reuse=store.reuse,
        wait_seconds=wait_seconds,
    )
    encoding.sizes.recall()  # the leader has chosen by now
    encoding.run(worker)
    return len(store.rows) - sum(len(plan.rows) for plan in worker.pending)


def _announce(store: _Store, writer: cache.StoreWriter, progress: Progress) -> None:
    """Say what is about to happen, and refuse to start work whose result cannot fit on the disk."""
    rows = sum(len(plan.rows) for plan in writer.pending)
    in_one_file = store.path.suffix != ".zarr" and writer.identity is not None
    packed = len(store.rows) if in_one_file else 0  # after the shards, all rows once more
    needed = (writer.unwritten + packed) * store.contents.row_bytes
    existing = next(parent for parent in (store.path, *store.path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    mib = 2**20
    progress("plan", 1, 1, encode=rows, reuse=writer.reused, needed_mib=needed / mib, free_mib=free / mib)
    if needed > free:
        message = (
            f"{store.path}: {needed / mib:.0f} MiB are to be written and {free / mib:.0f} MiB are free; make space, "
            f"raise encoder.pool, or list fewer taps"
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
