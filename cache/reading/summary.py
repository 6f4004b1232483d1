"""A store in a few lines, as it shows itself in a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cache.errors import StoreError

if TYPE_CHECKING:
    from cache.reading.reader import Store

_LONGEST = 100  # characters of anything that a stranger may have written
_SPLITS = ("train", "val", "test")


def summarise(store: Store) -> str:
    """Say what a store holds; text that came with it is quoted, so that nothing in it acts on a terminal.

    A store that is damaged or was replaced says so in place of what it holds: a representation never fails.
    """
    try:
        return "\n".join(_lines(store))
    except (StoreError, OSError) as error:
        return f"Store({str(store.path)!r}), which cannot be read: {_brief(str(error))}"


def _lines(store: Store) -> Iterator[str]:
    taps, fields = store.taps, store.fingerprint.fields
    size = len(store) * sum(array.row_bytes for array in store.arrays.values())
    yield f"Store({str(store.path)!r}): {len(store)} rows, {_spell_bytes(size)} uncompressed"
    wide = max(map(len, (*taps, "encoder", "labels")))
    yield f"  {'encoder':{wide}}  {_brief(fields.get('encoder', 'unknown'))}"
    for name, tap in taps.items():
        yield f"  {name:{wide}}  {tap.shape} {tap.dtype}"
    shown = ", ".join(_brief(name) for name in store.ids[:2])
    yield f"  {'ids':{wide}}  {shown}{', ...' if len(store) > 2 else ''}"
    labels = store.labels
    if labels is None:
        yield f"  {'labels':{wide}}  none travel with it"
        return
    counts = Counter(labels.splits)
    splits = ", ".join(f"{split} {counts[split]}" for split in _SPLITS if counts[split])
    names = ", ".join(_brief(name) for name in labels.class_names[:8])
    yield f"  {'labels':{wide}}  {names}{', ...' if len(labels.class_names) > 8 else ''}; {splits}"


def _brief(value: object) -> str:
    said = repr(value)
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


def _spell_bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
