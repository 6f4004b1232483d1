"""A store as a Zarr v3 folder: names, metadata and shard bytes, by the specification and without the library.

Writing the bytes ourselves gives what the library does not: a shard is written once, synced, and renamed, and a row's
place in its file is a product instead of a look-up. That any Zarr reads the result is proved in the tests.
Specification: https://zarr-specs.readthedocs.io/en/latest/v3/ (core; codecs `bytes`, `crc32c`, `sharding_indexed`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache.description import IDS, KEY, SCALE, Description, IndexEntry, TapSpec
from cache.formats.second_copy import SPARE, spare_bytes

Bytes = npt.NDArray[np.uint8]

CHECKSUM_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)
_BLOCK_BYTES = 4 << 20
_GROUP: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_CRC32C = {"name": "crc32c"}
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def root_json(description: Description) -> bytes:
    """Content of the root's `zarr.json`; from version 3 on it repeats all the others, so that one request opens all."""
    root = {**_GROUP, "attributes": {KEY: description.to_json()}}
    if description.version > 2:
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": _below(description)}
    return _json(root)


def metadata_files(description: Description) -> dict[str, bytes]:
    """Content of every other `zarr.json`, by the path of its group or array."""
    return {path: _json(document) for path, document in _below(description).items()}


def _below(description: Description) -> dict[str, Any]:
    """The `zarr.json` of every group and array below the root, by path."""
    named = description.version > 2
    spare = IndexEntry("uint8", (spare_bytes(description),), "")
    found: dict[str, Any] = {"index": _GROUP, "index/crc32c": _GROUP}
    if named:
        found[IDS] = _ids_document(description.slots)
    for name, tap in description.taps.items():
        found[name] = _tap_document(name, tap, description)
    for name, entry in {**description.index, SPARE: spare}.items():
        found[f"index/{name}"] = _index_document(entry, _index_dimensions(name) if named else None)
    return found


def _ids_document(slots: int) -> dict[str, Any]:
    """The array of ids: variable length UTF-8, one chunk."""
    codecs = [{"name": "vlen-utf8"}, _CRC32C]
    return _array([slots], [slots], "string", codecs, "", [IDS])


def _tap_document(name: str, tap: TapSpec, description: Description) -> dict[str, Any]:
    """A tap: shape (slots, C, h, w), one row an inner chunk, `shard_rows` rows a file."""
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, *tap.shape],
            "codecs": [_LITTLE, _CRC32C],
            "index_codecs": [_LITTLE, _CRC32C],
            "index_location": "end",
        },
    }
    axes = ("channel", "y", "x")
    names = ["slot", *axes] if description.version < 3 else [IDS, *(f"{name}_{axis}" for axis in axes)]
    of = name.removesuffix(SCALE)
    if of != name and of in description.taps and description.taps[of].dtype == "int8":
        names[1] = f"{of}_channel"
    fill = 0.0 if tap.array_dtype.startswith("float") else 0
    shape, chunk = [description.slots, *tap.shape], [description.shard_rows, *tap.shape]
    return _array(shape, chunk, tap.array_dtype, [sharding], fill, names, notes(name, tap))


def notes(name: str, tap: TapSpec) -> dict[str, str]:
    """Attributes of a tap's array, for whoever finds numbers there that are not the features themselves."""
    return {"int8": {"scale": name + SCALE}, "bfloat16": {"bits_of": "bfloat16"}}.get(tap.dtype, {})


def _index_document(entry: IndexEntry, names: list[str] | None) -> dict[str, Any]:
    """An array of the index: one chunk."""
    fill = 0.0 if entry.dtype == "float32" else 0
    return _array(list(entry.shape), list(entry.shape), entry.dtype, [_LITTLE, _CRC32C], fill, names)


def _index_dimensions(name: str) -> list[str]:
    """Names of an index array's dimensions, of which no two have the name but not the size in common."""
    if name.startswith("crc32c/"):
        return [IDS]
    return {"slot": ["row"], "digest": [IDS, "digest_byte"], "extent": [IDS, "extent_axis"]}.get(name, [f"{name}_byte"])


