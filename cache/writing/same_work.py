"""What two runs must share to work on the same store, and the words for where they do not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.description import TapSpec
from cache.errors import Difference, FingerprintMismatchError
from cache.fingerprint import JSON, Fingerprint
from cache.index import Index, Row

_SHOWN = 8
REPLACE = "choose another path to keep both, or replace it (replace=True, --replace)"


@dataclass(frozen=True)
class Identity:
    """What a run must share with an interrupted one to continue it.

    Attributes:
        fingerprint: What the features depend on.
        taps: Shapes and types.
        provenance: The story told by the run that began; not compared.
        rows_sha256: Digest of the ids and pixel digests in order.
    """

    fingerprint: Fingerprint
    taps: Mapping[str, TapSpec]
    provenance: Mapping[str, JSON]
    rows_sha256: str

    def require(self, fingerprint: Fingerprint, taps: Mapping[str, TapSpec], where: Path, remedy: str) -> None:
        """Refuse features that were computed in another way.

        Raises:
            FingerprintMismatchError: With the fields that differ, and `remedy`.
        """
        found = self.differences(fingerprint, taps)
        if found:
            message = f"{where} holds features of another fingerprint ({spell(found)}); {remedy}"
            raise FingerprintMismatchError(message, found)

    def differences(self, fingerprint: Fingerprint, taps: Mapping[str, TapSpec]) -> tuple[Difference, ...]:
        """Fields of a stored fingerprint that differ from ours; shapes of taps count as fields."""
        stored = Fingerprint({"fields": fingerprint.fields, "stored": _shapes(taps)})
        wanted = Fingerprint({"fields": self.fingerprint.fields, "stored": _shapes(self.taps)})
        return tuple(
            Difference(found.field.removeprefix("fields."), found.ours, found.theirs)
            for found in stored.differences(wanted)
        )


def _shapes(taps: Mapping[str, TapSpec]) -> dict[str, JSON]:
    return {name: {"shape": tap.shape, "dtype": tap.dtype} for name, tap in taps.items()}


def spell(differences: Sequence[Difference]) -> str:
    """Differing fields as a person reads them; `ours` is what is stored."""
    shown = [f"{found.field} is {found.ours!r} there and {found.theirs!r} here" for found in differences[:_SHOWN]]
    more = len(differences) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def rows_sha256(rows: Sequence[Row]) -> str:
    """Digest that tells two lists of rows apart."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.id.encode() + b"\n" + row.digest)
    return digest.hexdigest()


def holds(index: Index, rows: Sequence[Row], *, also_set_aside: bool = False) -> bool:
    """Whether a store holds exactly these rows.

    Args:
        index: Of the store.
        rows: The rows, in order.
        also_set_aside: Whether a sample that the store has set aside counts as held; else it is to be tried again.
    """
    if index.digest is None or (index.set_aside and not also_set_aside):
        return False
    bad = {(item["id"], item["digest"]) for item in index.set_aside}
    good = [row for row in rows if (row.id, row.digest.hex()) not in bad] if bad else rows
    if tuple(row.id for row in good) != index.ids:
        return False
    wanted = np.frombuffer(b"".join(row.digest for row in good), np.uint8).reshape(-1, 32)
    return bool((index.digest[index.slot] == wanted).all())
