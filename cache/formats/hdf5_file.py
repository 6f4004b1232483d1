"""Reading a store that is one HDF5 file: through a map, without the library.

In front of HDF5's own bytes, in its user block, lies a header of ours: the description, the place of every array, and
digests of what is no row. With it a row's place is a product, a flipped bit in HDF5's structure is found, and a hostile
file never meets the library's parser.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.description import KEY, Description, load_json, parse_description
from cache.errors import FormatError, StoreNotFoundError, UntrustedStoreError
from cache.fingerprint import canonical
from cache.formats.mapped import Hdf5Rows, MappedFile, folder_inode, open_plain, read_range
from cache.formats.zarr_folder import OpenedStore
from cache.formats.zarr_layout import CHECKSUM_BYTES
from cache.index import Index, UInt8

_MAGIC = b"feature-store hdf5 "
_FIRST_LINE_BYTES = len(_MAGIC) + 9
_MAX_HEADER_BYTES = 1 << 20
_HASHED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Header:
    """What the user block says.

    Attributes:
        description: The store's description.
        file_bytes: Size of the whole file.
        offsets: First byte of each tap's rows and of each index array (`"index/NAME"`).
        structure_sha256: Digest of everything behind the user block that is no row or its fletcher32.
        trailers_sha256: By tap, digest of the fletcher32 checksums behind its rows.
    """

    description: Description
    file_bytes: int
    offsets: Mapping[str, int]
    structure_sha256: str
    trailers_sha256: Mapping[str, str]

    def to_bytes(self, size: int) -> bytes:
        """The user block of `size` bytes: a line with its length, canonical JSON, spaces, newline."""
        body = {
            KEY: self.description.to_json(),
            "file_bytes": self.file_bytes,
            "offsets": self.offsets,
            "structure_sha256": self.structure_sha256,
            "trailers_sha256": self.trailers_sha256,
        }
        text = canonical({**body, "checksum": hashlib.sha256(canonical(body)).hexdigest()})
        if len(text) + _FIRST_LINE_BYTES >= size:
            message = f"a header of {len(text)} bytes does not fit into a user block of {size}"
            raise FormatError(message)
        first = _MAGIC + b"%08d\n" % size
        return first + text + b" " * (size - len(first) - len(text) - 1) + b"\n"

    def row_regions(self) -> list[tuple[int, int]]:
        """Byte ranges [start, stop) of each tap's rows, in file order."""
        slots = self.description.slots
        return sorted(
            (self.offsets[name], self.offsets[name] + slots * (tap.row_bytes + CHECKSUM_BYTES))
            for name, tap in self.description.taps.items()
        )


def read_header(path: Path, whole: bool = True) -> tuple[Header, int]:
    """The header of a packed store and the size of its user block.

    Args:
        path: The file.
        whole: Insist that the file has the size that the header tells; repair does not.

    Raises:
        StoreNotFoundError: There is no such file.
        FormatError: It is no store or its header is damaged.
        UntrustedStoreError: Its header points outside of the file or at overlapping places.
    """
    try:
        handle = open_plain(path)
    except FileNotFoundError as error:
        message = f"{path} does not exist; check the path, or run extract to make it"
        raise StoreNotFoundError(message) from error
    with open(handle, "rb") as file:  # noqa: PTH123 - a descriptor has no path
        first = file.read(_FIRST_LINE_BYTES)
        size = user_block_size(first, str(path))
        block = first + file.read(size - _FIRST_LINE_BYTES)
        file_bytes = os.fstat(handle).st_size
    header = parse_block(block, str(path))
    if whole and header.file_bytes != file_bytes:
        message = f"{path} has {file_bytes} bytes; expected {header.file_bytes}: it is truncated or was appended to"
        raise FormatError(message)
    return header, size


def user_block_size(first: bytes, where: str) -> int:
    """Size of the user block, from the first bytes of a file.

    Raises:
        FormatError: They are no store's; `where` names the file.
    """
    digits = first[len(_MAGIC) : _FIRST_LINE_BYTES - 1]
    if not (first.startswith(_MAGIC) and digits.isdigit() and first[_FIRST_LINE_BYTES - 1 :][:1] == b"\n"):
        message = f"{where} is not a feature store: it does not begin with {_MAGIC.decode()!r} and a length"
        raise FormatError(message)
    size = int(digits)
    if not 512 <= size <= _MAX_HEADER_BYTES:
        message = f"{where} claims a header of {size} bytes; expected 512 to {_MAX_HEADER_BYTES}"
        raise FormatError(message)
    return size


