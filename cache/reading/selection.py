"""Which rows `store[...]` means: numbers as Python counts, slices, masks, and the ids of samples."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.errors import NoSuchRowError

Int64 = npt.NDArray[np.int64]


def is_one(key: object) -> bool:
    """Whether a key names one row, whose features then have no axis for rows."""
    return isinstance(key, str | int | np.integer) and not isinstance(key, bool)


def select_rows(key: object, count: int, rows_by_id: Callable[[], Mapping[str, int]]) -> Int64:
    """Find the rows that a key means.

    Args:
        key: A row number, where negative ones count from the end; an id; a slice of row numbers; a mask of a bool for
            each row; or a sequence of row numbers or of ids, in any order, repeats allowed.
        count: Rows of the store.
        rows_by_id: Gives row by id; called only where the key is made of ids.

    Returns:
        (n,) row numbers from 0.

    Raises:
        NoSuchRowError: There is no such row or id, or the key is nothing of these.
    """
    if isinstance(key, slice):
        return np.arange(count, dtype=np.int64)[key]
    wanted = np.asarray([key] if is_one(key) else key)
    if wanted.ndim == 1 and not wanted.size and wanted.dtype.kind != "b":
        return np.empty(0, np.int64)
    if wanted.ndim == 1 and wanted.dtype.kind in "iu":
        return _numbered(wanted, count)
    if wanted.ndim == 1 and wanted.dtype.kind == "b" and len(wanted) == count:
        return np.flatnonzero(wanted)
    if wanted.ndim == 1 and wanted.dtype.kind in "UOT" and all(isinstance(item, str) for item in wanted.tolist()):
        row_of = rows_by_id()
        return np.array([_row(name, row_of) for name in wanted.tolist()], np.int64)
    message = (
        f"a store is indexed by row numbers, a slice, {count} booleans, or ids, and not by {_kind(key, wanted)}; "
        f"use one of these"
    )
    raise NoSuchRowError(message)


def _numbered(wanted: npt.NDArray[np.integer[Any]], count: int) -> Int64:
    outside = wanted[(wanted < -count) | (wanted >= count)]
    if outside.size:
        message = f"there is no row {outside[0]}; the store has rows 0 to {count - 1}, and -{count} to -1 from its end"
        raise NoSuchRowError(message)
    return wanted.astype(np.int64) % count


def _row(name: str, row_of: Mapping[str, int]) -> int:
    if name not in row_of:
        near = difflib.get_close_matches(name, row_of, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`store.ids` lists those that there are"
        message = f"there is no sample {name!r} in the store; {hint}"
        raise NoSuchRowError(message)
    return row_of[name]


def _kind(key: object, wanted: npt.NDArray[Any]) -> str:
    if wanted.dtype.kind == "b" and wanted.ndim == 1:
        return f"{len(wanted)} booleans"
    if wanted.dtype.kind == "O" or wanted.ndim == 0:
        return f"{type(key).__name__} {key!r:.60}"
    return f"{wanted.dtype} of shape {wanted.shape}"
