"""Bytes of rows at known places in mapped files: the part that both formats share when reading.

A row is found by arithmetic and copied straight from the page cache into the caller's buffer (`cache.reading.copying`).
Maps are kept in a bounded least-recently-used table, because each holds a file descriptor. Whoever touches a map first
asks whether the file still has its pages: behind the end of a truncated file a touch kills the process.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cache.description import TapSpec
from cache.errors import FormatError, StoreError, UntrustedStoreError
from cache.formats.zarr_layout import CHECKSUM_BYTES, shard_bytes, shard_name, stored_places

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

_MOST_HOLLOW = 256
_HOLLOW_BYTES = 64 << 20
"""A file may claim so many times the room that it takes on disk, and so many bytes besides: file systems compress."""
_MOST_PIECES = 10_000

MAX_MAPS = 256
"""Open maps of one store; each costs a file descriptor, of which a process often has 1024."""


class MappedFile:
    """A whole file as read-only memory.

    Attributes:
        data: (bytes,) uint8.
        address: Where its first byte lies in the memory of this process.
        end: The address behind its last byte.
        last_byte: The last byte alone.
    """

    def __init__(self, path: Path, size: int | None = None, *, hollow: bool = False) -> None:
        """Map the file.

        Args:
            path: A plain file; a symbolic link in its place is refused.
            size: Bytes that it must have, if known.
            hollow: Whether it may have holes.

        Raises:
            UntrustedStoreError: It is a link, no plain file, or hollow.
            FormatError: It has another size.
            FileNotFoundError: It is not there.
        """
        handle = open_plain(path, hollow=hollow)
        try:
            found = os.fstat(handle).st_size
            if size is not None and found != size:
                message = f"{path} has {found} bytes; expected {size}: it is truncated or was replaced"
                raise FormatError(message)
            if found == 0:
                message = f"{path} is empty"
                raise FormatError(message)
            self._map = mmap.mmap(handle, found, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)
        self.path = path
        self.data: UInt8 = np.frombuffer(self._map, np.uint8)
        self.address = self.data.ctypes.data
        self.end = self.address + found
        self.last_byte = memoryview(self._map)[-1:]

    def last(self, text: bytes) -> int:
        """Where `text` begins for the last time, -1 if it does not occur."""
        return self._map.rfind(text)

    def intact(self) -> bool:
        """Whether the file still has all of its bytes."""
        return self._map.size() >= len(self._map)


def open_plain(path: Path, *, hollow: bool = False) -> int:
    """Descriptor of a plain file, never of what a link points at.

    Args:
        path: The file.
        hollow: Whether it may have holes.

    Raises:
        UntrustedStoreError: `path` is a symbolic link, a folder or a device, or claims far more bytes than it takes on
            disk: to read a hole of 10 TB takes time or memory without end.
        FileNotFoundError: It is not there.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no plain file"
        message = f"{path} is {what}; a store holds only files"
        raise UntrustedStoreError(message)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    if not hollow and _nearly_empty(handle, found):
        os.close(handle)
        message = f"{path} claims {found.st_size} bytes and is nearly all holes; no store is: fetch it again"
        raise UntrustedStoreError(message)
    return handle


