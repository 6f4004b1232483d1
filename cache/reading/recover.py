"""What can still be known of a damaged store: description, index and rows, from whichever copy is sound."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from cache.description import KEY, Description
from cache.errors import FormatError, StoreError
from cache.formats.hdf5_file import read_header
from cache.formats.mapped import Hdf5Rows, MappedFile, ZarrRows, read_plain, read_range
from cache.formats.second_copy import MAGIC, SPARE, Spare, decode_spare
from cache.formats.zarr_folder import MAX_METADATA_BYTES, OpenedStore, load_index, read_root
from cache.index import Index, UInt8, index_of


def recover(path: Path) -> OpenedStore:
    """Open a store for repair: every index array from its place or from the second copy.

    Raises:
        FormatError: Both copies of something are damaged.
    """
    return _recover_zarr(path) if path.is_dir() else _recover_hdf5(path)


def is_marked(path: Path) -> bool:
    """Whether something was a feature store once, however damaged it is: by its root or by the second copy."""
    if path.is_dir():
        root = path / "zarr.json"
        with suppress(StoreError, OSError):
            return (path / "index" / SPARE).is_dir() or f'"{KEY}"'.encode() in read_plain(root, MAX_METADATA_BYTES)
        return False
    with suppress(StoreError, OSError):
        mapped = MappedFile(path)
        return mapped.data[:16].tobytes() == b"feature-store hd" or mapped.last(MAGIC) >= 0
    return False


def _recover_zarr(store: Path) -> OpenedStore:
    spare: Spare | None = None
    chunk = store / "index" / SPARE / "c.0"
    try:
        description = read_root(store)
    except StoreError:
        spare = _spare_of(lambda: MappedFile(chunk).data, str(chunk))
        description = spare.description
    arrays = _sound_arrays(
        description, lambda name: load_index(store, description, name), lambda: MappedFile(chunk).data, str(store)
    )
    index = index_of(description, arrays, str(store))
    return OpenedStore(description, index, ZarrRows(store, description.taps, description.shard_rows, index.present))


def _recover_hdf5(path: Path) -> OpenedStore:
    mapped = MappedFile(path)

    def tail() -> UInt8:
        return mapped.data[max(mapped.last(MAGIC), 0) :]

    try:
        header, _ = read_header(path, whole=False)
        description, offsets = header.description, header.offsets
    except StoreError:
        spare = _spare_of(tail, str(path))
        description, offsets = spare.description, spare.offsets

    def load(name: str) -> UInt8:
        return read_range(path, offsets[f"index/{name}"], description.index[name].size_bytes)

    index = index_of(description, _sound_arrays(description, load, tail, str(path)), str(path))
    return OpenedStore(description, index, Hdf5Rows(mapped, description.taps, offsets))


def _spare_of(read: Callable[[], UInt8], where: str) -> Spare:
    """The second copy, or an error that says what is left to do."""
    try:
        return decode_spare(read(), where)
    except (StoreError, FileNotFoundError) as error:
        message = f"{where}: both copies of the metadata are damaged ({error}); extract the store again"
        raise FormatError(message) from error


def _sound_arrays(
    description: Description, load: Callable[[str], UInt8], read_spare: Callable[[], UInt8], where: str
) -> dict[str, npt.NDArray[Any]]:
    """Every index array, from its place if it is sound there."""
    first = Index(description, load, where)
    arrays: dict[str, npt.NDArray[Any]] = {}
    spare: Spare | None = None
    for name in description.index:
        try:
            arrays[name] = first.array(name)
        except (StoreError, KeyError):
            spare = spare or _spare_of(read_spare, where)
            if spare.description.index.get(name) != description.index[name]:
                message = f"{where}: the second copy of the metadata is another version's; extract the store again"
                raise FormatError(message) from None
            arrays[name] = spare.arrays[name]
    return arrays
