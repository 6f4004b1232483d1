"""Making and updating a store: plan, whole shards, one commit by rename.

Nothing is changed in place. The next version grows in `NAME.partial`, shares finished shard files by hard link, and
takes the name in one step when every row is there; until then an older version stays readable under it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import Description, TapSpec, check_taps, index_shapes
from cache.durable import recover_swap, swap, sync_folder, write_file
from cache.errors import (
    DamagedRowError,
    FingerprintMismatchError,
    IncompleteRowsError,
    StoreError,
    StoreNotFoundError,
)
from cache.fingerprint import JSON, Fingerprint, canonical
from cache.hdf5_file import pack_hdf5
from cache.index import Row, UInt8, check_rows, describe_entry, encode_ids, encode_json
from cache.lock import WriterLock
from cache.plan import NOWHERE, Plan, make_plan
from cache.reader import Store, open_files, open_store, store_format
from cache.source import Source, store_source
from cache.work import Identity, ShardRecord, WorkFolder, rows_sha256
from cache.zarr_folder import OpenedStore, open_zarr
from cache.zarr_layout import (
    group_json,
    index_chunk_name,
    index_json,
    root_json,
    shard_blocks,
    tap_json,
    with_checksum,
)

MAX_SHARD_ROWS = 16384
"""Bounds a shard's own index to 256 KiB where rows are tiny."""


@dataclass(frozen=True)
class ShardPlan:
    """A shard that needs features.

    Attributes:
        number: Number of the shard.
        rows: Indices into the rows given to `create_store` whose features are wanted, in this order. Of samples with
            identical pixels one is named.
    """

    number: int
    rows: tuple[int, ...]


def partial_path(path: Path) -> Path:
    """Where the store at `path` grows."""
    return path.with_name(path.name + ".partial")