def _nearly_empty(handle: int, found: os.stat_result) -> bool:
    """Whether a file claims far more than it has; its blocks are counted late or not at all on some file systems."""
    enough = (found.st_size - _HOLLOW_BYTES) / _MOST_HOLLOW
    if found.st_blocks * 512 >= enough:
        return False
    data = end = 0
    for _ in range(_MOST_PIECES):
        try:
            start = os.lseek(handle, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole from here on
            break
        end = os.lseek(handle, start, os.SEEK_HOLE)
        data += end - start
        if data >= enough or end >= found.st_size:
            break
    os.lseek(handle, 0, os.SEEK_SET)
    return data < enough


def read_plain(path: Path, limit: int) -> bytes:
    """Content of a plain file of at most `limit` bytes.

    Raises:
        UntrustedStoreError: It is a link, no plain file, or larger.
        FileNotFoundError: It is not there.
    """
    handle = open_plain(path)
    with open(handle, "rb") as file:  # noqa: PTH123 - a descriptor has no path
        size = os.fstat(handle).st_size
        if size > limit:
            message = f"{path} has {size} bytes; a store keeps at most {limit} there"
            raise UntrustedStoreError(message)
        return file.read(limit)


def read_range(path: Path, start: int, size: int) -> UInt8:
    """Bytes of a plain file as memory of our own, (size,) uint8; maps would count against the process as well.

    Raises:
        FormatError: The file ends earlier.
    """
    with open(open_plain(path), "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < start + size:
            message = f"{path} ends before byte {start + size}; it is damaged or truncated"
            raise FormatError(message)
        data = np.empty(size, np.uint8)
        file.seek(start)
        read = 0
        while read < size and (more := file.readinto(data[read:].data)):
            read += more
    return data


@dataclass(frozen=True)
class Places:
    """Where rows lie.

    Attributes:
        files: (n,) int64 number of the file of each row.
        offsets: (n,) int64 first byte of each row in its file.
    """

    files: Int64
    offsets: Int64


class RowFiles(Protocol):
    """Row bytes of one store, in whichever format."""

    def fetch(self, taps: Sequence[str], slots: Int64) -> None:
        """Bring the rows of these slots to this machine, if they are elsewhere."""

    def forget(self, tap: str, slots: Int64) -> None:
        """Drop copies of these rows that turned out to be damaged, if there is an original to fetch again."""

    def places(self, tap: str, slots: Int64) -> Places:
        """Where the rows of these slots lie."""

    def file(self, tap: str, number: int) -> MappedFile:
        """A file of rows, mapped."""


class ShardFiles:
    """The shard files of one Zarr folder: their names, sizes and maps."""

    def __init__(
        self, folder: Path, taps: Mapping[str, TapSpec], shard_rows: int, present: npt.NDArray[np.bool_]
    ) -> None:
        """Describe the folder.

        Args:
            folder: Root of the Zarr group.
            taps: Its arrays.
            shard_rows: Slots in a shard.
            present: (slots,) which slots hold a row.
        """
        self._folder = folder
        self._taps = taps
        self._shard_rows = shard_rows
        self._stored = stored_places(present, shard_rows)
        self._inode = folder_inode(folder)

    def path(self, tap: str, number: int) -> Path:
        """A shard file."""
        return self._folder / tap / shard_name(number)

    def size(self, tap: str, number: int) -> int:
        """Bytes that a shard file must have, 0 if there must be none."""
        stored = int(self._stored[number])
        return shard_bytes(stored, self._taps[tap].row_bytes, self._shard_rows) if stored else 0

    def open(self, tap: str, number: int) -> MappedFile:
        """A shard file, mapped.

        Raises:
            StoreError: The folder was swapped for another version, whose shards are none of ours.
        """
        try:
            return MappedFile(self.path(tap, number), self.size(tap, number))
        finally:
            if folder_inode(self._folder) != self._inode:
                message = f"{self._folder} was replaced by another version since it was opened; open it again"
                raise StoreError(message)


def folder_inode(folder: Path) -> tuple[int, int] | None:
    """What tells a folder or a file from another one of the same name."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class Watch:
    """Tells whether a path still names what it named, untouched, when the watch began."""

    def __init__(self, path: Path) -> None:
        """Begin to watch."""
        self._path = path
        self._seen = self._look()

    def replaced(self) -> bool:
        """Whether another file or folder has taken its place, or it was changed itself."""
        return self._look() != self._seen

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_ctime_ns  # an inode's number may be used again


class ZarrRows:
    """Rows in the shard files of a Zarr folder."""

    def __init__(
        self, folder: Path, taps: Mapping[str, TapSpec], shard_rows: int, present: npt.NDArray[np.bool_]
    ) -> None:
        """Describe the folder; see `ShardFiles`."""
        self._taps = taps
        self._shard_rows = shard_rows
        self.shards = ShardFiles(folder, taps, shard_rows, present)
        self.file = lru_cache(MAX_MAPS)(partial(_open_shard, self.shards, weakref.proxy(self)))

    def fetch(self, taps: Sequence[str], slots: Int64) -> None:
        """Nothing to do: the rows are here."""

    def forget(self, tap: str, slots: Int64) -> None:
        """Nothing to do: the rows are no copies."""

    def places(self, tap: str, slots: Int64) -> Places:
        """Where the rows of these slots lie."""
        files, within = np.divmod(slots, self._shard_rows)
        return Places(files, within * (self._taps[tap].row_bytes + CHECKSUM_BYTES))


def _open_shard(shards: ShardFiles, rows: ZarrRows, tap: str, number: int) -> MappedFile:
    """A shard file, mapped; `rows` lets go of the others if the process has no descriptor left.

    Raises:
        FileNotFoundError: It is not there.
        FormatError: It has another size.
        StoreError: The folder was swapped for another version, or there are too many open files still.
    """
    try:
        return shards.open(tap, number)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    rows.file.cache_clear()
    try:
        return shards.open(tap, number)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        path = shards.path(tap, number)
        message = f"{path}: too many open files; close other stores, or raise the limit with `ulimit -n`"
        raise StoreError(message) from error


class Hdf5Rows:
    """Rows in one HDF5 file, each tap's one behind the other."""

    def __init__(self, file: MappedFile, taps: Mapping[str, TapSpec], offsets: Mapping[str, int]) -> None:
        """Describe the file.

        Args:
            file: The mapped file.
            taps: Its data sets.
            offsets: First byte of each tap's rows.
        """
        self._file = file
        self._taps = taps
        self._offsets = offsets

    def fetch(self, taps: Sequence[str], slots: Int64) -> None:
        """Nothing to do: the rows are here."""

    def forget(self, tap: str, slots: Int64) -> None:
        """Nothing to do: the rows are no copies."""

    def places(self, tap: str, slots: Int64) -> Places:
        """Where the rows of these slots lie."""
        stride = self._taps[tap].row_bytes + CHECKSUM_BYTES
        return Places(np.zeros_like(slots), self._offsets[tap] + slots * stride)

    def file(self, tap: str, number: int) -> MappedFile:
        """The file."""
        return self._file


def row_bytes(rows: RowFiles, tap: TapSpec, name: str, slot: int) -> UInt8:
    """The raw bytes of one row as they lie in the map, unchecked, (row_bytes,) uint8."""
    places = rows.places(name, np.array([slot], np.int64))
    file = rows.file(name, int(places.files[0]))
    if not file.intact():
        message = f"{file.path} was truncated while it was open"
        raise FormatError(message)
    return file.data[int(places.offsets[0]) :][: tap.row_bytes]
