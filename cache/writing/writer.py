"""Making and updating a store: plan, whole shards, one commit by rename.

Nothing is changed in place. The next version grows in `NAME.partial`, shares finished shard files by hard link, and
takes the name in one step when every row is there; until then an older version stays readable under it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import (
    ERROR,
    MAX_STORY_BYTES,
    PACKED,
    TapSpec,
    arrays_of,
    check_taps,
    load_json,
    taps_of,
    version_for,
)
from cache.durable import recover_swap, swap, sync_folder
from cache.errors import FormatError, IncompleteRowsError, StoreError, StoreNotFoundError
from cache.fingerprint import JSON, Fingerprint, canonical
from cache.formats.hdf5_pack import pack_hdf5
from cache.formats.zarr_folder import OpenedStore, open_zarr
from cache.index import Row, check_rows, encode_json
from cache.labels import Labels, parse_labels
from cache.packing import whole_error
from cache.reading.copying import copy_rows
from cache.reading.reader import Store, open_files, open_store, store_format
from cache.reading.recover import is_marked, recover
from cache.writing.card import ROUNDING, render_card
from cache.writing.ending import collect_index, finish_store
from cache.writing.join import claims
from cache.writing.lock import WriterLock
from cache.writing.partial import WorkFolder, partial_path
from cache.writing.plan import Plan, make_plan
from cache.writing.reuse import store_source
from cache.writing.same_work import REPLACE, Identity, holds, rows_sha256
from cache.writing.shards import Origins, ShardPlan, ShardWriter, find_origins

MAX_SHARD_ROWS = 65536
"""Bounds a shard's own index to 1 MiB where rows are tiny."""


