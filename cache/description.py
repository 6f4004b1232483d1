"""What a store says of itself: the one JSON object at its root, checked against its own digest.

Both formats carry the same object, so whatever can be known without touching a feature is known in one way. Its
spelling is canonical: the bytes that a reader finds must be the bytes that it would write, so no bit of them can flip
unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.errors import FormatError, StoreError, UntrustedStoreError
from cache.fingerprint import JSON, Fingerprint, canonical

FORMAT_VERSION = 4
"""Newest version of the format. Older ones are read, repaired and sent; `version_for` says which is written."""

IDS = "id"
"""From version 3 on the name of the array of ids in a Zarr folder, and of the dimension that they label."""

KEY = "feature_store"
"""Name of the object among the attributes of the root group."""

MAX_STORY_BYTES = 32_000
"""Fingerprint and provenance together: HDF5 attributes stay below 64 KiB in the layout that every version reads."""

_ITEM_BYTES = {"float16": 2, "float32": 4, "uint8": 1, "int8": 1, "bfloat16": 2}
DTYPES = tuple(_ITEM_BYTES)
PACKED = {"int8": "float16", "bfloat16": "float32"}
"""Types that features are packed into, from version 4 on, and the type of the numbers that they are made from."""
SCALE, ERROR = ".scale", ".error"
"""What follows a packed tap's name in the names of the arrays beside it."""
_TAP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")
_MAY_BE_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # a surrogate, which alone is no text that can be written anywhere
_RESERVED = {"index", "zarr.json", "readme.md"}
_MAX_ROWS = 10**9
_MAX_SHARD_ROWS = 2**20
_MAX_ROW_BYTES = 2**34
_FEW_CELLS = 4  # of a channel, for which four bytes of scale and one a cell are not less than two a cell
_MAX_TAPS = 64
_MAX_ARRAYS = 128  # with those beside packed taps: HDF5 keeps the description in less than 64 KiB
TEXTS = ("ids", "set_aside", "card", "labels")
"""Index entries that are text of any length; `card` and `labels` are optional."""


@dataclass(frozen=True)
class TapSpec:
    """Shape and type of one tap's feature of one sample.

    Attributes:
        channels: Channels C.
        height: Grid cells h.
        width: Grid cells w.
        dtype: `"float16"` or `"float32"`; `"int8"` for whole numbers with a scale a row and channel; `"bfloat16"`;
            `"uint8"` for pixels and, with one channel, for numbers of regions.
    """

    channels: int
    height: int
    width: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.channels, self.height, self.width

    @property
    def row_bytes(self) -> int:
        """Bytes of one row without its checksum."""
        return self.channels * self.height * self.width * _ITEM_BYTES[self.dtype]

    @property
    def numbers(self) -> str:
        """Type of the numbers that are given to be stored, and read: that of `dtype` itself unless it is packed."""
        return PACKED.get(self.dtype, self.dtype)

    @property
    def array_dtype(self) -> str:
        """Type of the array as every library knows it: the bits of bfloat16 are whole numbers there."""
        return "uint16" if self.dtype == "bfloat16" else self.dtype

    @property
    def holds_pixels(self) -> bool:
        """Whether rows are images."""
        return self.dtype == "uint8" and self.channels != 1

    @property
    def holds_features(self) -> bool:
        """Whether rows are numbers that may be averaged over cells: neither images nor numbers of regions."""
        return self.dtype != "uint8"


def type_for(shape: tuple[int, int, int], dtype: str) -> str:
    """Type that features (C, h, w) are stored in where `dtype` is asked for: no int8 where scales would cost more."""
    few = dtype == "int8" and shape[1] * shape[2] <= _FEW_CELLS
    return PACKED[dtype] if few else dtype


def _beside(name: str, tap: TapSpec) -> dict[str, TapSpec]:
    """The arrays that a store has beside a tap: none unless it is packed."""
    scale = {name + SCALE: TapSpec(tap.channels, 1, 1, "float32")} if tap.dtype == "int8" else {}
    return {**scale, name + ERROR: TapSpec(1, 1, 1, "float16")} if tap.dtype in PACKED else {}


def arrays_of(taps: Mapping[str, TapSpec]) -> dict[str, TapSpec]:
    """The arrays of a store of these taps: each of packed ones is followed by what lies beside it.

    Raises:
        StoreError: A tap has the name of such an array.
    """
    found: dict[str, TapSpec] = {}
    for name, tap in taps.items():
        beside = _beside(name, tap)
        taken = sorted(beside.keys() & taps.keys())
        if taken:
            message = f"tap name {taken[0]!r} is that of an array beside tap {name!r} of type {tap.dtype}; rename it"
            raise StoreError(message)
        found |= {name: tap, **beside}
    return found


