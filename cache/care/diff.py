"""Two stores side by side: which fields and rows differ, and by how much."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import TapSpec
from cache.errors import Difference
from cache.progress import Progress, silent
from cache.reading.reader import Store, open_store

_AT_ONCE_BYTES = 64 << 20


@dataclass(frozen=True)
class TapDifference:
    """How far the features of one tap are apart, over the rows that both stores have.

    Attributes:
        tap: Name.
        rows: Rows compared.
        differing: Ids of the rows whose bytes differ.
        max_abs: Largest difference of two numbers; not a number where only one side is one.
        relative: Norm of the difference over the norm of the first store's features.
    """

    tap: str
    rows: int
    differing: tuple[str, ...]
    max_abs: float
    relative: float


@dataclass(frozen=True)
class StoreDifference:
    """What distinguishes two stores.

    Attributes:
        fingerprint: Fields that differ.
        only_first: Ids that only the first store has.
        only_second: Ids that only the second store has.
        other_pixels: Ids whose source pixels differ.
        taps: Features, for taps of the same shape in both, and of types that are read as the same.
        other_taps: Taps that are missing on one side, or differ in shape or in the type of their numbers.
        same_order: Whether the ids are the same in the same order.
    """

    fingerprint: tuple[Difference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_pixels: tuple[str, ...]
    taps: tuple[TapDifference, ...]
    other_taps: tuple[str, ...]
    same_order: bool

    @property
    def equal(self) -> bool:
        """Whether there is no difference at all."""
        found = (self.fingerprint, self.only_first, self.only_second, self.other_pixels, self.other_taps)
        return self.same_order and not any(found) and not any(tap.differing for tap in self.taps)


def diff_stores(
    first: str | os.PathLike[str], second: str | os.PathLike[str], progress: Progress = silent
) -> StoreDifference:
    """Compare two stores row by row, matched by id, in bounded memory.

    Args:
        first: A store.
        second: Another one, of either format.
        progress: Called after each batch.
    """
    one, other = open_store(first), open_store(second)
    places = {name: row for row, name in enumerate(other.ids)}
    ours = np.array([row for row, name in enumerate(one.ids) if name in places], np.int64)
    theirs = np.array([places[one.ids[row]] for row in ours], np.int64)
    known = set(one.ids)
    shared = [tap for tap, spec in one.taps.items() if tap in other.taps and _comparable(spec, other.taps[tap])]
    return StoreDifference(
        fingerprint=one.fingerprint.differences(other.fingerprint),
        only_first=tuple(name for name in one.ids if name not in places),
        only_second=tuple(name for name in other.ids if name not in known),
        other_pixels=_other_pixels(one, other, ours, theirs),
        taps=tuple(_compare(one, other, tap, ours, theirs, progress) for tap in shared),
        other_taps=tuple(sorted((one.taps.keys() | other.taps.keys()) - set(shared))),
        same_order=one.ids == other.ids,
    )


def _comparable(one: TapSpec, other: TapSpec) -> bool:
    """Whether numbers can be compared: those of int8 are float16."""
    return one.shape == other.shape and one.numbers == other.numbers


def _other_pixels(one: Store, other: Store, ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> tuple[str, ...]:
    """Ids whose digests differ; none if a store does not tell them."""
    first, second = one.digests, other.digests
    if not len(first) or not len(second):
        return ()
    differ = (first[ours] != second[theirs]).any(1)
    return tuple(one.ids[row] for row in ours[differ])


def _compare(
    one: Store, other: Store, tap: str, ours: npt.NDArray[Any], theirs: npt.NDArray[Any], progress: Progress
) -> TapDifference:
    """Differences of one tap."""
    differing: list[str] = []
    largest = squared = reference = 0.0
    step = max(1, _AT_ONCE_BYTES // one.taps[tap].row_bytes)
    for start in range(0, len(ours), step):
        rows = ours[start : start + step]
        first = one.read(rows, [tap])[tap]
        second = other.read(theirs[start : start + step], [tap])[tap]
        for row in _differing(first, second):
            gap = first[row].astype(np.float64) - second[row].astype(np.float64)
            differing.append(one.ids[rows[row]])
            largest = float(np.maximum(largest, np.abs(gap).max()))
            squared += float((gap**2).sum())
        reference += float((first.astype(np.float64) ** 2).sum())
        progress("compare", min(start + step, len(ours)), len(ours), tap=tap)
    relative = (squared / reference) ** 0.5 if reference else float(squared > 0)
    return TapDifference(tap, len(ours), tuple(differing), largest, relative)


def _differing(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> Iterator[int]:
    """Rows whose bytes are not the same."""
    for row, (left, right) in enumerate(zip(first, second, strict=True)):
        if left.tobytes() != right.tobytes():
            yield row