def create_store(
    path: str | os.PathLike[str],
    *,
    fingerprint: Fingerprint,
    taps: Mapping[str, TapSpec],
    rows: Sequence[Row],
    provenance: Mapping[str, JSON] | None = None,
    shard_mib: float = 64,
    shard_rows: int | None = None,
    reuse: Sequence[str | os.PathLike[str]] = (),
    replace: bool = False,
    labels: Labels | None = None,
    digests: bool = True,
) -> StoreWriter:
    """Begin, continue or update a store.

    What is stored already under the same fingerprint, in the store at `path`, in the remains of an interrupted run or
    in a store named in `reuse`, is taken from there: rows are matched by the digest of their pixels, not by name.

    Args:
        path: `NAME.zarr` (a folder) or `NAME.h5`, `NAME.hdf5` (one file).
        fingerprint: Everything the features depend on but the pixels.
        taps: Shape and type by tap name; what lies beside packed taps is added.
        rows: The samples in the order the store shall have; looked at again at the commit, so leave them as they are.
        provenance: The story to tell with the store, as JSON. Not compared; an interrupted run's own is kept.
        shard_mib: Size of the largest tap's shard files, MiB. A store that is updated keeps its own.
        shard_rows: Rows of a shard at most, where a row takes long to make: only whole shards outlast a stop. None has
            the size decide alone.
        reuse: Further stores of the same fingerprint to take rows from.
        replace: Build a new store where one of another fingerprint stands, and swap it in at the commit.
        labels: Class names, labels and splits to store, in the order of `rows`.
        digests: Whether the store tells the digests of the pixels. Without them it cannot be updated.

    Returns:
        The writer, which holds the exclusive right to write this store until it is closed.

    Raises:
        FingerprintMismatchError: A store of another fingerprint stands there, or is named in `reuse`.
        StoreLockedError: Another process is writing it.
        StoreError: The rows, taps or the path are none a store can have.
    """
    target = Path(os.path.realpath(path))
    store_format(target)
    arrays = arrays_of(taps)
    check_taps(arrays)
    check_rows(rows)
    if labels is not None:
        labels.check(len(rows))
    told = canonical({"fingerprint": fingerprint.fields, "provenance": provenance or {}})
    story, length = load_json(told, "fingerprint or provenance")["provenance"], len(told)
    if length > MAX_STORY_BYTES:
        message = f"fingerprint and provenance take {length} bytes, a store keeps {MAX_STORY_BYTES}; shorten them"
        raise StoreError(message)
    identity = Identity(fingerprint, arrays, story, rows_sha256(rows))
    fitting = int(shard_mib * 2**20) // max(array.row_bytes for array in arrays.values())
    shard_rows = max(1, min(shard_rows or MAX_SHARD_ROWS, MAX_SHARD_ROWS, fitting))
    work = WorkFolder(partial_path(target))
    lock = WriterLock(work.lock, target)
    try:
        job = _begin(target, work, identity, rows, shard_rows, reuse, replace, labels)
        lock.lead()
        if job is not None:
            job = dataclasses.replace(job, labels=labels, digests=digests)
        return StoreWriter(target, work, lock, rows, job)
    except BaseException:
        let_go(work, lock)
        raise


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Attributes:
        identity: Fingerprint, taps and provenance.
        plan: Slot of every row.
        known_bad: Reasons by digest of pixels known to give no feature.
        origins: Where the rows come from that need no encoding.
        labels: Class names, labels and splits, in the order of the rows.
        card: Text of the card, if it is not to be made anew.
        digests: Whether the store tells the digests of its pixels.
        version: Of the format; 0 for the one that is written today.
    """

    identity: Identity
    plan: Plan
    known_bad: Mapping[bytes, str]
    origins: Origins
    labels: Labels | None = None
    card: str = ""
    digests: bool = True
    version: int = 0

    def __post_init__(self) -> None:
        """Choose the version where none is given."""
        if not self.version:
            object.__setattr__(self, "version", version_for(self.identity.taps))


class StoreWriter:
    """Writes the missing shards of one store; made by `create_store`.

    Leaving the `with` block without `commit` keeps what is finished in `NAME.partial` for the next run.

    Attributes:
        path: The store to be.
        rows: The samples that the indices in `pending` mean.
        identity: Fingerprint and arrays of the store to be; None where nothing is left to write.
        reused: Rows whose features are stored already.
        unwritten: Rows of unfinished shards, those among them that move there from finished ones.
        pending: Shards that need features.
    """

    def __init__(self, path: Path, work: WorkFolder, lock: WriterLock, rows: Sequence[Row], job: Job | None) -> None:
        """Take over a planned job, or none where the finished store is what was asked for."""
        self.path = path
        self._work = work
        self._lock: WriterLock | None = lock
        self.rows = rows
        self.identity = job.identity if job else None
        self._job = job
        self._shards = ShardWriter(work, job.identity.taps, job.plan, job.origins) if job else None
        self.pending: tuple[ShardPlan, ...] = self._shards.pending if self._shards else ()
        self.unwritten = self._shards.unwritten if self._shards else 0
        to_encode = {rows[row].digest for plan in self.pending for row in plan.rows}
        self.reused = sum(row.digest not in to_encode for row in rows)

    def write(
        self,
        plan: ShardPlan,
        features: Mapping[str, npt.NDArray[Any]],
        extents: npt.NDArray[Any],
        set_aside: Mapping[int, str] | None = None,
    ) -> None:
        """Write one shard of every tap, whole and synced. Different shards may be written from different threads.

        Args:
            plan: One of `pending`.
            features: By tap, (n, C, h, w) of the type `TapSpec.numbers`, for the n rows of the plan in their order;
                those of a packed tap are packed here, unless they are given as `cache.pack` gives them.
            extents: (n, 2) part of the grid's height and width that is image, in (0, 1].
            set_aside: Reason by row index, for rows of the plan that shall not be in the store.

        Raises:
            StoreError: An array has another shape or type than planned, or an extent is outside (0, 1].
            NoSpaceError: The disk is full. The shard is not written; all others stay.
        """
        if self._lock is None or self._shards is None or plan not in self.pending:
            message = f"{self.path}: shard {plan.number} is not pending in this writer, or the writer is closed"
            raise StoreError(message)
        self._shards.write(plan, features, extents, set_aside)

    @property
    def shard_rows(self) -> int:
        """Rows of a full shard; 1 where nothing is left to write."""
        return self._shards.shard_rows if self._shards else 1

    def claims(self) -> Iterator[ShardPlan]:
        """The pending shards, shared with processes that have called `join_store`.

        Yields shards that no other process has taken and ends when all are finished; write each before asking for the
        next. The shard of a process that dies comes back here.
        """
        return claims(self._work, self.pending, wait=True)

    def commit(self) -> Store:
        """Finish the store and give it its name, in one rename.

        Raises:
            IncompleteRowsError: Shards are still pending, or no row is left.
            NoSpaceError: The disk is full; run again after making space.
        """
        if self._lock is None:
            message = f"{self.path}: this writer is closed; call create_store again to continue"
            raise StoreError(message)
        if self._job is not None and self._shards is not None:
            unwritten = set(self._shards.unfinished())
            missing = sum(len(plan.rows) for plan in self.pending if plan.number in unwritten)
            if missing:
                message = f"{self.path}: {missing} rows are not written yet; write every shard of `pending` first"
                raise IncompleteRowsError(message)
            self._shards.write_moved()
            self._finish(self._job)
            self._give_name()
        self._work.clear()
        self.close()
        return open_store(self.path)

    def _finish(self, job: Job) -> None:
        """Write the index and all metadata."""
        identity = job.identity
        arrays, stored = collect_index(self._work, identity, job.plan, self.rows, job.known_bad)
        if not job.digests:
            del arrays["digest"]
        if job.labels is not None:
            arrays["labels"] = encode_json(job.labels.select(stored).to_json())
        identity = dataclasses.replace(identity, provenance=self._story(job, arrays["slot"]))
        taps = taps_of(identity.taps)
        card = job.card or render_card(identity.fingerprint, taps, len(stored), identity.provenance)
        arrays["card"] = np.frombuffer(card.encode(), np.uint8)
        finish_store(self._work, identity, job.plan.slots, job.plan.shard_rows, arrays, job.version)

    def _story(self, job: Job, slot: npt.NDArray[np.int64]) -> Mapping[str, JSON]:
        """The provenance, with the error of each packed tap over the rows that the store has."""
        told, slots = job.identity.provenance, np.unique(slot)
        packed = [tap for tap, spec in taps_of(job.identity.taps).items() if spec.dtype in PACKED]
        if not packed:
            return told
        rows = self._work.rows(job.plan, job.identity.taps)
        errors = np.empty(len(slots), np.float16)
        found = {}
        for tap in packed:
            if copy_rows(rows, tap + ERROR, errors.itemsize, slots, errors.view(np.uint8).reshape(-1, errors.itemsize)):
                message = f"{self._work.path}: a shard was damaged while this run went on; delete it and run again"
                raise FormatError(message)
            found[tap] = whole_error(errors)
        return {**told, ROUNDING: found}

    def _give_name(self) -> None:
        """The one step that makes the store exist."""
        work = self._work
        if store_format(self.path) == "hdf5":
            pack_hdf5(open_zarr(work.store), self.path, work.packed)
            return
        if self.path.exists():
            swap(work.store, self.path, work.aside)
        else:
            work.store.rename(self.path)
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Give the right to write back; finished shards stay for the next run."""
        if self._lock is not None:
            let_go(self._work, self._lock)
            self._lock = self._shards = self._job = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _begin(
    path: Path,
    work: WorkFolder,
    identity: Identity,
    rows: Sequence[Row],
    shard_rows: int,
    reuse: Sequence[str | os.PathLike[str]],
    replace: bool,
    labels: Labels | None,
) -> Job | None:
    """Plan what is to be done under the lock; None if the finished store at `path` is what is asked for."""
    recover_swap(path, work.aside)
    work.drop_committed(path)
    current, sound = _current(path, identity, replace)
    if current is not None and sound and holds(current.index, rows) and (labels is None or labels == _labels(current)):
        return None
    stores = [] if current is None else [current]
    for name in reuse:
        stores.append(open_files(Path(name)))
        described = stores[-1].description
        identity.require(described.fingerprint, described.taps, Path(name), "it cannot be reused: leave it out")
    sources = [source for opened in stores if (source := store_source(opened))]
    for folder in work.unfinished():
        _check_unfinished(folder, work.path, identity, replace)
    if work.exists():
        before, plan, known_bad = work.load()
        if before.rows_sha256 == identity.rows_sha256:
            sources += [folder.source() for folder in work.retired()]
            return Job(before, plan, known_bad, find_origins(work, plan, before.taps, sources))
        work.retire()
    sources += [folder.source() for folder in work.retired()]
    zarr = store_format(path) == "zarr"
    if current is not None and zarr:
        shard_rows = current.description.shard_rows
    plan = make_plan(rows, shard_rows, sources, keep_shards=zarr)
    reasons = {digest: reason for source in sources for digest, reason in source.set_aside.items()}
    known_bad = {row.digest: reasons[row.digest] for row in rows if row.digest in reasons}
    work.start(identity, plan, sources, known_bad)
    return Job(identity, plan, known_bad, find_origins(work, plan, identity.taps, sources))