def taps_of(arrays: Mapping[str, TapSpec]) -> dict[str, TapSpec]:
    """The taps among the arrays of a store."""
    beside = {name for tap, spec in arrays.items() for name in _beside(tap, spec)}
    return {name: spec for name, spec in arrays.items() if name not in beside}


def version_for(taps: Mapping[str, TapSpec]) -> int:
    """The version that is written: the lowest that can hold the taps, so that older readers read what they can."""
    return FORMAT_VERSION if any(tap.dtype in PACKED for tap in taps.values()) else FORMAT_VERSION - 1


@dataclass(frozen=True)
class IndexEntry:
    """One array of the index: how large it is and what its bytes hash to.

    Attributes:
        dtype: numpy's name of the little-endian element type.
        shape: Shape of the array.
        sha256: Hexadecimal digest of the array's bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Description:
    """Everything at the root of a store.

    Attributes:
        fingerprint: What the features depend on.
        taps: Shapes and types by tap; those beside packed taps are listed as well.
        rows: Samples.
        slots: Places for a feature in each tap's array; `index/slot` says which one a row has.
        shard_rows: Slots in one shard file.
        index: Entries of the index by name, for example `"crc32c/neck"`.
        provenance: Story, not identity: versions, dates, command. Not compared.
        version: Of the format.
    """

    fingerprint: Fingerprint
    taps: Mapping[str, TapSpec]
    rows: int
    slots: int
    shard_rows: int
    index: Mapping[str, IndexEntry]
    provenance: Mapping[str, JSON]
    version: int

    def to_json(self) -> dict[str, JSON]:
        """The object that is stored, with the SHA-256 of everything else in it as `checksum`."""
        body = {
            "format_version": self.version,
            "fingerprint": self.fingerprint.fields,
            "taps": [{"name": name, "shape": list(t.shape), "dtype": t.dtype} for name, t in self.taps.items()],
            "rows": self.rows,
            "slots": self.slots,
            "shard_rows": self.shard_rows,
            "index": {name: {"shape": list(e.shape), "sha256": e.sha256} for name, e in self.index.items()},
            "provenance": self.provenance,
        }
        return {**body, "checksum": hashlib.sha256(canonical(body)).hexdigest()}

    @property
    def checksum(self) -> str:
        """Hexadecimal SHA-256 that identifies this version of the store, features included."""
        return str(self.to_json()["checksum"])


def index_shapes(taps: Mapping[str, TapSpec], rows: int, slots: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Element type and shape of every index array of fixed size, by name."""
    return {
        "slot": ("int64", (rows,)),
        "digest": ("uint8", (slots, 32)),
        "extent": ("float32", (slots, 2)),
        **{f"crc32c/{tap}": ("uint32", (slots,)) for tap in taps},
    }


def check_taps(taps: Mapping[str, TapSpec], version: int = FORMAT_VERSION) -> None:
    """Refuse names and shapes that no store of a version can hold, among all of its arrays.

    Raises:
        UntrustedStoreError: With the tap and what is wrong with it.
    """
    few = 0 < len(taps_of(taps)) <= _MAX_TAPS and len(taps) <= _MAX_ARRAYS
    if not few or len({name.lower() for name in taps}) < len(taps):
        message = (
            f"a store has 1 to {_MAX_TAPS} taps, and with what lies beside packed ones {_MAX_ARRAYS} arrays, whose "
            f"names differ in more than case, not {sorted(taps)!r}"
        )
        raise UntrustedStoreError(message)
    for name, tap in taps.items():
        if not _TAP_NAME.fullmatch(name) or name.lower() in _RESERVED or (version > 2 and name.lower() == IDS):
            message = (
                f"tap name {name!r}: expected 1 to 64 letters, digits or . _ : @ - that begin with a letter or digit, "
                f"and none of {sorted({*_RESERVED, IDS})}"
            )
            raise UntrustedStoreError(message)
        if version < 2 and (not tap.holds_features or "@" in name):
            message = f"tap {name!r} of type {tap.dtype!r} is none of format version 1"
            raise UntrustedStoreError(message)
        if tap.dtype in PACKED and (version < 4 or not _beside(name, tap).items() <= taps.items()):
            message = f"tap {name!r} of type {tap.dtype!r}: none of version {version}, or an array beside it is missing"
            raise UntrustedStoreError(message)
        if tap.dtype not in DTYPES:
            message = f"tap {name!r} has type {tap.dtype!r}; stores hold {', '.join(DTYPES)}"
            raise UntrustedStoreError(message)
        sizes_ok = all(isinstance(size, int) and 0 < size <= _MAX_ROW_BYTES for size in tap.shape)
        if not sizes_ok or tap.row_bytes > _MAX_ROW_BYTES:
            message = f"tap {name!r} has shape {tap.shape!r}; a row has three positive sizes and at most 16 GiB"
            raise UntrustedStoreError(message)


