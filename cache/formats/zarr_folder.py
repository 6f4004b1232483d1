"""Opening a finished Zarr folder: its root, its index, and that it holds nothing that points elsewhere."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from cache.description import KEY, Description, load_json, parse_description
from cache.errors import FormatError, StoreNotFoundError, UntrustedStoreError
from cache.formats.mapped import RowFiles, ZarrRows, folder_inode, read_plain, read_range
from cache.formats.zarr_layout import CHECKSUM_BYTES, index_chunk_name, metadata_files, root_json
from cache.index import Index, UInt8, check_size

MAX_METADATA_BYTES = 1 << 20


@dataclass(frozen=True)
class OpenedStore:
    """What reading needs, in either format.

    Attributes:
        description: What the root says.
        index: Where each row lies.
        rows: The bytes of the rows.
    """

    description: Description
    index: Index
    rows: RowFiles


def read_root(folder: Path) -> Description:
    """Description at the root of a Zarr folder.

    Raises:
        StoreNotFoundError: There is no folder, or it has no `zarr.json`.
        FormatError: It is no store or its root is damaged.
    """
    path = folder / "zarr.json"
    try:
        data = read_plain(path, MAX_METADATA_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"{folder} is no store: it has no zarr.json; check the path, or run extract to make it"
        raise StoreNotFoundError(message) from error
    return parse_root(data, str(path))


def parse_root(data: bytes, where: str) -> Description:
    """Description in the bytes of a root's `zarr.json`.

    Raises:
        FormatError: They are no store's or damaged; `where` names the file.
    """
    try:
        value = load_json(data, where)
    except FormatError as error:
        error.add_note("'store repair' writes it again from its second copy; else fetch or extract the store again")
        raise
    try:
        stored = value["attributes"][KEY]
    except (KeyError, TypeError, IndexError) as error:
        message = f"{where} has no attribute {KEY!r}: this is a Zarr group, but not a feature store"
        raise FormatError(message) from error
    description = parse_description(stored, where)
    if data != root_json(description):
        message = f"{where} is not spelled as it was written: it is damaged or was edited; fetch or extract it again"
        raise FormatError(message)
    return description


def open_zarr(folder: Path) -> OpenedStore:
    """Open a Zarr folder for reading.

    Raises:
        StoreNotFoundError: There is none.
        FormatError: Its metadata are damaged.
        UntrustedStoreError: It holds what no store holds.
    """
    before = folder_inode(folder)
    description = read_root(folder)
    metadata = metadata_files(description)
    for path in (*description.taps, *(f"index/{name}" for name in description.index)):
        check_metadata(folder, folder / path, metadata[path])

    def load(name: str) -> UInt8:
        return load_index(folder, description, name)

    index = Index(description, load, str(folder), lambda: folder_inode(folder) != before)
    rows = ZarrRows(folder, description.taps, description.shard_rows, index.present)
    return OpenedStore(description, index, rows)


def check_metadata(root: Path, array: Path, expected: bytes) -> None:
    """Refuse an array whose folder or `zarr.json` is not what the root calls for.

    Raises:
        FormatError: The metadata are missing or differ, be it by another codec, shape or type.
        UntrustedStoreError: A folder on the way is a link.
    """
    path = array / "zarr.json"
    try:
        check_folders(root, array)
        found = read_plain(path, MAX_METADATA_BYTES)
    except FileNotFoundError as error:
        message = f"{path} is missing; the store is damaged: run 'store repair' or fetch it again"
        raise FormatError(message) from error
    if found != expected:
        message = (
            f"{path} is not the metadata of this store (another shape, type or codec, or damaged bytes); "
            f"run 'store repair' or fetch it again"
        )
        raise FormatError(message)


def check_folders(root: Path, folder: Path) -> None:
    """Refuse a folder of a store that is reached through a link.

    Raises:
        UntrustedStoreError: It, or a folder between it and the root, is a link or a file.
        FileNotFoundError: One is missing.
    """
    while folder != root:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            message = f"{folder} is a symbolic link or a file; a store holds only folders of its own there"
            raise UntrustedStoreError(message)
        folder = folder.parent


def load_index(folder: Path, description: Description, name: str) -> UInt8:
    """Bytes of an index array, (bytes,) uint8, without the trailing checksum.

    Raises:
        FormatError: The file is missing or of another size.
    """
    entry = description.index[name]
    path = folder / "index" / name / index_chunk_name(entry.shape)
    try:
        data = read_range(path, 0, entry.size_bytes)
        check_size(entry, path.stat().st_size - CHECKSUM_BYTES, str(path))
        return data
    except FileNotFoundError as error:
        message = f"{path} is missing; the store is damaged: run 'store repair' or fetch it again"
        raise FormatError(message) from error