def _check_unfinished(folder: WorkFolder, where: Path, identity: Identity, replace: bool) -> None:
    """Leave of unfinished work what is whole, and nothing of another fingerprint.

    Raises:
        FingerprintMismatchError: It has finished features of another fingerprint, and nobody asked to replace them.
    """
    before, plan, _ = folder.load()
    if not replace and folder.finished():  # else nothing would be lost
        identity.require(before.fingerprint, before.taps, where, REPLACE)
    if identity.differences(before.fingerprint, before.taps):
        folder.drop()
    else:
        folder.drop_torn(plan, before.taps)


def _labels(opened: OpenedStore) -> Labels | None:
    """The labels that a store carries."""
    text = opened.index.text("labels")
    return parse_labels(load_json(text.encode(), "labels"), opened.description.rows, "labels") if text else None


def _current(path: Path, identity: Identity, replace: bool) -> tuple[OpenedStore | None, bool]:
    """The finished store at the path, None if there is none to build on; and whether its metadata are sound.

    Raises:
        StoreError: Something else has that name, which is never deleted; or a store whose metadata are damaged, which
            is swapped out only by request.
    """
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return None, True
    current: OpenedStore | None
    sound = True
    try:
        current = open_files(path)
    except StoreError as error:
        if not replace and not isinstance(error, StoreNotFoundError):
            raise
        current, sound = _recovered(path), False
        if not replace:
            message = f"{path} has lost its zarr.json; run 'store repair', which keeps its features"
            raise FormatError(message) from error
        if current is None:
            return None, False
    described = current.description
    if not replace:
        identity.require(described.fingerprint, described.taps, path, REPLACE)
    return (None if identity.differences(described.fingerprint, described.taps) else current), sound


def _recovered(path: Path) -> OpenedStore | None:
    """A store with damaged metadata, as its second copy has them; None if that is damaged, too.

    Raises:
        StoreError: It is no feature store.
    """
    try:
        return recover(path)
    except StoreError as error:
        if not is_marked(path):
            message = f"{path} exists and is no feature store; move it away, or choose another path"
            raise StoreError(message) from error
        return None


def let_go(work: WorkFolder, lock: WriterLock) -> None:
    """Release the lock, and delete the work folder if it is empty."""
    lock.release()
    for folder in dict.fromkeys((work.path, lock.folder)):
        with suppress(OSError):
            folder.rmdir()
