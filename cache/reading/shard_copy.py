"""Rows of a remote store that are here already: a sparse file a shard, which several processes fill and anyone deletes.

Which rows a file has is written behind them in the same file, so no file is taken for another.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from cache.errors import StoreError
from cache.formats.mapped import MappedFile

PASSING = {errno.ENOENT, errno.EMFILE}
"""What another try may mend: a file is gone, and is made anew; descriptors are used up, and maps are let go of."""
_READ_WRITE = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class ShardCopy:
    """Sparse copy of one shard on this machine: its rows, and behind them a byte for each row that is here.

    The marks are kept in memory beside the map. So they tell of the file that is mapped, whatever lies under its name
    by now, and are read again from the file, where other processes leave theirs, only when rows are missing.

    Attributes:
        file: The mapped file.
        have: (places,) bool: which rows are here.
    """

    def __init__(self, path: Path, places: int, stride: int) -> None:
        """Map the copy; it is made if it is not there.

        Raises:
            FileNotFoundError: It was deleted meanwhile.
            StoreError: The disk is full, or the folder cannot be written.
        """
        self._path = path
        self._stride = stride
        self._marks = places * stride
        with disk_errors(path.parent):
            _make_sparse(path, self._marks + places)
            handle = os.open(path, _READ_WRITE)
            try:
                self.file = MappedFile(path, self._marks + places, hollow=True)
                self._identity = os.fstat(handle)
                if not os.path.samestat(self._identity, path.lstat()):
                    raise gone(path)
                self.have = np.zeros(places, np.bool_)
                self.reload(handle)
            finally:
                os.close(handle)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Descriptor to write into the mapped file.

        Raises:
            FileNotFoundError: It was deleted or cut short.
            StoreError: It cannot be written.
        """
        with disk_errors(self._path.parent):
            handle = os.open(self._path, _READ_WRITE)
        try:
            if not os.path.samestat(os.fstat(handle), self._identity) or not self.file.intact():
                raise gone(self._path)
            yield handle
        finally:
            os.close(handle)

    def reload(self, handle: int) -> None:
        """Take over what other processes have fetched."""
        with disk_errors(self._path.parent):
            marks = np.frombuffer(os.pread(handle, len(self.have), self._marks), np.uint8)
        self.have[: len(marks)] = marks == 1

    def put(self, handle: int, first: int, data: bytes) -> None:
        """Keep whole rows from place `first` on, and mark them once they are written."""
        count = len(data) // self._stride
        with disk_errors(self._path.parent):
            _write(handle, data, first * self._stride)
            _write(handle, b"\1" * count, self._marks + first)
        self.have[first : first + count] = True

    def drop(self, places: Sequence[int]) -> None:
        """Forget rows."""
        self.have[places] = False
        with suppress(FileNotFoundError), self.opened() as handle, disk_errors(self._path.parent):
            for place in places:
                _write(handle, b"\0", self._marks + place)


def gone(path: Path) -> FileNotFoundError:
    """The error of a file that has no name any more."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _make_sparse(path: Path, size: int) -> None:
    """Make sure that a file of that size lies there; it appears in one step, and the first of several stays."""
    try:
        if path.lstat().st_size == size:
            return
        path.unlink()
    except FileNotFoundError:
        pass
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    scratch = Path(name)
    try:
        os.ftruncate(handle, size)
        try:
            path.hardlink_to(scratch)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            scratch.replace(path)
    finally:
        os.close(handle)
        scratch.unlink(missing_ok=True)


def _write(handle: int, data: bytes, position: int) -> None:
    """Write all of `data`, not through a map: a full disk is then an error and does not kill the process."""
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, position)
        view, position = view[done:], position + done


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failure of the folder of kept rows into a `StoreError`, all but what another try may mend."""
    try:
        yield
    except OSError as error:
        if error.errno in PASSING:
            raise
        message = (
            f"{folder}: {(error.strerror or str(error)).lower()}; rows of remote stores are kept there: make space, or "
            f"set $FEATURE_STORE_CACHE to another folder"
        )
        raise StoreError(message) from error
