"""A store as one HDF5 file: packed in one session, read through a map without the library.

The library (h5py) writes an ordinary file: chunked by row with `fletcher32`, no newer feature than HDF5 1.8 reads. In
front of it, in HDF5's user block, lies a header of ours: the description, the place of every array, and digests of
what is no row. With it a row's place is a product, a flipped bit in HDF5's own structure is found, and a hostile file
never meets the library's parser when it is opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from cache.description import (
    KEY,
    MAX_DESCRIPTION_BYTES,
    Description,
    TapSpec,
    load_json,
    parse_description,
)
from cache.durable import require_space, space_errors, sync_folder
from cache.errors import DamagedRowError, FormatError, StoreError, StoreNotFoundError, UntrustedStoreError
from cache.fingerprint import canonical
from cache.index import Index, UInt8, describe_entry
from cache.mapped import Hdf5Rows, MappedFile, open_plain, read_range, row_bytes
from cache.progress import Progress, silent
from cache.zarr_folder import OpenedStore
from cache.zarr_layout import CHECKSUM_BYTES

_MAGIC = b"feature-store hdf5 "
_FIRST_LINE_BYTES = len(_MAGIC) + 9
_MAX_HEADER_BYTES = 1 << 20
_HASHED_AT_ONCE = 1 << 22
_TREE_BYTES_PER_ROW = 128
"""Upper bound of what HDF5's chunk tree needs for a row (measured: 87); reserved in front of the rows."""


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


def read_header(path: Path) -> tuple[Header, int]:
    """The header of a packed store and the size of its user block.

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
        digits = first[len(_MAGIC) : -1]
        if not (first.startswith(_MAGIC) and digits.isdigit() and first.endswith(b"\n")):
            message = f"{path} is not a feature store: it does not begin with {_MAGIC.decode()!r} and a length"
            raise FormatError(message)
        size = int(digits)
        if not 512 <= size <= _MAX_HEADER_BYTES:
            message = f"{path} claims a header of {size} bytes; expected 512 to {_MAX_HEADER_BYTES}"
            raise FormatError(message)
        block = first + file.read(size - _FIRST_LINE_BYTES)
        file_bytes = os.fstat(handle).st_size
    value = load_json(block[_FIRST_LINE_BYTES:], f"the header of {path}")
    header = _parse_header(value, str(path))
    if header.to_bytes(size) != block:
        message = f"{path}: the header is damaged (it does not match its checksum); fetch or extract the store again"
        raise FormatError(message)
    if header.file_bytes != file_bytes:
        message = f"{path} has {file_bytes} bytes; expected {header.file_bytes}: it is truncated or was appended to"
        raise FormatError(message)
    _check_places(header, size, path)
    return header, size


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


def _check_places(header: Header, block: int, path: Path) -> None:
    """Refuse arrays that overlap or reach out of the file."""
    entries = header.description.index.items()
    places = header.row_regions() + [
        (header.offsets[f"index/{name}"], header.offsets[f"index/{name}"] + entry.size_bytes) for name, entry in entries
    ]
    position = block
    for start, stop in sorted(places):
        if start < position:
            message = f"{path}: arrays overlap at byte {start}; the header is not trustworthy"
            raise UntrustedStoreError(message)
        position = stop
    if position > header.file_bytes:
        message = f"{path}: an array ends at byte {position} of a file of {header.file_bytes}"
        raise UntrustedStoreError(message)


def open_hdf5(path: Path) -> OpenedStore:
    """Open a packed store for reading.

    Raises:
        StoreNotFoundError: There is no such file.
        FormatError: It is no store, or anything in it but its rows is damaged.
        UntrustedStoreError: Its header asks for what no store holds.
    """
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

    index = Index(description, load, str(path))
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


def pack_hdf5(opened: OpenedStore, target: Path, scratch: Path, progress: Progress = silent) -> None:
    """Copy every used row of a store into one HDF5 file, which gets its name when it is whole and synced.

    Args:
        opened: The store to copy, in any format; dead slots stay behind.
        target: The file; replaced if it exists.
        scratch: Name to write under, on the same file system.
        progress: Called after each row.

    Raises:
        DamagedRowError: A row of `opened` is damaged.
        NoSpaceError: The disk is full; `target` is as it was.
    """
    description, arrays, order = _compact(opened)
    text = canonical(description.to_json())
    if len(text) > MAX_DESCRIPTION_BYTES:
        message = (
            f"{target}: fingerprint and provenance take {len(text)} bytes, HDF5 attributes at most "
            f"{MAX_DESCRIPTION_BYTES}; shorten the provenance or use .zarr"
        )
        raise StoreError(message)
    size = 512
    while size < len(text) + 1024 + 256 * (len(arrays) + 2 * len(description.taps)):
        size *= 2
    try:
        rows = sum(tap.row_bytes + CHECKSUM_BYTES + _TREE_BYTES_PER_ROW for tap in description.taps.values())
        index = sum(entry.size_bytes for entry in description.index.values())
        with space_errors(target):
            require_space(size + len(order) * rows + index + (1 << 16), scratch)
            offsets = _write_hdf5(opened, description, arrays, order, scratch, size, progress)
            _write_header(description, offsets, scratch, size)
            scratch.replace(target)
            sync_folder(target.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _compact(opened: OpenedStore) -> tuple[Description, dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Description and index arrays with dead and empty slots left out, and the old slots in their new order."""
    old = opened.description
    order, slot = np.unique(opened.index.slot, return_inverse=True)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name in old.index:
        array = opened.index.array(name)
        arrays[name] = array[order] if name in {"digest", "extent"} or name.startswith("crc32c/") else array
    arrays["slot"] = slot.astype(np.int64)
    description = Description(
        fingerprint=old.fingerprint,
        taps=old.taps,
        rows=old.rows,
        slots=len(order),
        shard_rows=old.shard_rows,
        index={name: describe_entry(array) for name, array in arrays.items()},
        provenance=old.provenance,
    )
    return description, arrays, order


