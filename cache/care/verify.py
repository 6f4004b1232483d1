"""Every byte of a store against what was written: nothing in it can flip, vanish or change place unnoticed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache.care.hdf5_view import library_differences
from cache.description import Description
from cache.errors import FormatError, StoreError, UntrustedStoreError
from cache.formats.hdf5_file import open_hdf5, read_header, trailers_sha256
from cache.formats.mapped import MappedFile, ZarrRows, read_plain, row_bytes
from cache.formats.zarr_folder import OpenedStore, check_folders, read_root
from cache.formats.zarr_layout import CHECKSUM_BYTES, shard_index, shard_name
from cache.index import Index
from cache.progress import Progress, silent
from cache.reading.reader import open_files, store_format
from cache.reading.recover import recover
from cache.writing.ending import store_files


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written.

    Attributes:
        file: Path inside the store, `"."` for a single file.
        reason: What is wrong.
        tap: Tap whose rows are hit, empty if it is no tap.
        slots: Slots whose row is hit.
        ids: Samples that lie there; none for a dead slot.
    """

    file: str
    reason: str
    tap: str = ""
    slots: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a person."""
        shown = ", ".join(map(repr, self.ids[:8])) + (f" and {len(self.ids) - 8} more" if len(self.ids) > 8 else "")
        return f"{self.file}: {self.reason}" + (f" (tap {self.tap}: {shown or 'no sample'})" if self.tap else "")


def verify(path: str | os.PathLike[str], progress: Progress = silent) -> tuple[Damage, ...]:
    """Check every byte of a finished store.

    Args:
        path: `NAME.zarr`, `NAME.h5` or `NAME.hdf5`.
        progress: Called after each shard (zarr) or tap (HDF5).

    Returns:
        What is wrong, nothing for a sound store.

    Raises:
        StoreNotFoundError: There is no store.
    """
    store = Path(path)
    if not store.exists():
        open_files(store)
    if store_format(store) == "zarr":
        return tuple(_zarr_damage(store, progress))
    return tuple(_hdf5_damage(Path(os.path.realpath(store)), progress))


def _zarr_damage(store: Path, progress: Progress) -> Iterator[Damage]:
    try:
        read_root(store)
    except StoreError as error:
        yield Damage("zarr.json", str(error))
    try:
        opened = recover(store)
        description, rows = opened.description, opened.rows
        files = store_files(description, {name: opened.index.array(name) for name in description.index})
        slot_ids = _slot_ids(opened.index)
    except StoreError as error:
        yield Damage("index", f"nothing but extracting again helps: {error}")
        return
    assert isinstance(rows, ZarrRows)
    for name, content in files.items():
        yield from _file_damage(store, name, content)
    yield from stray_files(store, description, rows, files.keys())
    shards = -(-description.slots // description.shard_rows)
    for number in range(shards):
        for tap in description.taps:
            yield from _shard_damage(description, opened.index, rows, tap, number, slot_ids)
        progress("verify", number + 1, shards)


def _file_damage(store: Path, name: str, content: bytes) -> Iterator[Damage]:
    """Whether a file of the index or of metadata is not what the description calls for."""
    try:
        check_folders(store, (store / name).parent)
        if read_plain(store / name, len(content)) != content:
            yield Damage(name, "the bytes are not those that were written")
    except FileNotFoundError:
        yield Damage(name, "the file is missing")
    except StoreError as error:
        yield Damage(name, str(error))


def _slot_ids(index: Index) -> dict[int, list[str]]:
    """Ids of the samples at each slot."""
    found: dict[int, list[str]] = {}
    for name, slot in zip(index.ids, index.slot.tolist(), strict=True):
        found.setdefault(slot, []).append(name)
    return found


def stray_files(store: Path, description: Description, rows: ZarrRows, files: Collection[str]) -> Iterator[Damage]:
    """Files that no store of this description has; links among them."""
    shards = -(-description.slots // description.shard_rows)
    wanted = {"zarr.json", *files}
    for tap in description.taps:
        wanted |= {f"{tap}/{shard_name(n)}" for n in range(shards) if rows.shards.size(tap, n)}
    folders = {str(Path(name).parent) for name in wanted}
    for base, inner, files in os.walk(store):
        here = Path(base).relative_to(store)
        for name in (str(here / file) for file in files):
            if name not in wanted:
                yield Damage(name, "this file is not part of the store")
        for name in (str(here / folder) for folder in inner):
            if name not in folders and not any(known.startswith(name + "/") for known in folders):
                yield Damage(name, "this folder is not part of the store")


def _shard_damage(
    description: Description, index: Index, rows: ZarrRows, tap: str, number: int, slot_ids: dict[int, list[str]]
) -> Iterator[Damage]:
    """Damage in one shard file of one tap."""
    size, row_bytes = rows.shards.size(tap, number), description.taps[tap].row_bytes
    if not size:
        return
    first = number * description.shard_rows
    present = index.present[first : first + description.shard_rows]
    name = f"{tap}/{shard_name(number)}"
    all_slots = (first + np.flatnonzero(present)).tolist()
    try:
        data = MappedFile(rows.shards.path(tap, number), size).data
    except (FileNotFoundError, FormatError, UntrustedStoreError) as error:
        reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
        yield _rows_damage(name, reason, tap, all_slots, slot_ids)
        return
    own_index = shard_index(present, row_bytes, description.shard_rows)
    body = size - len(own_index)
    places = data[:body].reshape(-1, row_bytes + CHECKSUM_BYTES)
    checksums = index.checksums(tap)[first : first + len(places)]
    bad = [first + i for i in _bad_places(places, present, checksums)]
    if bad:
        yield _rows_damage(name, "the bytes of rows do not match their checksums", tap, bad, slot_ids)
    if data[body:].tobytes() != own_index:
        yield _rows_damage(name, "the index at the end of the shard is damaged", tap, all_slots, slot_ids)


def _bad_places(
    places: npt.NDArray[np.uint8], present: npt.NDArray[np.bool_], checksums: npt.NDArray[np.uint32]
) -> Iterator[int]:
    """Places of a shard whose row or checksum is damaged; empty places must be zeros."""
    for i, place in enumerate(places):
        row, trailer = place[:-CHECKSUM_BYTES], int.from_bytes(place[-CHECKSUM_BYTES:].tobytes(), "little")
        sound = crc32c(row.data) == checksums[i] == trailer if present[i] else not place.any()
        if not sound:
            yield i


def _rows_damage(file: str, reason: str, tap: str, slots: list[int], slot_ids: dict[int, list[str]]) -> Damage:
    ids = tuple(name for slot in slots for name in slot_ids.get(slot, ()))
    return Damage(file, reason, tap, tuple(slots), ids)


def _hdf5_damage(store: Path, progress: Progress) -> Iterator[Damage]:
    try:
        open_hdf5(store)
        yield from (Damage(".", said) for said in library_differences(store, *read_header(store)))
    except StoreError as error:
        yield Damage(".", str(error))
    try:
        opened = recover(store)
        slot_ids = _slot_ids(opened.index)
    except StoreError as error:
        yield Damage(".", f"nothing but extracting again helps: {error}")
        return
    for done, name in enumerate(opened.description.taps):
        yield from _tap_damage(opened, name, slot_ids)
        progress("verify", done + 1, len(opened.description.taps), tap=name)
    try:
        header, _ = read_header(store)
    except StoreError:
        return
    data = MappedFile(store).data
    for name, tap in header.description.taps.items():
        found = trailers_sha256(data, header.offsets[name], header.description.slots, tap.row_bytes)
        if found != header.trailers_sha256[name]:
            yield Damage(".", "a fletcher32 checksum behind a row is damaged", name)


def _tap_damage(opened: OpenedStore, name: str, slot_ids: dict[int, list[str]]) -> Iterator[Damage]:
    """Damage in the rows of one tap of a single file."""
    tap, checksums = opened.description.taps[name], opened.index.checksums(name).tolist()
    rows = (row_bytes(opened.rows, tap, name, slot) for slot in range(opened.description.slots))
    bad = [slot for slot, row in enumerate(rows) if crc32c(row.data) != checksums[slot]]
    if bad:
        yield _rows_damage(".", "the bytes of rows do not match their checksums", name, bad, slot_ids)
