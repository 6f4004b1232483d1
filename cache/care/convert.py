"""A store as another store: other format, fewer taps, coarser pool, another type, pseudonyms, labels on board."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import PACKED, TapSpec, arrays_of, type_for
from cache.durable import write_file
from cache.errors import StoreError
from cache.fingerprint import JSON, Fingerprint
from cache.index import Row
from cache.labels import Labels
from cache.packing import pack
from cache.progress import Progress, silent
from cache.reading.reader import Store, open_store
from cache.writing.writer import create_store

_PUBLIC = ("license", "data_set", "citation", "created")
"""Provenance that names no person, file or machine."""


def convert_store(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    taps: Sequence[str] | None = None,
    pool: int | Mapping[str, int] = 1,
    dtype: str | Mapping[str, str] | None = None,
    fingerprint: Fingerprint | None = None,
    pseudonym: Callable[[str], str] | None = None,
    labels: Labels | None = None,
    shard_mib: float = 64,
    progress: Progress = silent,
) -> Store:
    """Write a store again in another way; rows keep their order, or have that of their pseudonyms.

    Args:
        source: The store to read.
        target: The store to write, in the format of its suffix.
        taps: Taps to keep, in this order; all by default.
        pool: Side of the windows, in grid cells, that are averaged, trailing cells that fill no window left out. Rows
            are those of an extraction with the coarser pool, bit for bit, where no prime factor of this one is smaller
            than one of the source's own pool: see `pool_steps`. Images and maps of regions (taps of type uint8) stay
            as they are, and so do those that a mapping does not name.
        dtype: Type to store features in (see `cache.type_for`), or that of each tap that is named; None for their own.
            Whether the result is the store that an encoder would have filled is told by `cache.Roundings`.
        fingerprint: What the result is to be taken for. Needed where taps, pool or type change, because only the caller
            knows how the encoder would have named that; else the source's.
        pseudonym: Gives the id to use instead of an id. Then the digests of the source pixels, the samples set aside
            and whatever provenance might name files stay behind too, and images may not be among the taps.
        labels: Class names, labels and splits to send along. None: those of the source; with pseudonyms none.
        shard_mib: See `create_store`.
        progress: Called after each shard.

    Returns:
        The new store.

    Raises:
        DamagedRowError: A row of the source is damaged.
        StoreError: A tap is unknown, the pool is larger than a grid or the features are packed already, a number is
            too large for the type, the fingerprint is missing, or images would go along with pseudonyms.
    """
    store = open_store(source)
    names = tuple(store.taps) if taps is None else tuple(taps)
    if (pool != 1 or names != tuple(store.taps) or dtype is not None) and fingerprint is None:
        message = (
            f"{os.fspath(source)}: other taps, another pool or type are another fingerprint; give the one they have"
        )
        raise StoreError(message)
    pools = {name: pool if isinstance(pool, int) else pool.get(name, 1) for name in names}
    types = dtype if isinstance(dtype, Mapping) else dict.fromkeys(names, dtype)
    specs = {name: _converted_spec(store, name, pools[name], types.get(name)) for name in names}
    if pseudonym is not None:
        _refuse_pixels(source, specs)
    if labels is None and pseudonym is None:
        labels = store.labels
    if labels is not None:
        labels.check(len(store))
    rows, reasons = _rows(store, pseudonym)
    source_of = list(range(len(rows)))
    if pseudonym is not None:  # the order of the names tells whose each row is
        source_of.sort(key=lambda row: rows[row].id)
        rows = [rows[row] for row in source_of]
        labels = None if labels is None else labels.select(source_of)
    all_extents = store.extents
    with create_store(
        target,
        fingerprint=fingerprint or store.fingerprint,
        taps=specs,
        rows=rows,
        provenance=_story(store.provenance, pseudonym is not None),
        shard_mib=shard_mib,
        labels=None if labels is None else labels.with_blanks(len(rows) - len(store)),
        digests=pseudonym is None and len(store.digests) > 0,
    ) as writer:
        for done, plan in enumerate(writer.pending):
            stored = [source_of[row] for row in plan.rows if row not in reasons]
            blank = [plan.rows.index(row) for row in plan.rows if row in reasons]
            extents = np.insert(all_extents[stored], _gaps(blank), 1.0, axis=0)
            arrays: dict[str, npt.NDArray[Any]] = {}
            for name in names:
                arrays |= _converted(store, stored, name, specs[name], _pool_of(store.taps[name], pools[name]))
            filled = {name: np.insert(array, _gaps(blank), 0, axis=0) for name, array in arrays.items()}
            writer.write(plan, filled, extents, {row: reasons[row] for row in plan.rows if row in reasons})
            progress("convert", done + 1, len(writer.pending))
        return writer.commit()


def _refuse_pixels(source: str | os.PathLike[str], taps: Mapping[str, TapSpec]) -> None:
    """Refuse to hide who is who while the images tell."""
    pixels = [name for name, tap in taps.items() if tap.holds_pixels]
    if pixels:
        message = (
            f"{os.fspath(source)}: tap {pixels[0]!r} holds images, which may identify people whatever their ids are; "
            f"name the other taps to keep, and the fingerprint that they have"
        )
        raise StoreError(message)


def _pool_of(tap: TapSpec, pool: int) -> int:
    """The pool that a tap takes part in: images and maps of regions do not."""
    return pool if tap.holds_features else 1


def _gaps(places: Sequence[int]) -> list[int]:
    """Where `np.insert` has to put rows for them to end at `places`."""
    return [place - before for before, place in enumerate(places)]


def _converted_spec(store: Store, name: str, pool: int, dtype: str | None) -> TapSpec:
    """Shape and type of a tap after the conversion."""
    if name not in store.taps:
        message = f"{store.path} has no tap {name!r}; it has {', '.join(map(repr, store.taps))}"
        raise StoreError(message)
    tap = store.taps[name]
    pool = _pool_of(tap, pool)
    if not 1 <= pool <= min(tap.height, tap.width):
        message = f"pool {pool!r} does not fit the grid of tap {name!r}, {tap.height} x {tap.width} cells"
        raise StoreError(message)
    if pool != 1 and tap.dtype in PACKED:
        message = (
            f"{store.path}: features of type {tap.dtype} are rounded already, and their averages are not those of an "
            f"encoder with a coarser pool; pool the store that they were made from, or extract with the pool"
        )
        raise StoreError(message)
    shape = tap.channels, tap.height // pool, tap.width // pool
    return TapSpec(*shape, type_for(shape, dtype) if dtype is not None and tap.holds_features else tap.dtype)


def _converted(store: Store, rows: Sequence[int], name: str, spec: TapSpec, pool: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one tap for some rows, by name; those of a tap that stays as it is, are copied."""
    if spec == store.taps[name]:
        return store.read(rows, tuple(arrays_of({name: spec})), dtype="stored")
    numbers = _pool(store.read(rows, [name])[name], pool)
    with np.errstate(over="ignore"):
        found = numbers.astype(spec.numbers, copy=False)
    if np.isinf(found).any() and np.isfinite(numbers).all():
        message = f"{store.path}: a number of tap {name!r} is too large for {spec.numbers}; keep the type that it has"
        raise StoreError(message)
    return pack(name, spec, found)


