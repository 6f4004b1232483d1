"""Everything that stored numbers depend on, compared leaf by leaf.

A fingerprint is a tree of JSON values. Two stores hold the same function of their images exactly if their fingerprints
are equal, so equality is decided on one canonical spelling (`canonical`) and a difference is named by its path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cache.errors import Difference, StoreError

JSON = Any
"""A JSON value: None, bool, int, float, str, list or tuple of them, mapping from str to them."""

_MAX_DEPTH = 32
MISSING = "(absent)"
"""What a `Difference` shows for a field that one side does not have."""


def canonical(value: JSON) -> bytes:
    """One spelling for equal JSON values: sorted keys, no spaces, ASCII.

    Raises:
        StoreError: `value` is not JSON, or holds a number that is not finite.
    """
    try:
        text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"{str(value)[:200]!r} cannot be written as JSON ({error}); use text, finite numbers, lists, mappings"
        raise StoreError(message) from error
    return text.encode("ascii")


def _plain(value: JSON, depth: int = 0) -> JSON:
    """Mappings as dicts with text keys, sequences as lists; leaves as they are."""
    if depth > _MAX_DEPTH:
        message = f"nested deeper than {_MAX_DEPTH}"
        raise ValueError(message)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                message = f"key {key!r} is no text"
                raise TypeError(message)
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value


@dataclass(frozen=True)
class Fingerprint:
    """What stored features depend on apart from the source pixels: encoder, weights, preprocessing, precision, taps.

    Attributes:
        fields: A tree of JSON values. It is copied, so later changes to the argument do not reach the fingerprint.
    """

    fields: Mapping[str, JSON]

    def __post_init__(self) -> None:
        """Copy the fields through JSON, so that tuples and lists are one."""
        object.__setattr__(self, "fields", json.loads(canonical(self.fields)))

    def __hash__(self) -> int:
        """Hash the canonical spelling; mappings have no hash of their own."""
        return hash(canonical(self.fields))

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical(self.fields)).hexdigest()

    def differences(self, other: Fingerprint) -> tuple[Difference, ...]:
        """The leaves in which this fingerprint and `other` differ, in order of their names."""
        ours, theirs = dict(_leaves(self.fields)), dict(_leaves(other.fields))
        return tuple(
            Difference(field, ours.get(field, MISSING), theirs.get(field, MISSING))
            for field in sorted(ours.keys() | theirs.keys())
            if field not in ours or field not in theirs or canonical(ours[field]) != canonical(theirs[field])
        )


def _leaves(tree: Mapping[str, JSON], prefix: str = "") -> Iterator[tuple[str, JSON]]:
    """Every value that is no non-empty mapping, with its dotted path."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
