"""A second copy of everything but the rows, so that no damage to metadata costs a feature.

It is an array of the index like any other to plain libraries; readers may ignore it, `repair` reads it when the
description or an index array is damaged. It lies where the first copy does not: in a file of its own (Zarr) or at the
other end of the file (HDF5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import KEY, Description, load_json, parse_description
from cache.errors import FormatError, StoreError
from cache.fingerprint import canonical
from cache.index import UInt8

SPARE = "spare"
MAGIC = b"feature-store spare\n"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Spare:
    """What the second copy holds.

    Attributes:
        description: The store's description.
        arrays: Index arrays by name.
        offsets: First byte of each tap's rows in an HDF5 file, empty in a folder.
    """

    description: Description
    arrays: Mapping[str, npt.NDArray[Any]]
    offsets: Mapping[str, int]


def encode_spare(description: Description, arrays: Mapping[str, npt.NDArray[Any]], offsets: Mapping[str, int]) -> UInt8:
    """The copy as (bytes,) uint8: magic line, JSON line, arrays in order of their names, SHA-256 of all that."""
    head = _head(description, offsets)
    body = b"".join([head, *(np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(description.index))])
    return np.frombuffer(body + hashlib.sha256(body).digest(), np.uint8)


def _head(description: Description, offsets: Mapping[str, int]) -> bytes:
    """The first two lines of the copy."""
    places = {name: offset for name, offset in offsets.items() if name in description.taps}
    return MAGIC + canonical({KEY: description.to_json(), "offsets": places}) + b"\n"


def spare_bytes(description: Description) -> int:
    """Size of the copy in a Zarr folder."""
    return len(_head(description, {})) + sum(e.size_bytes for e in description.index.values()) + _DIGEST_BYTES


def decode_spare(data: UInt8, where: str) -> Spare:
    """Take a copy apart.

    Args:
        data: (bytes,) uint8, from its first byte on; more may follow.
        where: File to name in messages.

    Raises:
        FormatError: It is damaged too.
    """
    line = data[: 1 << 20].tobytes().split(b"\n", 2)
    if len(line) < 3 or line[0] + b"\n" != MAGIC:
        message = f"{where}: the second copy of the metadata is damaged too"
        raise FormatError(message)
    value = load_json(line[1], where)
    try:
        description = parse_description(value[KEY], where)
        offsets = {str(name): int(offset) for name, offset in value["offsets"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, StoreError) as error:
        message = f"{where}: the second copy of the metadata is damaged too ({error})"
        raise FormatError(message) from error
    start = len(MAGIC) + len(line[1]) + 1
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in sorted(description.index):
        entry = description.index[name]
        part = np.array(data[start : start + entry.size_bytes])
        start += entry.size_bytes
        if part.nbytes != entry.size_bytes or hashlib.sha256(part.data).hexdigest() != entry.sha256:
            message = f"{where}: the second copy of {name!r} is damaged too"
            raise FormatError(message)
        arrays[name] = part.view(np.dtype(entry.dtype).newbyteorder("<")).reshape(entry.shape)
    return Spare(description, arrays, offsets)