def parse_block(block: bytes, where: str) -> Header:
    """Header in the bytes of a whole user block.

    Raises:
        FormatError: It is damaged.
        UntrustedStoreError: It points outside of the file or at overlapping places.
    """
    header = _parse_header(load_json(block[_FIRST_LINE_BYTES:], f"the header of {where}"), where)
    if header.to_bytes(len(block)) != block:
        message = f"{where}: the header is damaged (it does not match its checksum); fetch or extract the store again"
        raise FormatError(message)
    _check_places(header, len(block), where)
    return header


def _parse_header(value: Any, where: str) -> Header:
    try:
        description = parse_description(value[KEY], f"the header of {where}")
        names = {*description.taps, *(f"index/{name}" for name in description.index)}
        offsets, trailers = value["offsets"], value["trailers_sha256"]
        if offsets.keys() != names or any(type(offset) is not int or offset < 0 for offset in offsets.values()):
            message = "an array has no place, or one that is no whole number"
            raise ValueError(message)
        if trailers.keys() != description.taps.keys() or type(value["file_bytes"]) is not int:
            message = "sizes or digests are missing"
            raise ValueError(message)
        return Header(description, value["file_bytes"], offsets, str(value["structure_sha256"]), trailers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"the header of {where} is not that of a store ({error}); the file is damaged or no feature store"
        raise FormatError(message) from error


def _check_places(header: Header, block: int, where: str) -> None:
    """Refuse arrays that overlap or reach out of the file."""
    entries = header.description.index.items()
    places = header.row_regions() + [
        (header.offsets[f"index/{name}"], header.offsets[f"index/{name}"] + entry.size_bytes) for name, entry in entries
    ]
    position = block
    for start, stop in sorted(places):
        if start < position:
            message = f"{where}: arrays overlap at byte {start}; the header is not trustworthy"
            raise UntrustedStoreError(message)
        position = stop
    if position > header.file_bytes:
        message = f"{where}: an array ends at byte {position} of a file of {header.file_bytes}"
        raise UntrustedStoreError(message)


def open_hdf5(path: Path) -> OpenedStore:
    """Open a packed store for reading.

    Raises:
        StoreNotFoundError: There is no such file.
        FormatError: It is no store, or anything in it but its rows is damaged.
        UntrustedStoreError: Its header asks for what no store holds.
    """
    before = folder_inode(path)
    header, block = read_header(path)
    mapped = MappedFile(path, header.file_bytes)
    if structure_sha256(path, header, block) != header.structure_sha256:
        message = (
            f"{path}: the HDF5 structure is not the one that was written; the file is damaged, or a program has "
            f"changed it (links and external storage are never followed): fetch or extract it again"
        )
        raise FormatError(message)
    description = header.description

    def load(name: str) -> UInt8:
        return read_range(path, header.offsets[f"index/{name}"], description.index[name].size_bytes)

    index = Index(description, load, str(path), lambda: folder_inode(path) != before)
    if not index.present.all():
        message = f"{path}: a slot holds nothing; a packed store has no empty slots"
        raise UntrustedStoreError(message)
    return OpenedStore(description, index, Hdf5Rows(mapped, description.taps, header.offsets))


def structure_sha256(path: Path, header: Header, block: int) -> str:
    """Hexadecimal SHA-256 of everything behind the user block but the regions of rows."""
    digest = hashlib.sha256()
    position = block
    for start, stop in [*header.row_regions(), (header.file_bytes, header.file_bytes)]:
        for first in range(position, start, _HASHED_AT_ONCE):
            digest.update(read_range(path, first, min(_HASHED_AT_ONCE, start - first)).data)
        position = stop
    return digest.hexdigest()


def trailers_sha256(data: UInt8, start: int, slots: int, row_bytes: int) -> str:
    """Hexadecimal SHA-256 of the fletcher32 checksums behind the rows of one tap."""
    stride = row_bytes + CHECKSUM_BYTES
    rows = data[start : start + slots * stride].reshape(slots, stride)
    return hashlib.sha256(np.ascontiguousarray(rows[:, row_bytes:]).data).hexdigest()
