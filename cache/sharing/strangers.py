"""What whoever has a store learns from it beside features: names, folders, digests of pixels, images, labels."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cache.reading.reader import Store

_PSEUDONYM = re.compile(r"[0-9a-f]{32}")  # as `convert.keyed_pseudonyms` makes them
_SHOWN = 3  # ids and folders that stand for all


def are_pseudonyms(ids: Sequence[str]) -> bool:
    """Whether ids look like keyed digests; nobody without the key can be sure."""
    return bool(ids) and all(_PSEUDONYM.fullmatch(name) for name in ids)


def what_strangers_read(store: Store, *, labels: bool = False) -> list[str]:
    """Say what a store gives away beside its features; of one whose ids are pseudonyms only what was to be gone.

    Args:
        store: The store.
        labels: Whether labels are to travel with it that it has not on board yet.
    """
    if not len(store):
        return []
    removed = (
        [f"{store.removed} rows of samples that were removed or changed; `store convert` leaves them behind"]
        if store.removed
        else []
    )
    if are_pseudonyms(store.ids):
        return removed
    said = [f"{len(store)} ids as they are, such as {', '.join(store.ids[:_SHOWN])}"]
    folders = sorted({name.rsplit("/", 1)[0] for name in store.ids if "/" in name})
    if folders:
        said.append(f"the folders in them, which may be diagnoses: {', '.join(folders[:_SHOWN])}")
    if len(store.digests):
        said.append("digests of the pixels, by which whoever has an image finds it again")
    if any(tap.holds_pixels for tap in store.taps.values()):
        said.append("the images themselves")
    if any(tap.dtype == "uint8" and not tap.holds_pixels for tap in store.taps.values()):
        said.append("outlines of what was found in the images")
    if labels or store.labels is not None:
        said.append("labels and splits")
    return said + removed