def create_store(
    path: str | os.PathLike[str],
    *,
    fingerprint: Fingerprint,
    taps: Mapping[str, TapSpec],
    rows: Sequence[Row],
    provenance: Mapping[str, JSON] | None = None,
    shard_mib: float = 64,
    reuse: Sequence[str | os.PathLike[str]] = (),
    replace: bool = False,
) -> StoreWriter:
    """Begin, continue or update a store.

    What is stored already under the same fingerprint, in the store at `path`, in the remains of an interrupted run or
    in a store named in `reuse`, is taken from there: rows are matched by the digest of their pixels, not by name.

    Args:
        path: `NAME.zarr` (a folder) or `NAME.h5`, `NAME.hdf5` (one file).
        fingerprint: Everything the features depend on but the pixels.
        taps: Shape and type by tap name.
        rows: The samples in the order the store shall have.
        provenance: The story to tell with the store, as JSON. Not compared; an interrupted run's own is kept.
        shard_mib: Size of the largest tap's shard files, MiB. A store that is updated keeps its own.
        reuse: Further stores of the same fingerprint to take rows from.
        replace: Build a new store where one of another fingerprint stands, and swap it in at the commit.

    Returns:
        The writer, which holds the exclusive right to write this store until it is closed.

    Raises:
        FingerprintMismatchError: A store of another fingerprint stands there, or is named in `reuse`.
        StoreLockedError: Another process is writing it.
        StoreError: The rows, taps or the path are none a store can have.
    """
    target = Path(os.path.realpath(path))
    store_format(target)
    check_taps(taps)
    check_rows(rows)
    row_bytes = max(tap.row_bytes for tap in taps.values())
    shard_rows = max(1, min(MAX_SHARD_ROWS, int(shard_mib * 2**20) // row_bytes))
    identity = Identity(fingerprint, dict(taps), _json(provenance or {}), rows_sha256(rows))
    partial = partial_path(target)
    lock = WriterLock(partial / "lock", target)
    try:
        return StoreWriter(target, identity, tuple(rows), shard_rows, reuse, replace, lock)
    except BaseException:
        lock.release()
        _drop_empty(partial)
        raise


class StoreWriter:
    """Writes the missing shards of one store; made by `create_store`.

    Leaving the `with` block without `commit` keeps what is finished in `NAME.partial` for the next run.

    Attributes:
        path: The store to be.
        reused: Rows whose features are stored already.
        pending: Shards that need features.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        rows: tuple[Row, ...],
        shard_rows: int,
        reuse: Sequence[str | os.PathLike[str]],
        replace: bool,
        lock: WriterLock,
    ) -> None:
        """Plan the work; see `create_store`."""
        self.path = path
        self._rows = rows
        self._lock: WriterLock | None = lock
        self._identity = identity
        self._work = WorkFolder(partial_path(path))
        self._zarr = store_format(path) == "zarr"
        recover_swap(path, self._work.aside)
        self._work.drop_committed()
        current = self._open_current(replace)
        self._unchanged = current is not None and _holds(current, rows)
        if self._unchanged:
            self._work.clear()
            self.pending: tuple[ShardPlan, ...] = ()
            self.reused = len(rows)
            return
        stores = [opened for opened in (current, *(_open_reused(other, identity) for other in reuse)) if opened]
        sources = [source for opened in stores if (source := store_source(opened))]
        if current is not None and self._zarr:
            shard_rows = current.description.shard_rows
        self._plan, self._bad = self._resume_or_plan(sources, shard_rows, replace)
        self._sources = sources + [folder.source() for folder in self._work.retired()]
        self._origin = self._find_origins()
        self.pending = self._pending()
        to_encode = {self._rows[row].digest for plan in self.pending for row in plan.rows}
        self.reused = sum(row.digest not in to_encode for row in rows)

    def _open_current(self, replace: bool) -> OpenedStore | None:
        """The finished store at the path, None if there is none that can be used."""
        try:
            current = open_files(self.path)
        except StoreNotFoundError:
            return None
        except StoreError:
            if replace:
                return None
            raise
        differences = _differences(current.description.fingerprint, current.description.taps, self._identity)
        if differences and not replace:
            message = f"{self.path} holds features of another fingerprint ({_spell(differences)}); {_REMEDY}"
            raise FingerprintMismatchError(message, differences)
        return None if differences else current

    def _resume_or_plan(
        self, sources: Sequence[Source], shard_rows: int, replace: bool
    ) -> tuple[Plan, Mapping[bytes, str]]:
        """Plan of the interrupted run if it was for the same rows, else a new one that builds on it."""
        work = self._work
        if work.exists():
            before, plan, bad = work.load()
            differences = _differences(before.fingerprint, before.taps, self._identity)
            if differences and not replace:
                message = f"{work.path} is unfinished work of another fingerprint ({_spell(differences)}); {_REMEDY}"
                raise FingerprintMismatchError(message, differences)
            if differences:
                work.clear()
            elif before.rows_sha256 == self._identity.rows_sha256:
                self._identity = before
                return plan, bad
            else:
                work.retire()
        sources = [*sources, *(folder.source() for folder in work.retired())]
        plan = make_plan(self._rows, shard_rows, sources, keep_shards=self._zarr)
        known = {digest: reason for source in sources for digest, reason in source.set_aside.items()}
        bad = {row.digest: known[row.digest] for row in self._rows if row.digest in known}
        work.start(self._identity, plan, sources, bad)
        return plan, bad

    def _find_origins(self) -> dict[int, tuple[Source, int]]:
        """Intact row of some source, for every slot of an unfinished shard that has one."""
        plan, finished = self._plan, self._work.finished()
        wanted = {
            plan.digest[slot].tobytes(): slot
            for number in range(plan.shards)
            if number not in finished
            for slot in plan.shard_slots(number)
            if plan.filled[slot]
        }
        origins: dict[int, tuple[Source, int]] = {}
        for source in self._sources if wanted else ():
            for slot in np.flatnonzero(source.present).tolist():
                target = wanted.get(source.digest[slot].tobytes())
                if (
                    target is not None
                    and target not in origins
                    and all(source.row(tap, slot) is not None for tap in self._identity.taps)
                ):
                    origins[target] = (source, slot)
        return origins

    def _pending(self) -> tuple[ShardPlan, ...]:
        """Unfinished shards that need features."""
        first_row: dict[int, int] = {}
        for row, slot in enumerate(self._plan.row_slot.tolist()):
            first_row.setdefault(slot, row)
        plans = []
        for number in self._unfinished():
            slots = [slot for slot in self._plan.shard_slots(number) if self._plan.filled[slot]]
            needed = tuple(first_row[slot] for slot in slots if slot not in self._origin)
            if needed:
                plans.append(ShardPlan(number, needed))
        return tuple(plans)

    def _unfinished(self) -> list[int]:
        """Numbers of the shards that are still to be written; a gap in the numbering is none."""
        finished = self._work.finished()
        used = {slot // self._plan.shard_rows for slot in np.flatnonzero(self._plan.filled).tolist()}
        return sorted(used - finished)

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
            features: By tap, (n, C, h, w) of the tap's type, for the n rows of the plan in their order.
            extents: (n, 2) part of the grid's height and width that is image, in (0, 1].
            set_aside: Reason by row index, for rows of the plan that shall not be in the store.

        Raises:
            StoreError: An array has another shape or type than planned, or an extent is outside (0, 1].
            NoSpaceError: The disk is full. The shard is not written; all others stay.
        """
        reasons = dict(set_aside or {})
        self._check_shard(plan, features, extents, reasons)
        place = {int(self._plan.row_slot[row]): i for i, row in enumerate(plan.rows)}
        bad = {int(self._plan.row_slot[row]): reason for row, reason in reasons.items()}
        slots = self._plan.shard_slots(plan.number)
        extent = np.zeros((len(slots), 2), np.float32)
        for slot in slots:
            if slot in place and slot not in bad:
                extent[slot - slots.start] = extents[place[slot]]
            elif slot in self._origin:
                source, old = self._origin[slot]
                extent[slot - slots.start] = source.extent[old]
        checksums = np.zeros((len(self._identity.taps), len(slots)), np.uint32)
        for tap, spec in enumerate(self._identity.taps.items()):
            name, shape = spec
            new = features[name].reshape(len(plan.rows), -1).view(np.uint8) if plan.rows else np.empty((0, 0), np.uint8)
            data = [self._row(name, slot, place, new) if extent[slot - slots.start, 0] else None for slot in slots]
            if any(row is not None for row in data):
                blocks = shard_blocks(data, shape.row_bytes, self._plan.shard_rows, checksums[tap])
                write_file(self._work.shard(name, plan.number), blocks, self._work.scratch(f"{plan.number}-{tap}"))
        record = ShardRecord(extent, checksums, {slot - slots.start: reason for slot, reason in bad.items()})
        self._work.finish(plan.number, record)

    def _row(self, tap: str, slot: int, place: Mapping[int, int], new: UInt8) -> UInt8:
        """Bytes of the row that belongs at a slot, from the caller or from a source."""
        if slot in place:
            row: UInt8 = new[place[slot]]
            return row
        source, old = self._origin[slot]
        data = source.row(tap, old)
        if data is None:
            message = f"{self.path}: a reused row was damaged while this run went on; run the same command again"
            raise DamagedRowError(message, ())
        return data

    def _check_shard(
        self,
        plan: ShardPlan,
        features: Mapping[str, npt.NDArray[Any]],
        extents: npt.NDArray[Any],
        reasons: Mapping[int, str],
    ) -> None:
        """Refuse arrays that do not fit the plan."""
        count = len(plan.rows)
        if features.keys() != self._identity.taps.keys():
            message = f"features of {sorted(features)!r} were given; expected {sorted(self._identity.taps)!r}"
            raise StoreError(message)
        for name, tap in self._identity.taps.items():
            array = features[name]
            if array.shape != (count, *tap.shape) or array.dtype != tap.dtype or not array.flags.c_contiguous:
                message = (
                    f"tap {name!r}: got a {array.dtype} array of shape {array.shape}; expected a C-contiguous "
                    f"{tap.dtype} array of shape {(count, *tap.shape)}"
                )
                raise StoreError(message)
        kept = np.array([row not in reasons for row in plan.rows], bool)
        if extents.shape != (count, 2) or not ((extents[kept] > 0) & (extents[kept] <= 1)).all():
            message = f"extents: expected ({count}, 2) fractions in (0, 1], got shape {extents.shape}: {extents!r:.200}"
            raise StoreError(message)
        strangers = reasons.keys() - set(plan.rows)
        if strangers:
            message = f"rows {sorted(strangers)!r} are set aside in shard {plan.number}, which does not hold them"
            raise StoreError(message)

    def commit(self) -> Store:
        """Finish the store and give it its name, in one rename.

        Raises:
            IncompleteRowsError: Shards are still pending, or no row is left.
            NoSpaceError: The disk is full; run again after making space.
        """
        if self._lock is None:
            message = f"{self.path}: this writer is closed; call create_store again to continue"
            raise StoreError(message)
        if not self._unchanged:
            missing = {plan.number for plan in self.pending} - self._work.finished()
            if missing:
                rows = sum(len(plan.rows) for plan in self.pending if plan.number in missing)
                message = f"{self.path}: {rows} rows are not written yet; write every shard of `pending` first"
                raise IncompleteRowsError(message)
            for number in self._unfinished():
                self.write(ShardPlan(number, ()), self._nothing(), np.empty((0, 2), np.float32))
            self._finish_store()
            self._give_name()
            self._sources = []
            self._work.clear()
        self.close()
        return open_store(self.path)

    def _nothing(self) -> dict[str, npt.NDArray[Any]]:
        """Features of no rows."""
        return {name: np.empty((0, *tap.shape), tap.dtype) for name, tap in self._identity.taps.items()}

    def _finish_store(self) -> None:
        """Write index and metadata into `store/`; the root last."""
        identity, plan, store = self._identity, self._plan, self._work.store
        arrays = self._index_arrays()
        rows, slots = len(arrays["slot"]), plan.slots
        assert all(arrays[name].shape == shape for name, (_, shape) in index_shapes(identity.taps, rows, slots).items())
        description = Description(
            fingerprint=identity.fingerprint,
            taps=identity.taps,
            rows=rows,
            slots=slots,
            shard_rows=plan.shard_rows,
            index={name: describe_entry(array) for name, array in arrays.items()},
            provenance=identity.provenance,
        )
        files = {
            store / name / "zarr.json": tap_json(tap, slots, plan.shard_rows) for name, tap in identity.taps.items()
        }
        for name, entry in description.index.items():
            folder = store / "index" / name
            files[folder.parent / "zarr.json"] = group_json()
            files[folder / "zarr.json"] = index_json(entry)
            files[folder / index_chunk_name(entry)] = with_checksum(arrays[name].tobytes())
        for file, data in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, [data], self._work.scratch("index"))
        sync_folder(store / "index")
        root = root_json(description)
        self._work.seal(root)
        write_file(store / "zarr.json", [root], self._work.scratch("index"))

    def _index_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Every array of the index, by name."""
        plan = self._plan
        extent, checksums, new_reasons = self._work.collect(plan, self._identity.taps)
        present = extent[:, 0] > 0
        reasons = {**self._bad, **{plan.digest[slot].tobytes(): text for slot, text in new_reasons.items()}}
        inside = [i for i, slot in enumerate(plan.row_slot.tolist()) if slot != NOWHERE and present[slot]]
        if not inside:
            message = f"{self.path}: all {len(self._rows)} rows are set aside, for example for {_first(reasons)!r}"
            raise IncompleteRowsError(message)
        outside = sorted(set(range(len(self._rows))).difference(inside))
        set_aside = [
            {"id": row.id, "digest": row.digest.hex(), "reason": reasons[row.digest]}
            for row in (self._rows[i] for i in outside)
        ]
        return {
            "ids": encode_ids([self._rows[i].id for i in inside]),
            "set_aside": encode_json(set_aside),
            "slot": plan.row_slot[inside],
            "digest": np.where(present[:, None], plan.digest, np.uint8(0)),
            "extent": extent,
            **{f"crc32c/{tap}": checksums[tap] for tap in self._identity.taps},
        }

    def _give_name(self) -> None:
        """The one step that makes the store exist."""
        work = self._work
        if not self._zarr:
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
            self._lock.release()
            self._lock = None
            _drop_empty(self._work.path)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_REMEDY = "choose another path to keep both, or replace it (replace=True, --replace)"


def _differences(fingerprint: Fingerprint, taps: Mapping[str, TapSpec], wanted: Identity) -> tuple[Any, ...]:
    """Fields that differ, stored first; shapes of taps count as fields."""
    found = fingerprint.differences(wanted.fingerprint)
    shapes = [
        Fingerprint({"stored": {name: [*tap.shape, tap.dtype] for name, tap in side.items()}})
        for side in (taps, wanted.taps)
    ]
    return found + shapes[0].differences(shapes[1])


def _spell(differences: Sequence[Any]) -> str:
    """The differing fields as a person reads them."""
    shown = [f"{d.field} is {d.ours!r} there and {d.theirs!r} here" for d in differences[:8]]
    more = len(differences) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _holds(current: OpenedStore, rows: Sequence[Row]) -> bool:
    """Whether a store was made from exactly these rows."""
    index = current.index
    if index.digest is None:
        return False
    aside = {item["id"]: bytes.fromhex(item["digest"]) for item in index.set_aside}
    kept = [row for row in rows if aside.get(row.id) != row.digest]
    if len(kept) + len(aside) != len(rows) or tuple(row.id for row in kept) != index.ids:
        return False
    wanted = np.frombuffer(b"".join(row.digest for row in kept), np.uint8).reshape(-1, 32)
    return bool((index.digest[index.slot] == wanted).all())


def _open_reused(path: str | os.PathLike[str], identity: Identity) -> OpenedStore:
    """A store named to be reused.

    Raises:
        FingerprintMismatchError: Its features were computed in another way.
    """
    opened = open_files(Path(path))
    differences = _differences(opened.description.fingerprint, opened.description.taps, identity)
    if differences:
        message = f"{os.fspath(path)} cannot be reused ({_spell(differences)}); leave it out"
        raise FingerprintMismatchError(message, differences)
    return opened


def _first(reasons: Mapping[bytes, str]) -> str:
    return next(iter(reasons.values()), "")


def _json(value: Mapping[str, JSON]) -> dict[str, JSON]:
    """A copy that holds plain JSON values only."""
    import json

    copy = json.loads(canonical(value))
    assert isinstance(copy, dict)
    return copy


def _drop_empty(folder: Path) -> None:
    """Delete a work folder that holds nothing."""
    try:
        folder.rmdir()
    except OSError:
        return
