"""What an extraction changed: samples that came, went, got another name or other pixels, and those that stayed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cache

WHAT = ("added", "changed", "renamed", "removed", "reused")


def rows_of(path: Path) -> Mapping[str, bytes] | None:
    """The digest of each row's pixels, by id; None where there is no store that can be read, or it tells no digests."""
    try:
        with cache.open_store(path) as store:
            ids, digests = store.ids, store.digests
    except (cache.StoreError, OSError):
        return None
    return {name: digests[row].tobytes() for row, name in enumerate(ids)} if len(digests) else None


def count_changes(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> dict[str, int]:
    """Count what happened to samples between two versions of a store.

    Args:
        before: Digest of the pixels by id.
        after: The same.

    Returns:
        By `WHAT`: `renamed` has the pixels of a row that is not there any more, `changed` has its id and other pixels,
        `reused` has both; a sample with known pixels and a further name is `added`.
    """
    gone = {name: digest for name, digest in before.items() if name not in after}
    left = list(gone.values())
    counts = dict.fromkeys(WHAT, 0)
    for name, digest in after.items():
        if name in before:
            counts["reused" if before[name] == digest else "changed"] += 1
        elif digest in left:
            left.remove(digest)
            counts["renamed"] += 1
        else:
            counts["added"] += 1
    counts["removed"] = len(left)
    return counts
