"""Repair: exactly the damaged rows are encoded again, everything else is taken from what is sound.

An interrupted repair is continued if its plan is the one that is made now and every byte it has finished is right;
else it starts over. To find out costs one more reading of what it had finished.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.care.verify import Damage, verify
from cache.description import load_json
from cache.durable import recover_swap, remove
from cache.errors import StoreError, StoreNotFoundError
from cache.formats.zarr_folder import OpenedStore
from cache.formats.zarr_layout import shard_blocks
from cache.index import Row
from cache.labels import Labels, parse_labels
from cache.reading.reader import open_files
from cache.reading.recover import recover
from cache.writing.lock import WriterLock
from cache.writing.partial import WorkFolder, partial_path
from cache.writing.plan import NOWHERE, KeptShard, Plan
from cache.writing.reuse import Source
from cache.writing.same_work import Identity, rows_sha256
from cache.writing.shards import Origins
from cache.writing.writer import Job, StoreWriter, let_go


def repair_store(path: str | os.PathLike[str]) -> StoreWriter:
    """Begin the repair of a damaged store, or continue one that was interrupted.

    The writer's `pending` names the damaged rows; encode them from their images and `write` them, then `commit`. The
    result has the bytes that the store had before it was damaged. Damaged metadata are made again from their second
    copy. A dead slot's damage costs that slot.

    Args:
        path: The store.

    Returns:
        A writer whose `rows` are the store's, with those set aside at the end.

    Raises:
        StoreNotFoundError: There is none.
        FormatError: Both copies of the metadata are damaged: nothing but extracting again helps.
        StoreLockedError: Another process is writing it.
    """
    target = Path(os.path.realpath(path))
    main = WorkFolder(partial_path(target))
    if not target.exists() and not main.path.exists():
        open_files(target)  # says so before the lock makes a folder
    lock = WriterLock(main.path / "lock", target)
    work = WorkFolder(main.path / "repair")
    try:
        for folder in (main, work):
            recover_swap(target, folder.aside)
        if not target.exists():
            _drop(work)
            _say_missing(target, main)
        rows, job = _plan(target, work)
        return StoreWriter(target, work, lock, rows, job)
    except BaseException:
        let_go(work, lock)
        raise


def _drop(work: WorkFolder) -> None:
    """Delete a repair; the plan first, so that what a stop leaves is not continued."""
    work.clear()
    remove(work.path)


def _say_missing(path: Path, main: WorkFolder) -> None:
    """Raise for a store that is not there; a folder that holds only a lock is none that was begun."""
    if main.exists():
        open_files(path)
    message = f"there is no store at {path}; check the path, or run extract to make it"
    raise StoreNotFoundError(message)


def _plan(path: Path, work: WorkFolder) -> tuple[tuple[Row, ...], Job | None]:
    """The store's own rows and slots, with every sound shard kept; no job for a sound store."""
    damage = verify(path)
    try:
        opened = recover(path)
    except StoreError:
        _drop(work)
        raise
    rows = _rows(opened)
    if not damage:
        _drop(work)
        return rows, None
    old = opened.description
    slots = np.concatenate([opened.index.slot, np.full(len(rows) - old.rows, NOWHERE, np.int64)])
    source = Source(
        taps=old.taps,
        shard_rows=old.shard_rows,
        digest=_digest(opened),
        extent=opened.index.extent,
        checksums={tap: opened.index.checksums(tap) for tap in old.taps},
        set_aside={},
        rows=opened.rows,
    )
    origins = _intact(source)
    wanted = np.zeros(old.slots, bool)
    wanted[opened.index.slot] = True
    filled = opened.index.present & (wanted | np.isin(np.arange(old.slots), list(origins)))
    plan = Plan(old.shard_rows, slots, source.digest, filled, _sound_shards(source, damage))
    identity = Identity(old.fingerprint, old.taps, old.provenance, rows_sha256(rows))
    reasons = {bytes.fromhex(item["digest"]): item["reason"] for item in opened.index.set_aside}
    if not _continues(work, path, identity, plan, source, origins):
        _drop(work)
        work.start(identity, plan, [source], reasons)
    card, digests = opened.index.text("card"), "digest" in old.index
    job = Job(identity, plan, reasons, origins, _labels(opened), card, digests, old.version)
    return rows, job