def pool_steps(pool: int) -> tuple[int, ...]:
    """The prime factors of a pool, smallest first: the sides of the windows that are averaged one after the other.

    A pool goes in steps, and its result is rounded to the stored type after each, so that a store made coarser in two
    conversions, or in one, or by the encoder, is the same store. The mean of a window is in float32: the sum over its
    rows from the first to the last, then over the columns, times the float32 next to 1 / cells.
    """
    smallest = next((factor for factor in range(2, pool + 1) if pool % factor == 0), None)
    return () if smallest is None else (smallest, *pool_steps(pool // smallest))


def _pool(features: npt.NDArray[Any], pool: int) -> npt.NDArray[Any]:
    """Mean over windows of `pool` x `pool` cells: (n, C, h, w) to (n, C, h // pool, w // pool), of the same type."""
    rows, columns = (side // pool * pool for side in features.shape[2:])
    features = features[:, :, :rows, :columns]
    for step in pool_steps(pool):
        sums = reduce(np.add, [features[:, :, i::step].astype(np.float32) for i in range(step)])
        sums = reduce(np.add, [sums[..., i::step] for i in range(step)])
        features = (sums * np.float32(1 / step**2)).astype(features.dtype)
    return features


def _rows(store: Store, pseudonym: Callable[[str], str] | None) -> tuple[list[Row], dict[int, str]]:
    """Rows of the new store, and the reasons of those that are set aside, by row."""
    digests = store.digests
    if pseudonym is not None or not len(digests):
        source = store.version.encode()  # of other content, nothing that an interrupted run has written is taken over
        stand_ins = [hashlib.sha256(b"%b slot %d" % (source, slot)).digest() for slot in store.slots.tolist()]
        rename = pseudonym or str
        return [Row(rename(name), digest) for name, digest in zip(store.ids, stand_ins, strict=True)], {}
    rows = [Row(name, digest.tobytes()) for name, digest in zip(store.ids, digests, strict=True)]
    aside = store.set_aside_rows
    reasons = {len(rows) + i: store.set_aside[row.id] for i, row in enumerate(aside)}
    return [*rows, *aside], reasons


def _story(provenance: Mapping[str, JSON], public: bool) -> dict[str, JSON]:
    return {key: value for key, value in provenance.items() if not public or key in _PUBLIC}


def keyed_pseudonyms(ids: Sequence[str], key: bytes) -> dict[str, str]:
    """A pseudonym for every id: 32 hexadecimal digits of HMAC-SHA-256, the same for the same key and id.

    Raises:
        StoreError: The key is shorter than 16 bytes, so that pseudonyms could be guessed.
    """
    if len(key) < 16:
        message = f"the key has {len(key)} bytes; use at least 16 random ones, for example from secrets.token_bytes(32)"
        raise StoreError(message)
    return {name: hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:32] for name in ids}


def pseudonymise_store(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    key: bytes,
    mapping: str | os.PathLike[str],
    taps: Sequence[str] | None = None,
    fingerprint: Fingerprint | None = None,
    labels: Labels | None = None,
    progress: Progress = silent,
) -> Store:
    """Write a copy of a store that names no sample, and the list of who is who into a file that stays at home.

    Args:
        source: The store.
        target: The copy.
        key: At least 16 secret bytes; with the same key the same sample has the same pseudonym in every store.
        mapping: CSV file to write, `pseudonym,id`; readable by its owner alone, and inside neither store.
        taps: See `convert_store`; images must not be among them.
        fingerprint: See `convert_store`.
        labels: Class names, labels and splits to send along; the groups get pseudonyms, too.
        progress: See `convert_store`.

    Raises:
        StoreError: The key is too short, the mapping would lie inside a store, or images are among the taps.
    """
    listing = Path(os.path.realpath(mapping))
    for place in (source, target):
        if listing.is_relative_to(os.path.realpath(place)):
            message = f"{os.fspath(mapping)} would be sent along inside {os.fspath(place)}; keep the mapping elsewhere"
            raise StoreError(message)
    store = open_store(source)
    _refuse_pixels(source, {tap: spec for tap, spec in store.taps.items() if taps is None or tap in taps})
    names = keyed_pseudonyms(store.ids, key)
    if labels is not None and labels.groups:
        groups = keyed_pseudonyms(labels.groups, key)
        labels = replace(labels, groups=tuple(groups[group] for group in labels.groups))
    lines = ["pseudonym,id", *(f'{new},"{_quoted(old)}"' for old, new in names.items())]
    scratch = listing.with_name(f".{listing.name}.unfinished")
    scratch.unlink(missing_ok=True)
    scratch.touch(mode=0o600)
    write_file(listing, ["\n".join(lines).encode() + b"\n"], scratch)
    return convert_store(
        source,
        target,
        taps=taps,
        fingerprint=fingerprint,
        pseudonym=names.__getitem__,
        labels=labels,
        progress=progress,
    )


def _quoted(name: str) -> str:
    return name.replace('"', '""')
