"""What an extraction changed: samples that came, went, got another name or other pixels, and those that stayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import cache

WHAT = ("added", "changed", "renamed", "removed", "reused")


@dataclass(frozen=True)
class Held:
    """What a store holds at one time.

    Attributes:
        version: Of the store; equal for equal content.
        ids: Of its rows.
        digests: (rows, 32) uint8 SHA-256 of their pixels; None where nothing is held.
    """

    version: str = ""
    ids: tuple[str, ...] = ()
    digests: npt.NDArray[np.uint8] | None = None

    @classmethod
    def by(cls, path: Path) -> Held:
        """What is held there; nothing where there is no store that can be read, or it tells no digests."""
        try:
            with cache.open_store(path) as store:
                digests = store.digests
                return cls(store.version, store.ids, digests) if len(digests) else cls()
        except (cache.StoreError, OSError):
            return cls()

    def changes_to(self, after: Held) -> dict[str, int]:
        """Samples by what happened to them until later; see `count_changes`."""
        if self.version == after.version:
            return {**dict.fromkeys(WHAT, 0), "reused": len(after.ids)}
        return count_changes(self._by_id(), after._by_id())

    def _by_id(self) -> dict[str, bytes]:
        return {} if self.digests is None else dict(zip(self.ids, map(bytes, self.digests), strict=True))


def count_changes(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> dict[str, int]:
    """Count what happened to samples between two versions of a store.

    Args:
        before: Digest of the pixels by id.
        after: The same.

    Returns:
        By `WHAT`: `renamed` has the pixels of a row that is not there any more, `changed` has its id and other pixels,
        `reused` has both; a sample with known pixels and a further name is `added`.
    """
    left = Counter(digest for name, digest in before.items() if name not in after)
    counts = dict.fromkeys(WHAT, 0)
    for name, digest in after.items():
        if name in before:
            counts["reused" if before[name] == digest else "changed"] += 1
        elif left[digest]:
            left[digest] -= 1
            counts["renamed"] += 1
        else:
            counts["added"] += 1
    counts["removed"] = left.total()
    return counts