def _continues(work: WorkFolder, path: Path, identity: Identity, plan: Plan, source: Source, origins: Origins) -> bool:
    """Take up an interrupted repair, if there is one of the same plan and all that it has finished is right."""
    try:
        work.drop_committed(path)
        if not work.exists() or not _is_same(work, identity, plan):
            return False
        saved = work.source()
        if not all(_is_right(work, saved, number, plan, source, origins) for number in work.finished()):
            return False
    except Exception:  # it cannot be read, in whichever way: it is made anew
        return False
    for entry in work.store.iterdir():  # index and metadata of a commit that was stopped are written again
        if entry.name not in identity.taps:
            remove(entry)
    return True


def _is_same(work: WorkFolder, identity: Identity, plan: Plan) -> bool:
    """Whether an interrupted repair has this plan, and a folder for every tap."""
    before, saved, _ = work.load()
    return (
        before == identity
        and list(before.taps) == list(identity.taps)
        and saved.shard_rows == plan.shard_rows
        and np.array_equal(saved.row_slot, plan.row_slot)
        and np.array_equal(saved.digest, plan.digest)
        and np.array_equal(saved.filled, plan.filled)
        and all((work.store / tap).is_dir() for tap in identity.taps)
    )


def _is_right(work: WorkFolder, saved: Source, number: int, plan: Plan, source: Source, origins: Origins) -> bool:
    """Whether a finished shard holds what belongs there, byte for byte.

    A shard that the repair shares with the store by hard link is damaged with it.

    Args:
        work: The interrupted repair.
        saved: Its finished shards.
        number: Number of the shard.
        plan: The plan that is made now.
        source: The store.
        origins: Its intact rows.
    """
    slots = plan.shard_slots(number)
    part, sound = slice(slots.start, slots.stop), [slot for slot in slots if slot in origins]
    if work.record(number).set_aside or not np.array_equal(saved.present[part], plan.filled[part]):
        return False
    if not np.array_equal(saved.extent[sound], source.extent[sound]):
        return False
    for name, tap in saved.taps.items():
        rows = [saved.row(name, slot) if plan.filled[slot] else None for slot in slots]
        if any(row is None and plan.filled[slot] for row, slot in zip(rows, slots, strict=True)):
            return False
        blocks = shard_blocks(rows, tap.row_bytes, plan.shard_rows, np.zeros(len(slots), np.uint32))
        as_written = b"".join(blocks) == saved.rows.file(name, number).data.data
        if not as_written or not np.array_equal(saved.checksums[name][sound], source.checksums[name][sound]):
            return False
    return True


def _labels(opened: OpenedStore) -> Labels | None:
    """The labels that travel with the store; samples set aside have none, and lose none."""
    text = opened.index.text("labels")
    if not text:
        return None
    found = parse_labels(load_json(text.encode(), "labels"), opened.description.rows, "labels")
    return found.with_blanks(len(opened.index.set_aside))


def _rows(opened: OpenedStore) -> tuple[Row, ...]:
    """The rows that the store was asked to hold."""
    index = opened.index
    digests = _digest(opened)[index.slot]
    stored = [Row(name, digest.tobytes()) for name, digest in zip(index.ids, digests, strict=True)]
    return (*stored, *(Row(item["id"], bytes.fromhex(item["digest"])) for item in index.set_aside))


def _digest(opened: OpenedStore) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """(slots, 32) digests, zeros if the store does not tell them."""
    digest = opened.index.digest
    return np.zeros((opened.description.slots, 32), np.uint8) if digest is None else digest


def _intact(source: Source) -> Origins:
    """Every slot whose row is sound in all taps, from itself."""
    slots = np.flatnonzero(source.present).tolist()
    return {slot: (source, slot) for slot in slots if all(source.row(tap, slot) is not None for tap in source.taps)}


def _sound_shards(source: Source, damage: Sequence[Damage]) -> tuple[KeptShard, ...]:
    """Shards without damage in any tap, to be shared as they are."""
    if not source.in_shards:
        return ()
    hit = {slot // source.shard_rows for found in damage for slot in found.slots}
    used = np.unique(np.flatnonzero(source.present) // source.shard_rows).tolist()
    return tuple(KeptShard(number, 0, number) for number in used if number not in hit)
