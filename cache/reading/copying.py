"""Copying rows out of mapped files, in whichever order they are asked for, and checking each copy.

Long rows are copied one by one, in the order in which they lie. Of rows so short that a step for each costs more than
its bytes, all that are wanted are gathered in one step: the processor then waits for many places of memory at once and
not for one after the other, so that a batch out of a million rows costs hardly more than one out of a thousand. Such
rows lie in several files, and the one array that reaches into all of them is the memory of this process: at index i it
has the row that begins at the address `_LOWEST` + i.

A mapped page behind the end of a file that was cut short kills the process that touches it. So the sizes of the files
are looked at right before they are copied from; before a gathering, the kernel is asked to read the last byte of each
file, all in one call, and answers with an error instead. What is cut off between that look and the copy, some
microseconds later, still kills.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Collection
from functools import cache

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache.errors import FormatError
from cache.formats.mapped import MAX_MAPS, Int64, MappedFile, Places, RowFiles, UInt8

UInt32 = npt.NDArray[np.uint32]

SHORT_BYTES = 8 << 10
"""Rows of at most this size are gathered; longer ones are copied as fast one by one, and straight to their place."""
_GATHERED_BYTES = 1 << 18
"""Gathered rows are copied twice: so many bytes at a time, which the processor's cache holds."""

_ROWS_AT_ONCE = 1 << 14
"""Rows are gathered so many at a time: what is kept of each meanwhile takes a hundred bytes."""

_LOWEST = 1 << 12
"""Nothing is mapped below this address; numpy takes a buffer at address 0 for one that is missing."""
_HIGHEST = 1 << 48
"""Nothing of a process is mapped above this address unless it asks for it."""


def copy_rows(
    rows: RowFiles, tap: str, size: int, slots: Int64, target: UInt8, expected: UInt32 | None = None
) -> set[int]:
    """Copy the rows of one tap.

    Args:
        rows: The files.
        tap: Name of the tap.
        size: Bytes of a row.
        slots: (n,) where the rows lie, in any order.
        target: (n, size) uint8, contiguous; filled.
        expected: (n,) crc32c that each copy must have; not checked if not given.

    Returns:
        Which of the n are damaged: their bytes are missing or have another checksum.
    """
    if size > SHORT_BYTES:
        return _one_by_one(rows, tap, slots, target, expected)
    damaged: set[int] = set()
    for first in range(0, len(slots), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        wanted = None if expected is None else expected[part]
        if not _gather(rows, tap, rows.places(tap, slots[part]), target[part], wanted):
            damaged |= {first + i for i in _one_by_one(rows, tap, slots[part], target[part], wanted)}
    return damaged


def _one_by_one(rows: RowFiles, tap: str, slots: Int64, target: UInt8, expected: UInt32 | None) -> set[int]:
    """Copy row by row in the order in which they lie; returns which are damaged."""
    size = target.shape[1]
    order = np.argsort(slots, kind="stable")
    places = rows.places(tap, slots[order])
    checksums = expected[order].tolist() if expected is not None else None
    damaged: set[int] = set()
    number, data = -1, np.empty(0, np.uint8)
    steps = zip(order.tolist(), places.files.tolist(), places.offsets.tolist(), strict=True)
    for step, (position, file, offset) in enumerate(steps):
        if file != number:
            number, data = file, _whole(rows, tap, file)
        if not 0 <= offset <= data.size - size:
            damaged.add(position)
            continue
        row = target[position]
        row[:] = data[offset : offset + size]
        if checksums is not None and crc32c(row) != checksums[step]:
            damaged.add(position)
    return damaged


def _whole(rows: RowFiles, tap: str, number: int) -> UInt8:
    """A mapped file's bytes, none if it is missing or not whole."""
    try:
        file = rows.file(tap, number)
    except (FileNotFoundError, FormatError):
        return np.empty(0, np.uint8)
    return file.data if file.intact() else np.empty(0, np.uint8)


def _gather(rows: RowFiles, tap: str, places: Places, target: UInt8, expected: UInt32 | None) -> bool:
    """Copy all rows at once; false if anything is amiss, and what it is shows row by row."""
    size = target.shape[1]
    numbers = places.files.tolist()
    different = set(numbers)
    if len(different) > MAX_MAPS:
        return False
    try:
        files = {number: rows.file(tap, number) for number in different}
    except (FileNotFoundError, FormatError):
        return False
    starts = places.offsets + [files[number].address for number in numbers]
    if places.offsets.min() < 0 or (starts + size > [files[number].end for number in numbers]).any():
        return False
    source, gathered = _rows_in_memory(size), target.view(f"V{size}")[:, 0]
    starts -= _LOWEST
    step = _GATHERED_BYTES // size
    for first in range(0, len(starts), step):
        if not (_reachable(files.values()) if expected is not None else all(file.intact() for file in files.values())):
            return False
        gathered[first : first + step] = source[starts[first : first + step]]
    return expected is None or list(map(crc32c, target)) == expected.tolist()


@cache
def _rows_in_memory(size: int) -> npt.NDArray[np.void]:
    """The memory of this process as rows of `size` bytes, of which one begins at every address from `_LOWEST`."""
    memory = memoryview((ctypes.c_char * (_HIGHEST - _LOWEST)).from_address(_LOWEST)).toreadonly()
    return np.ndarray(len(memory) - size + 1, f"V{size}", memory, strides=1)


def _reachable(files: Collection[MappedFile]) -> bool:
    """Whether the last page of every file can still be touched, all asked in one call.

    What is left of a page behind a new end reads as zeros, so this is enough only where rows are compared with their
    checksums.
    """
    if not hasattr(os, "pwritev"):
        return False
    try:
        handle, identity = _sink()
        found = os.fstat(handle)
        if (found.st_dev, found.st_ino) != identity:
            return False
        return os.pwritev(handle, [file.last_byte for file in files], 0) == len(files)
    except OSError:
        return False


@cache
def _sink() -> tuple[int, tuple[int, int]]:
    """A file without a name into which bytes are read for nothing, and what tells it from any other.

    A program that goes into the background closes all descriptors that it finds, and this one's number may then stand
    for a file of somebody else.
    """
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("feature-store")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    found = os.fstat(handle)
    return handle, (found.st_dev, found.st_ino)