def load_json(data: bytes, where: str) -> JSON:
    """Parse JSON from a stranger: UTF-8, no half of a character, no NaN, no repeated key, of bounded depth.

    Raises:
        FormatError: It is no such JSON; `where` names it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            message = "a key is repeated"
            raise ValueError(message)
        return found

    def refuse(name: str) -> None:
        message = f"{name} is no JSON number"
        raise ValueError(message)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if _MAY_BE_HALF.search(data):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        message = f"{where} is not the JSON of a store ({error}): the file is damaged or not a feature store"
        raise FormatError(message) from error


def parse_description(value: JSON, where: str) -> Description:
    """Check the object at the root of a store and take it apart.

    Args:
        value: The parsed JSON object.
        where: File to name in messages.

    Raises:
        FormatError: A key is missing, unknown or of the wrong type, the checksum does not match, or the format
            version is newer than this software.
        UntrustedStoreError: A shape or a name is one that no store has.
    """
    try:
        version = value["format_version"]
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            message = f"{where} has format version {version!r}, this software reads 1 to {FORMAT_VERSION}: update it"
            raise FormatError(message)
        taps = {_text(t["name"]): _parse_tap(t) for t in value["taps"]}
        check_taps(taps, version)
        rows, slots, shard_rows = (_whole(value[key]) for key in ("rows", "slots", "shard_rows"))
        if not (0 < rows <= _MAX_ROWS and 0 < slots <= _MAX_ROWS and 0 < shard_rows <= _MAX_SHARD_ROWS):
            message = (
                f"{where} claims {rows} rows in {slots} slots, {shard_rows} a shard; expected 1 to {_MAX_ROWS} and "
                f"shards of 1 to {_MAX_SHARD_ROWS}"
            )
            raise UntrustedStoreError(message)
        description = Description(
            fingerprint=Fingerprint(_mapping(value["fingerprint"])),
            taps=taps,
            rows=rows,
            slots=slots,
            shard_rows=shard_rows,
            index=_parse_index(value["index"], taps, rows, slots),
            provenance=_mapping(value["provenance"]),
            version=version,
        )
        same = canonical(value) == canonical(description.to_json())
    except (KeyError, TypeError, ValueError, AttributeError, StoreError) as error:
        if isinstance(error, FormatError | UntrustedStoreError):
            raise
        message = f"{where} does not describe a store ({type(error).__name__}: {error}): it is damaged or no store"
        raise FormatError(message) from error
    if not same:
        message = f"{where} does not match its own checksum: it is damaged or was edited; run repair or fetch it again"
        raise FormatError(message)
    return description


def _parse_index(value: JSON, taps: Mapping[str, TapSpec], rows: int, slots: int) -> dict[str, IndexEntry]:
    """Entries of the index, with exactly the names and shapes that the taps and counts call for."""
    expected = index_shapes(taps, rows, slots)
    entries: dict[str, IndexEntry] = {}
    for name, entry in value.items():
        shape = tuple(map(_whole, entry["shape"]))
        dtype, wanted = expected.get(name, ("uint8", shape))
        if shape != wanted or (name not in expected and (name not in TEXTS or len(shape) != 1)):
            message = f"index entry {name!r} has shape {shape!r}"
            raise ValueError(message)
        entries[name] = IndexEntry(dtype, shape, _text(entry["sha256"]))
    missing = (expected.keys() - {"digest"} | {"ids", "set_aside"}) - entries.keys()
    if missing:
        message = f"index entries {sorted(missing)!r} are missing"
        raise ValueError(message)
    return entries


def _parse_tap(value: JSON) -> TapSpec:
    """Shape and type of one tap."""
    channels, height, width = map(_whole, value["shape"])
    return TapSpec(channels, height, width, _text(value["dtype"]))


def _whole(value: JSON) -> int:
    """`value` if it is a whole number and not a truth value."""
    if type(value) is not int or value < 0:
        message = f"{str(value)[:100]!r} is no whole number"
        raise TypeError(message)
    return value


def _text(value: JSON) -> str:
    """`value` if it is text."""
    if not isinstance(value, str):
        message = f"{str(value)[:100]!r} is no text"
        raise TypeError(message)
    return value


def _mapping(value: JSON) -> dict[str, JSON]:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        message = f"{str(value)[:100]!r} is no JSON object"
        raise TypeError(message)
    return value
