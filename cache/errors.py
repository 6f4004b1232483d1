"""What can go wrong with a store, each with a message that says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One field in which two fingerprints differ.

    Attributes:
        field: Path of the leaf, joined by dots: `"taps.neck.pool"`.
        ours: Value in the fingerprint whose `differences` was called, `fingerprint.MISSING` if it has none.
        theirs: Value in the other one.
    """

    field: str
    ours: Any
    theirs: Any


class StoreError(Exception):
    """Root of the errors of this package; every other error of a store is one.

    Attributes:
        exit_status: What a command returns to the shell for it.
    """

    exit_status = 1


class StoreNotFoundError(StoreError):
    """There is no finished store at that path."""


class FormatError(StoreError):
    """The file or folder is not a store, is of an unknown version, or its metadata are damaged."""


class UntrustedStoreError(StoreError):
    """The store asks for something a store never needs: a link out of its folder, another codec, a huge shape."""


class FingerprintMismatchError(StoreError):
    """The stored features were computed in another way than the one asked for.

    Attributes:
        differences: The fields that differ.
    """

    def __init__(self, message: str, differences: Sequence[Difference] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class DamagedRowError(StoreError):
    """Stored bytes are not the bytes that were written.

    Attributes:
        ids: Ids of the samples whose features are damaged, in the order they were asked for.
    """

    def __init__(self, message: str, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)  # none where torch's loader hands on what a worker raised, by its message alone

    def __reduce__(self) -> tuple[type[DamagedRowError], tuple[str, tuple[str, ...]]]:
        """Keep the ids when a worker process hands the error to its parent."""
        return type(self), (str(self), self.ids)


class NoSuchRowError(StoreError, IndexError):
    """A row or a sample was asked for that the store does not have.

    It is an `IndexError` too, so that whatever walks over a sequence ends where the store does.
    """


class StoreLockedError(StoreError):
    """Another writer is at work on the same store."""


class NoSpaceError(StoreError):
    """The disk, the quota or the file-size limit is used up."""


class IncompleteRowsError(StoreError):
    """A store was to be finished before all of its rows were written."""