def _write_hdf5(
    opened: OpenedStore,
    description: Description,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    order: np.ndarray[Any, Any],
    path: Path,
    block: int,
    progress: Progress,
) -> dict[str, int]:
    """Write the file behind an empty user block; returns the place of every array."""
    import h5py

    text = canonical(description.to_json())
    reserve = len(text) + 8192 + len(description.taps) * (8192 + _TREE_BYTES_PER_ROW * len(order))
    offsets: dict[str, int] = {}
    with h5py.File(
        path, "w", libver=("earliest", "v108"), userblock_size=block, meta_block_size=reserve, rdcc_nbytes=0
    ) as file:
        file.attrs[KEY] = np.bytes_(text)
        for name, tap in description.taps.items():
            dataset = file.create_dataset(
                name, (len(order), *tap.shape), f"<{np.dtype(tap.dtype).str[1:]}", chunks=(1, *tap.shape),
                fletcher32=True, track_times=False,
            )  # fmt: skip
            _copy_rows(opened, name, tap, order, dataset, progress)
            offsets[name] = _first_byte(dataset, tap, path)
        for name, array in arrays.items():
            dataset = file.create_dataset(f"index/{name}", data=array, track_times=False)
            offsets[f"index/{name}"] = int(dataset.id.get_offset())
    return offsets


def _copy_rows(
    opened: OpenedStore, name: str, tap: TapSpec, order: np.ndarray[Any, Any], dataset: Any, progress: Progress
) -> None:
    """Copy the rows of one tap, each checked on the way; one row of memory."""
    import h5py

    space, memory = h5py.h5s.create_simple((len(order), *tap.shape)), h5py.h5s.create_simple((1, *tap.shape))
    buffer = np.empty(tap.row_bytes, np.uint8)
    values = buffer.view(f"<{np.dtype(tap.dtype).str[1:]}").reshape(1, *tap.shape)
    checksums = opened.index.checksums(name)
    for new, slot in enumerate(order.tolist()):
        buffer[:] = row_bytes(opened.rows, tap, name, slot)
        if google_crc32c.value(buffer) != checksums[slot]:
            ids = [opened.index.ids[row] for row in np.flatnonzero(opened.index.slot == slot)]
            message = f"tap {name!r} of {ids!r} is damaged in the store that is copied; run 'store repair' on it first"
            raise DamagedRowError(message, ids)
        space.select_hyperslab((new, 0, 0, 0), (1, *tap.shape))
        dataset.id.write(memory, space, values)
        progress("pack", new + 1, len(order), tap=name)


def _first_byte(dataset: Any, tap: TapSpec, path: Path) -> int:
    """First byte of a data set's rows, after a check that they lie one behind the other."""
    found: list[tuple[int, int]] = []
    dataset.id.chunk_iter(lambda chunk: found.append((chunk.chunk_offset[0], chunk.byte_offset)))
    numbers, places = np.array(sorted(found), np.int64).T
    stride = tap.row_bytes + CHECKSUM_BYTES
    if len(found) != dataset.shape[0] or (places != places[0] + numbers * stride).any():
        message = f"{path}: this HDF5 library scatters the rows of {dataset.name!r}; use the .zarr format"
        raise StoreError(message)
    return int(places[0])


def _write_header(description: Description, offsets: Mapping[str, int], path: Path, block: int) -> None:
    """Fill the user block of a closed file and sync it."""
    mapped = MappedFile(path)
    trailers = {
        name: trailers_sha256(mapped.data, offsets[name], description.slots, tap.row_bytes)
        for name, tap in description.taps.items()
    }
    header = Header(description, mapped.data.nbytes, offsets, "", trailers)
    header = dataclasses.replace(header, structure_sha256=structure_sha256(path, header, block))
    with path.open("r+b") as file:
        file.write(header.to_bytes(block))
        file.flush()
        os.fsync(file.fileno())
