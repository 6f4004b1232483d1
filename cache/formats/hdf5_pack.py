"""Packing a store into one HDF5 file, in one session, so that a kill cannot tear it.

The library (h5py) writes an ordinary file: chunked by row with `fletcher32`, no newer feature than HDF5 1.8 reads. Its
metadata are gathered in one block in front, so that the rows of a tap lie one behind the other and need no look-up.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from cache.description import KEY, Description, TapSpec
from cache.durable import require_space, space_errors, sync_folder
from cache.errors import DamagedRowError, StoreError
from cache.fingerprint import canonical
from cache.formats.hdf5_file import Header, structure_sha256, trailers_sha256
from cache.formats.mapped import MappedFile, row_bytes
from cache.formats.second_copy import SPARE, encode_spare
from cache.formats.zarr_folder import OpenedStore
from cache.formats.zarr_layout import CHECKSUM_BYTES, notes
from cache.index import describe_entry
from cache.progress import Progress, silent

_TREE_BYTES_PER_ROW = 128
"""Upper bound of what HDF5's chunk tree needs for a row (measured: 87); reserved in front of the rows."""


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
    size = 512
    while size < len(text) + 1024 + 256 * (len(arrays) + 2 * len(description.taps)):
        size *= 2
    try:
        rows = sum(tap.row_bytes + CHECKSUM_BYTES + _TREE_BYTES_PER_ROW for tap in description.taps.values())
        index = sum(entry.size_bytes for entry in description.index.values())
        with space_errors(target):
            require_space(size + len(order) * rows + 2 * index + (1 << 17), scratch)
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
        version=old.version,
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
                name, (len(order), *tap.shape), f"<{np.dtype(tap.array_dtype).str[1:]}", chunks=(1, *tap.shape),
                fletcher32=True, track_times=False,
            )  # fmt: skip
            for key, value in notes(name, tap).items():
                dataset.attrs[key] = np.bytes_(value.encode())
            _copy_rows(opened, name, tap, order, dataset, progress)
            offsets[name] = _first_byte(dataset, tap, path)
        for name, array in arrays.items():
            dataset = file.create_dataset(f"index/{name}", data=array, track_times=False)
            offsets[f"index/{name}"] = int(dataset.id.get_offset())
        file.create_dataset(f"index/{SPARE}", data=encode_spare(description, arrays, offsets), track_times=False)
    return offsets


def _copy_rows(
    opened: OpenedStore, name: str, tap: TapSpec, order: np.ndarray[Any, Any], dataset: Any, progress: Progress
) -> None:
    """Copy the rows of one tap, each checked on the way; one row of memory."""
    import h5py

    space, memory = h5py.h5s.create_simple((len(order), *tap.shape)), h5py.h5s.create_simple((1, *tap.shape))
    buffer = np.empty(tap.row_bytes, np.uint8)
    values = buffer.view(f"<{np.dtype(tap.array_dtype).str[1:]}").reshape(1, *tap.shape)
    checksums = opened.index.checksums(name)
    for new, slot in enumerate(order.tolist()):
        buffer[:] = row_bytes(opened.rows, tap, name, slot)
        if crc32c(buffer.data) != checksums[slot]:
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
