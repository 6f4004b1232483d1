"""Every byte of a store against what was written: nothing in it can flip, vanish or change place unnoticed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from cache.description import Description
from cache.errors import FormatError, StoreError, UntrustedStoreError
from cache.finish import metadata_files
from cache.hdf5_file import Header, open_hdf5, read_header, trailers_sha256
from cache.index import Index
from cache.mapped import MappedFile, ZarrRows, read_plain
from cache.progress import Progress, silent
from cache.reader import open_files, store_format
from cache.zarr_folder import OpenedStore, check_metadata, load_index, read_root
from cache.zarr_layout import (
    CHECKSUM_BYTES,
    index_chunk_name,
    shard_index,
    shard_name,
    with_checksum,
)


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
        description = read_root(store)
    except StoreError as error:
        yield Damage("zarr.json", str(error))
        return
    yield from _metadata_damage(store, description)
    yield from _index_damage(store, description)
    index = Index(description, lambda name: load_index(store, description, name), str(store))
    try:
        present = index.present
        rows = ZarrRows(store, description.taps, description.shard_rows, present)
        yield from _stray_files(store, description, rows)
        slot_ids = _slot_ids(index)
    except StoreError as error:
        yield Damage("index", f"rows cannot be checked: {error}")
        return
    shards = -(-description.slots // description.shard_rows)
    for number in range(shards):
        for tap in description.taps:
            try:
                yield from _shard_damage(description, index, rows, tap, number, slot_ids)
            except StoreError as error:
                yield Damage(f"index/crc32c/{tap}", f"rows cannot be checked: {error}", tap)
        progress("verify", number + 1, shards)


def _metadata_damage(store: Path, description: Description) -> Iterator[Damage]:
    """Arrays and groups whose `zarr.json` is not what the root calls for."""
    for name, content in metadata_files(description).items():
        try:
            check_metadata(store, (store / name).parent, content)
        except StoreError as error:
            yield Damage(name, str(error))


def _index_damage(store: Path, description: Description) -> Iterator[Damage]:
    """Index arrays whose bytes, checksum included, are not the ones that were written."""
    for name, entry in description.index.items():
        file = f"index/{name}/{index_chunk_name(entry)}"
        try:
            index = Index(description, lambda name: load_index(store, description, name), str(store))
            data = index.array(name).tobytes()
            if read_plain(store / file, entry.size_bytes + CHECKSUM_BYTES) != with_checksum(data):
                yield Damage(file, "the crc32c behind the array is damaged")
        except StoreError as error:
            yield Damage(file, str(error))


def _slot_ids(index: Index) -> dict[int, list[str]]:
    """Ids of the samples at each slot."""
    found: dict[int, list[str]] = {}
    for name, slot in zip(index.ids, index.slot.tolist(), strict=True):
        found.setdefault(slot, []).append(name)
    return found


def _stray_files(store: Path, description: Description, rows: ZarrRows) -> Iterator[Damage]:
    """Files that no store of this description has; links among them."""
    shards = -(-description.slots // description.shard_rows)
    wanted = {"zarr.json", "index/zarr.json", "index/crc32c/zarr.json"}
    for tap in description.taps:
        wanted |= {f"{tap}/zarr.json", *(f"{tap}/{shard_name(n)}" for n in range(shards) if rows.shards.size(tap, n))}
    for name, entry in description.index.items():
        wanted |= {f"index/{name}/zarr.json", f"index/{name}/{index_chunk_name(entry)}"}
    if "card" in description.index:
        wanted.add("README.md")
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
        sound = google_crc32c.value(row) == checksums[i] == trailer if present[i] else not place.any()
        if not sound:
            yield i


def _rows_damage(file: str, reason: str, tap: str, slots: list[int], slot_ids: dict[int, list[str]]) -> Damage:
    ids = tuple(name for slot in slots for name in slot_ids.get(slot, ()))
    return Damage(file, reason, tap, tuple(slots), ids)


def _hdf5_damage(store: Path, progress: Progress) -> Iterator[Damage]:
    try:
        opened = open_hdf5(store)
        header, _ = read_header(store)
        slot_ids = _slot_ids(opened.index)
    except StoreError as error:
        yield Damage(".", str(error))
        return
    for done, name in enumerate(header.description.taps):
        yield from _tap_damage(opened, header, name, slot_ids)
        progress("verify", done + 1, len(header.description.taps), tap=name)


def _tap_damage(opened: OpenedStore, header: Header, name: str, slot_ids: dict[int, list[str]]) -> Iterator[Damage]:
    """Damage in the rows of one tap of a single file."""
    description, tap = header.description, header.description.taps[name]
    data = opened.rows.file(name, 0).data
    start, stride = header.offsets[name], tap.row_bytes + CHECKSUM_BYTES
    try:
        checksums = opened.index.checksums(name)
    except StoreError as error:
        yield Damage(".", str(error), name)
        return
    bad = [
        slot
        for slot, expected in enumerate(checksums.tolist())
        if google_crc32c.value(data[start + slot * stride :][: tap.row_bytes]) != expected
    ]
    if bad:
        yield _rows_damage(".", "the bytes of rows do not match their checksums", name, bad, slot_ids)
    if trailers_sha256(data, start, description.slots, tap.row_bytes) != header.trailers_sha256[name]:
        yield Damage(".", "a fletcher32 checksum behind a row is damaged", name)
