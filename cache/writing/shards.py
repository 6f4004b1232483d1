"""Writing shards: which rows need features, and one shard of every tap at a time, whole and synced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import TapSpec
from cache.durable import sync_folder, write_file
from cache.errors import DamagedRowError, StoreError
from cache.formats.zarr_layout import shard_blocks
from cache.index import UInt8
from cache.packing import packed_all
from cache.writing.partial import ShardRecord, WorkFolder
from cache.writing.plan import Plan
from cache.writing.reuse import Source


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


Origins = Mapping[int, tuple[Source, int]]
"""Source and slot there of an intact row, by the slot where it is wanted."""


def unfinished(work: WorkFolder, plan: Plan) -> list[int]:
    """Numbers of a plan's shards that are still to be written; a gap in the numbering is none."""
    used = np.unique(np.flatnonzero(plan.filled) // plan.shard_rows)
    return sorted(set(used.tolist()) - work.finished())


def find_origins(work: WorkFolder, plan: Plan, taps: Iterable[str], sources: Sequence[Source]) -> Origins:
    """An intact row of some source for every slot of an unfinished shard that has one, by the digest of its pixels."""
    slots = (slot for number in unfinished(work, plan) for slot in plan.shard_slots(number) if plan.filled[slot])
    wanted = {plan.digest[slot].tobytes(): slot for slot in slots}
    origins: dict[int, tuple[Source, int]] = {}
    for source in sources if wanted else ():
        for old in np.flatnonzero(source.present).tolist():
            slot = wanted.get(source.digest[old].tobytes())
            if slot is not None and slot not in origins and all(source.row(tap, old) is not None for tap in taps):
                origins[slot] = (source, old)
    return origins


class ShardWriter:
    """Fills the unfinished shards of a plan from the caller's features and from finished ones."""

    def __init__(self, work: WorkFolder, taps: Mapping[str, TapSpec], plan: Plan, origins: Origins) -> None:
        """Find out what is missing.

        Args:
            work: The store in the making.
            taps: Shapes and types of all arrays.
            plan: Slot of every row.
            origins: Where the rows come from that need no encoding.
        """
        self._work = work
        self._taps = taps
        self._plan = plan
        self.shard_rows = plan.shard_rows
        self._origin = origins
        self.pending: tuple[ShardPlan, ...] = self._find_pending()

    def _find_pending(self) -> tuple[ShardPlan, ...]:
        """Unfinished shards that need features; a shard that was kept may have slots of rows that are gone."""
        first_row: dict[int, int] = {}
        for row, slot in enumerate(self._plan.row_slot.tolist()):
            first_row.setdefault(slot, row)
        needed = first_row.keys() - self._origin.keys()
        plans = (
            ShardPlan(number, tuple(first_row[slot] for slot in self._slots(number) if slot in needed))
            for number in self.unfinished()
        )
        return tuple(plan for plan in plans if plan.rows)

    def _slots(self, number: int) -> list[int]:
        """Slots of a shard that are to hold something."""
        return [slot for slot in self._plan.shard_slots(number) if self._plan.filled[slot]]

    @property
    def unwritten(self) -> int:
        """Rows of unfinished shards."""
        return sum(len(self._slots(number)) for number in self.unfinished())

    def unfinished(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        return unfinished(self._work, self._plan)

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
            features: By tap, (n, C, h, w) of the tap's numbers, for the n rows of the plan in their order; those of a
                packed tap may also be packed already, with the arrays beside them.
            extents: (n, 2) part of the grid's height and width that is image, in (0, 1].
            set_aside: Reason by row index, for rows of the plan that shall not be in the store.

        Raises:
            StoreError: An array has another shape or type than planned, or an extent is outside (0, 1].
            NoSpaceError: The disk is full. The shard is not written; all others stay.
        """
        reasons = dict(set_aside or {})
        features = packed_all(self._taps, features)
        self._check(plan, features, extents, reasons)
        slots = self._plan.shard_slots(plan.number)
        new = {int(self._plan.row_slot[row]): i for i, row in enumerate(plan.rows) if row not in reasons}
        bad = {int(self._plan.row_slot[row]): reason for row, reason in reasons.items()}
        extent = np.zeros((len(slots), 2), np.float32)
        for within, slot in enumerate(slots):
            if slot in new:
                extent[within] = extents[new[slot]]
            elif slot in self._origin:
                source, old = self._origin[slot]
                extent[within] = source.extent[old]
        checksums = np.zeros((len(self._taps), len(slots)), np.uint32)
        for number, (name, tap) in enumerate(self._taps.items()):
            given = features[name].reshape(-1, tap.row_bytes // features[name].itemsize).view(np.uint8)
            rows = [self._row(name, slot, new, given) for slot in slots]
            if any(row is not None for row in rows):
                blocks = shard_blocks(rows, tap.row_bytes, self._plan.shard_rows, checksums[number])
                target = self._work.shard(name, plan.number)
                write_file(target, blocks, self._work.scratch(f"{plan.number}-{number}"))
                sync_folder(target.parent)
        record = ShardRecord(extent, checksums, {slot - slots.start: reason for slot, reason in bad.items()})
        self._work.finish(plan.number, record)

    def write_moved(self) -> None:
        """Write the unfinished shards whose rows all come from elsewhere."""
        nothing = {name: np.empty((0, *tap.shape), tap.array_dtype) for name, tap in self._taps.items()}
        for number in self.unfinished():
            self.write(ShardPlan(number, ()), nothing, np.empty((0, 2), np.float32))

    def _row(self, tap: str, slot: int, new: Mapping[int, int], given: UInt8) -> UInt8 | None:
        """Bytes of the row that belongs at a slot, from the caller or from a source; None for an empty slot."""
        if slot in new:
            row: UInt8 = given[new[slot]]
            return row
        if slot not in self._origin:
            return None
        source, old = self._origin[slot]
        data = source.row(tap, old)
        if data is None:
            message = f"{self._work.path}: a reused row was damaged while this run went on; run the same command again"
            raise DamagedRowError(message, ())
        return data

    def _check(
        self,
        plan: ShardPlan,
        features: Mapping[str, npt.NDArray[Any]],
        extents: npt.NDArray[Any],
        reasons: Mapping[int, str],
    ) -> None:
        """Refuse arrays that do not fit the plan."""
        count = len(plan.rows)
        if features.keys() != self._taps.keys():
            message = f"features of {sorted(features)!r} were given; expected {sorted(self._taps)!r}"
            raise StoreError(message)
        for name, tap in self._taps.items():
            array = features[name]
            if array.shape != (count, *tap.shape) or array.dtype != tap.array_dtype or not array.flags.c_contiguous:
                message = (
                    f"tap {name!r}: got a {array.dtype} array of shape {array.shape}; expected a C-contiguous "
                    f"{tap.array_dtype} array of shape {(count, *tap.shape)}"
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