def ids_chunk(ids: Sequence[str], slot: npt.NDArray[np.int64], slots: int) -> bytes:
    """The one chunk of the array of ids, with its checksum: for each slot the first id that lies there, or nothing.

    Args:
        ids: In row order.
        slot: (rows,) where each row lies.
        slots: Places.
    """
    names = [b""] * slots
    for name, at in zip(reversed(ids), reversed(slot.tolist()), strict=True):
        names[at] = name.encode()
    sizes = (len(names), *map(len, names))
    first, *others = (size.to_bytes(4, "little") for size in sizes)
    return with_checksum(first + b"".join(size + name for size, name in zip(others, names, strict=True)))


def shard_name(number: int) -> str:
    """File name of a tap's shard inside the tap's folder."""
    return f"c.{number}.0.0.0"


def index_chunk_name(shape: Sequence[int]) -> str:
    """File name of the only chunk of an index array of that shape."""
    return ".".join(["c", *("0" for _ in shape)])


def stored_places(present: npt.NDArray[np.bool_], shard_rows: int) -> npt.NDArray[np.int64]:
    """Row places that each shard file has: up to its last present slot, 0 where there is no file.

    Args:
        present: (slots,) whether a slot holds a row.
        shard_rows: Slots in a shard.

    Returns:
        (shards,) int64.
    """
    stored = np.zeros(-(-len(present) // shard_rows), np.int64)
    shard, place = np.divmod(np.flatnonzero(present), shard_rows)
    np.maximum.at(stored, shard, place + 1)
    return stored


def shard_bytes(places: int, row_bytes: int, shard_rows: int) -> int:
    """Size of a shard file with `places` row places."""
    return places * (row_bytes + CHECKSUM_BYTES) + 16 * shard_rows + CHECKSUM_BYTES


def shard_index(present: npt.NDArray[np.bool_], row_bytes: int, shard_rows: int) -> bytes:
    """The shard's own index and its crc32c: place i at byte i * (row_bytes + 4), or absent.

    Args:
        present: (at most shard_rows,) which slots of this shard hold a row.
        row_bytes: Bytes of a row without its checksum.
        shard_rows: Entries of the index.
    """
    entries = np.full((shard_rows, 2), _ABSENT, "<u8")
    places = np.flatnonzero(present)
    entries[places, 0] = places.astype(np.uint64) * np.uint64(row_bytes + CHECKSUM_BYTES)
    entries[places, 1] = row_bytes + CHECKSUM_BYTES
    return with_checksum(entries.tobytes())


def with_checksum(data: bytes) -> bytes:
    """`data` followed by its crc32c, as the codec of that name writes it."""
    return data + int(crc32c(data)).to_bytes(CHECKSUM_BYTES, "little")


def shard_blocks(
    rows: Sequence[Bytes | None], row_bytes: int, shard_rows: int, checksums: npt.NDArray[np.uint32]
) -> Iterator[memoryview]:
    """The bytes of one shard file, a few MiB at a time, so that memory stays bounded.

    Args:
        rows: (at most shard_rows) raw bytes of each row, None for a slot without a row.
        row_bytes: Bytes of a row.
        shard_rows: Slots in a shard.
        checksums: (len(rows),) receives each row's crc32c; 0 for a slot without a row.
    """
    present = np.array([row is not None for row in rows], bool)
    places = int(stored_places(present, max(len(rows), 1))[0])
    step = max(1, _BLOCK_BYTES // (row_bytes + CHECKSUM_BYTES))
    for start in range(0, places, step):
        chosen = rows[start : min(start + step, places)]
        block = np.zeros((len(chosen), row_bytes + CHECKSUM_BYTES), np.uint8)
        for i, row in enumerate(chosen):
            if row is not None:
                block[i, :row_bytes] = row
                checksums[start + i] = crc32c(block[i, :row_bytes].data)
                block[i, row_bytes:] = checksums[start + i : start + i + 1].astype("<u4").view(np.uint8)
        yield block.reshape(-1).data
    yield memoryview(shard_index(present, row_bytes, shard_rows))


def _array(
    shape: list[int],
    chunk: list[int],
    dtype: str,
    codecs: list[Any],
    fill: float | str,
    names: list[str] | None,
    attributes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The `zarr.json` of an array."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": codecs,
        **({"dimension_names": names} if names else {}),
        "attributes": dict(attributes or {}),
    }


def _json(value: dict[str, Any]) -> bytes:
    """One spelling, for people and for comparison byte by byte."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
