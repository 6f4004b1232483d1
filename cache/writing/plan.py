"""Which sample goes to which slot, and which shard files of older versions stay as they are.

A shard is kept whole while at most a quarter of its rows are dead; rows of other shards are moved, and what no source
has is encoded. New slots fill new shards in row order. The plan depends on the rows and the finished shards alone, so
the bytes of a store do not depend on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from cache.index import Row, UInt8
from cache.writing.reuse import Source

MAX_DEAD = 0.25
"""Part of a shard's rows that may be dead before its live rows are moved to a new one."""

MAX_SMALL = 8
"""Shards that may stay at most half full, so that many small additions do not end in many small files."""

NOWHERE = -1
"""Slot of a row whose pixels are known to give no feature."""


@dataclass(frozen=True)
class KeptShard:
    """A finished shard file that the new version shares.

    Attributes:
        number: Its number in the new version.
        source: Position of its source in the list that was planned with.
        source_number: Its number there.
    """

    number: int
    source: int
    source_number: int


@dataclass(frozen=True)
class Plan:
    """Assignment of samples to slots.

    Attributes:
        shard_rows: Slots in a shard.
        row_slot: (rows,) int64 slot of each row, `NOWHERE` where the row is set aside already.
        digest: (slots, 32) uint8 digest of the pixels whose feature belongs at each slot.
        filled: (slots,) whether anything belongs there; digests are zeros where nothing does.
        kept: Shards taken over as they are.
    """

    shard_rows: int
    row_slot: npt.NDArray[np.int64]
    digest: UInt8
    filled: npt.NDArray[np.bool_]
    kept: tuple[KeptShard, ...]

    @property
    def slots(self) -> int:
        """Places in each tap's array."""
        return len(self.digest)

    @property
    def shards(self) -> int:
        """Shards, kept and new."""
        return -(-self.slots // self.shard_rows)

    def shard_slots(self, number: int) -> range:
        """Slots of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.slots))


def make_plan(rows: Sequence[Row], shard_rows: int, sources: Sequence[Source], keep_shards: bool) -> Plan:
    """Assign every sample a slot.

    Args:
        rows: The samples in their order.
        shard_rows: Slots in a shard.
        sources: Where finished shards may be shared from, most preferred first.
        keep_shards: Whether shard files may be shared at all.
    """
    known_bad = {digest for source in sources for digest in source.set_aside}
    wanted = dict.fromkeys(row.digest for row in rows if row.digest not in known_bad)
    kept = _kept(wanted, shard_rows, sources) if keep_shards else []
    placed: dict[bytes, int] = {}
    shards: dict[int, UInt8] = {}
    for shard, live in kept:
        start = shard.source_number * shard_rows
        shards[shard.number] = sources[shard.source].digest[start : start + shard_rows]
        placed.update((digest, shard.number * shard_rows + within) for digest, within in live.items())
    fresh = [digest for digest in wanted if digest not in placed]
    free = (number for number in count() if number not in shards)
    for first in range(0, len(fresh), shard_rows):
        chosen = fresh[first : first + shard_rows]
        number = next(free)
        shards[number] = np.frombuffer(b"".join(chosen), np.uint8).reshape(-1, 32)
        placed.update((digest, number * shard_rows + within) for within, digest in enumerate(chosen))
    row_slot = np.array([placed.get(row.digest, NOWHERE) for row in rows], np.int64)
    return Plan(shard_rows, row_slot, *_tables(shards, shard_rows), tuple(shard for shard, _ in kept))


def _kept(
    wanted: dict[bytes, None], shard_rows: int, sources: Sequence[Source]
) -> list[tuple[KeptShard, dict[bytes, int]]]:
    """Shards to share, under their own number where it is free, each with the place of its live rows by digest."""
    found: list[tuple[int, int, dict[bytes, int]]] = []
    placed: set[bytes] = set()
    for position, source in enumerate(sources):
        if source.in_shards and source.shard_rows == shard_rows:
            for number in range(-(-len(source.digest) // shard_rows)):
                live = _live(source, number, wanted, placed)
                if live:
                    found.append((position, number, live))
                    placed |= live.keys()
    if sum(2 * len(live) <= shard_rows for *_, live in found) > MAX_SMALL:
        found = [item for item in found if 2 * len(item[2]) > shard_rows]
    taken: set[int] = set()
    free = (number for number in count() if number not in taken)
    kept = []
    for position, number, live in found:
        new = next(free) if number in taken else number
        taken.add(new)
        kept.append((KeptShard(new, position, number), live))
    return kept


def _live(source: Source, number: int, wanted: dict[bytes, None], placed: set[bytes]) -> dict[bytes, int]:
    """Place in the shard by digest of the rows worth keeping, empty if too many others are dead."""
    start = number * source.shard_rows
    stop = start + source.shard_rows
    present = np.flatnonzero(source.present[start:stop])
    names = ((source.digest[start + i].tobytes(), int(i)) for i in present)
    live = {name: i for name, i in names if name in wanted and name not in placed}
    return live if len(live) >= (1 - MAX_DEAD) * len(present) else {}


def _tables(shards: dict[int, UInt8], shard_rows: int) -> tuple[UInt8, npt.NDArray[np.bool_]]:
    """Digests (slots, 32) of all shards, zeros in the gaps, and (slots,) what is no gap."""
    last = max(shards, default=0)
    slots = last * shard_rows + len(shards.get(last, (None,)))
    digest, filled = np.zeros((slots, 32), np.uint8), np.zeros(slots, bool)
    for number, rows in shards.items():
        digest[number * shard_rows : number * shard_rows + len(rows)] = rows
        filled[number * shard_rows : number * shard_rows + len(rows)] = True
    return digest, filled
