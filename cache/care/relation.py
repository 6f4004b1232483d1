"""Whether two stores have to do with each other: one must not take another's place by mistake."""

from __future__ import annotations

import numpy as np

from cache.errors import StoreError
from cache.reading.reader import Store


def have_a_row_in_common(one: Store, other: Store) -> bool:
    """Whether a row of two stores is of the same pixels, or of the same id where one of them tells no digests."""
    if len(one.digests) and len(other.digests):
        first, second = (np.ascontiguousarray(store.digests).view(np.uint64)[:, 0] for store in (one, other))
        return bool(np.isin(first, second).any())
    return not set(one.ids).isdisjoint(other.ids)


def refuse_another(held: Store, coming: Store, remedy: str) -> None:
    """Refuse to put a store in the place of one of which not one row would be kept.

    Args:
        held: What is there.
        coming: What would take its place.
        remedy: What to do instead.

    Raises:
        StoreError: They have no row in common.
    """
    if len(held) and not have_a_row_in_common(held, coming):
        message = (
            f"{held.path} holds {len(held)} rows, and none of the {len(coming)} that would take their place is among "
            f"them: it seems to be another data set's. {remedy}"
        )
        raise StoreError(message)
