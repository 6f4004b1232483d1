"""The index of a store in memory: which sample lies where, with what checksum, from which pixels.

Row arrays (`ids`, `slot`) say what the store holds and in which order; slot arrays (`digest`, `extent`, `crc32c/TAP`)
say what lies at a place, whoever uses it. Samples with identical pixels share a slot; a slot that no row uses is dead
but stays described, so its bytes remain checked and its feature can be taken up again. A slot whose extent is (0, 0)
holds nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cache.description import Description, IndexEntry
from cache.errors import FormatError, StoreError, UntrustedStoreError
from cache.fingerprint import JSON, canonical

UInt8 = npt.NDArray[np.uint8]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Row:
    """One sample of a store.

    Attributes:
        id: Non-empty text without control characters, unique in the store.
        digest: SHA-256 of the source pixels, 32 bytes.
    """

    id: str
    digest: bytes


def check_rows(rows: Sequence[Row]) -> None:
    """Refuse rows that no store can hold.

    Raises:
        StoreError: There are none, an id is empty, repeated or has control characters, or a digest is not 32 bytes.
    """
    if not rows:
        message = "a store needs at least one row, got none: check that the data set is not empty"
        raise StoreError(message)
    seen: set[str] = set()
    for row in rows:
        if not _good_id(row.id):
            message = f"row id {row.id!r}: expected non-empty text without control characters; rename the sample"
            raise StoreError(message)
        if row.id in seen:
            message = f"row id {row.id!r} occurs twice; ids must be unique"
            raise StoreError(message)
        if len(row.digest) != 32:
            message = f"row {row.id!r} has a digest of {len(row.digest)} bytes; expected the 32 of a SHA-256"
            raise StoreError(message)
        seen.add(row.id)


def _good_id(name: str) -> bool:
    """Whether an id is text that one line of UTF-8 can hold."""
    return bool(name) and not _has_controls(name) and name.encode("utf-8", "ignore").decode() == name


def _has_controls(text: str) -> bool:
    """Whether there are control characters in a text."""
    return not text.isprintable() and _CONTROL.search(text) is not None


def encode_ids(ids: Sequence[str]) -> UInt8:
    """Ids as (bytes,) uint8: UTF-8, one a line, no newline at the end."""
    return np.frombuffer("\n".join(ids).encode("utf-8"), np.uint8)


def encode_json(value: JSON) -> UInt8:
    """A JSON value as (bytes,) uint8 in its canonical spelling."""
    return np.frombuffer(canonical(value), np.uint8)


class Index:
    """The index arrays of one store, loaded and checked one by one when first used.

    Attributes:
        description: What the root of the store says; every array is checked against it.
    """

    def __init__(
        self,
        description: Description,
        load: Callable[[str], UInt8],
        where: str,
        replaced: Callable[[], bool] = lambda: False,
    ) -> None:
        """Describe where the arrays come from.

        Args:
            description: Shapes and digests of the arrays.
            load: Gives the bytes of an entry as (bytes,) uint8, of exactly the described size.
            where: The store, for messages.
            replaced: Whether another version has taken the store's place, so that what is read now is not its own.
        """
        self.description = description
        self._load = load
        self._where = where
        self._replaced = replaced
        self._checksums: dict[str, npt.NDArray[np.uint32]] = {}

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """An entry of the index, read-only.

        Raises:
            FormatError: Its bytes are not the ones that were written.
            StoreError: Another version has taken the store's place.
        """
        try:
            return self._checked(name)
        except StoreError:
            if self._replaced():
                message = f"{self._where} was replaced by another version since it was opened; open it again"
                raise StoreError(message) from None
            raise

    def _checked(self, name: str) -> npt.NDArray[np.generic]:
        """An entry whose bytes are the ones that were written."""
        entry = self.description.index[name]
        data = self._load(name)
        if data.nbytes != entry.size_bytes or hashlib.sha256(data.data).hexdigest() != entry.sha256:
            message = (
                f"{self._where}: the index entry {name!r} is damaged (its SHA-256 does not match); "
                f"run 'store repair' or fetch the store again"
            )
            raise FormatError(message)
        array = data.view(np.dtype(entry.dtype).newbyteorder("<")).reshape(entry.shape)
        array.flags.writeable = False
        return array

    def text(self, name: str) -> str:
        """An entry of the index that is text; empty if the store does not have it."""
        if name not in self.description.index:
            return ""
        try:
            return self.array(name).tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"{self._where}: the index entry {name!r} is not UTF-8 ({error}); the store is not trustworthy"
            raise UntrustedStoreError(message) from error

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Sample ids in row order."""
        text = self.text("ids")
        ids = tuple(text.split("\n"))
        different = len(ids) == len(set(ids)) == self.description.rows
        if not different or not all(ids) or _has_controls(text.replace("\n", "")):
            message = f"{self._where}: the ids are not {self.description.rows} different names"
            raise UntrustedStoreError(message)
        return ids

    @cached_property
    def slot(self) -> npt.NDArray[np.int64]:
        """(rows,) int64: where each row lies."""
        slot = self.array("slot").astype(np.int64, copy=False)
        if slot.min() < 0 or slot.max() >= self.description.slots or not self.present[slot].all():
            message = f"{self._where}: a row points at a slot that does not exist or holds nothing"
            raise UntrustedStoreError(message)
        return slot

    @cached_property
    def extent(self) -> npt.NDArray[np.float32]:
        """(slots, 2) float32 in (0, 1]: part of the grid's height and width that is image; (0, 0) at empty slots."""
        extent = self.array("extent").astype(np.float32, copy=False)
        inside = (extent > 0) & (extent <= 1)
        if not (inside.all(1) | (extent == 0).all(1)).all():
            message = f"{self._where}: an extent lies outside (0, 1]"
            raise UntrustedStoreError(message)
        return extent

    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        """(slots,) whether a slot holds a row, used or dead."""
        return self.extent[:, 0] > 0

    @cached_property
    def digest(self) -> UInt8 | None:
        """(slots, 32) uint8 SHA-256 of the source pixels, or None if the store does not tell."""
        if "digest" not in self.description.index:
            return None
        return self.array("digest").astype(np.uint8, copy=False)

    def checksums(self, tap: str) -> npt.NDArray[np.uint32]:
        """(slots,) uint32 crc32c of each slot's row of a tap."""
        if tap not in self._checksums:
            self._checksums[tap] = self.array(f"crc32c/{tap}").astype(np.uint32, copy=False)
        return self._checksums[tap]

    @cached_property
    def set_aside(self) -> tuple[Mapping[str, str], ...]:
        """Samples that were asked for but have no row: mappings with `id`, `digest` (hexadecimal) and `reason`."""
        from cache.description import load_json

        found = load_json(self.text("set_aside").encode(), f"{self._where}: set_aside")
        keys = {"id", "digest", "reason"}
        if not isinstance(found, list) or not all(
            isinstance(item, dict) and item.keys() == keys and all(isinstance(v, str) for v in item.values())
            for item in found
        ):
            message = f"{self._where}: the list of samples set aside is malformed"
            raise UntrustedStoreError(message)
        return tuple(found)


def index_of(description: Description, arrays: Mapping[str, npt.NDArray[np.generic]], where: str) -> Index:
    """An index over arrays in memory."""

    def load(name: str) -> UInt8:
        return np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)

    return Index(description, load, where)


def describe_entry(array: npt.NDArray[np.generic]) -> IndexEntry:
    """The entry that describes an array of the index."""
    return IndexEntry(array.dtype.name, array.shape, hashlib.sha256(np.ascontiguousarray(array).data).hexdigest())


def check_size(entry: IndexEntry, size: int, where: str) -> None:
    """Refuse an index file of another size than described, before memory is taken for it."""
    if size != entry.size_bytes:
        message = f"{where} has {size} bytes where {entry.size_bytes} are described; it is damaged or truncated"
        raise FormatError(message)
