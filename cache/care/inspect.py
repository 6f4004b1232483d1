"""A look at the numbers of a store: features that cannot be right, and images that occur more than once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.labels import Label, Labels
from cache.progress import Progress, silent
from cache.reading.reader import Store, open_store

OUTLIER = 6.0
"""Robust standard deviations of the logarithm of the norm beyond which a row is an outlier: our choice."""

_AT_ONCE_BYTES = 64 << 20

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TapReport:
    """The numbers of one tap.

    Attributes:
        tap: Name.
        non_finite: Ids of rows with a value that is not a finite number.
        zero: Ids of rows that are zero throughout; of images none is listed, as one may well be black.
        constant: Ids of rows whose every channel is constant over the grid, but not zero; none of images.
        outliers: Ids of rows whose norm is far from the others', with the norm over the median norm; none of images.
        median_norm: Median Euclidean norm of the finite rows, 0 if there are none.
        mean: Mean of all finite rows' values.
        std: Their standard deviation.
    """

    tap: str
    non_finite: tuple[str, ...]
    zero: tuple[str, ...]
    constant: tuple[str, ...]
    outliers: Mapping[str, float]
    median_norm: float
    mean: float
    std: float


@dataclass(frozen=True)
class Twins:
    """Samples with identical source pixels.

    Attributes:
        ids: Their ids.
        splits: The splits they are in; more than one is a leak.
        labels: The labels they carry; more than one is a contradiction.
    """

    ids: tuple[str, ...]
    splits: tuple[str, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Inspection:
    """What was found in a store.

    Attributes:
        rows: Samples.
        taps: Reports by tap.
        twins: Groups of samples with identical pixels.
        counts: Samples by split and class name; empty if no labels were given.
        set_aside: Reason by id of samples that gave no feature.
    """

    rows: int
    taps: tuple[TapReport, ...]
    twins: tuple[Twins, ...]
    counts: Mapping[str, Mapping[str, int]]
    set_aside: Mapping[str, str]


def inspect_store(
    path: str | os.PathLike[str], labels: Labels | None = None, progress: Progress = silent
) -> Inspection:
    """Read a store once and report what a careful person would look for.

    Memory is bounded by 64 MiB, or what one row takes, and a few numbers a row.

    Args:
        path: The store.
        labels: Labels and splits of its rows; those that travel with the store by default.
        progress: Called after each batch.

    Raises:
        DamagedRowError: A row is damaged.
        StoreError: The labels do not fit the rows.
    """
    store = open_store(path)
    known = labels if labels is not None else store.labels
    if known is not None:
        known.check(len(store))
    return Inspection(
        rows=len(store),
        taps=tuple(_report(store, tap, progress) for tap in store.taps),
        twins=_twins(store, known),
        counts=_counts(known),
        set_aside=store.set_aside,
    )


def _report(store: Store, tap: str, progress: Progress) -> TapReport:
    """Statistics of one tap, one batch after the other."""
    count, spec = len(store), store.taps[tap]
    finite, zero, constant = np.ones(count, bool), np.zeros(count, bool), np.zeros(count, bool)
    norms = np.zeros(count)
    total = squares = 0.0
    numbers = spec.channels * spec.height * spec.width
    step = max(1, _AT_ONCE_BYTES // (2 * spec.row_bytes + 5 * numbers))  # read, made finite, compared, in float32
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        finite[part], zero[part], constant[part], norms[part], added = _numbers(
            store, tap, range(part.start, part.stop)
        )
        total += added
        squares += float((norms[part] ** 2).sum())
        progress("inspect", part.stop, count, tap=tap)
    numbers *= max(1, int(finite.sum()))
    mean = total / numbers
    usual = finite & ~zero
    if not spec.holds_features:  # a black, white or dark image is no damage, nor one without a region
        zero, constant = np.zeros_like(zero), np.zeros_like(constant)
    median = float(np.median(norms[usual])) if usual.any() else 0.0
    return TapReport(
        tap=tap,
        non_finite=_ids(store, ~finite),
        zero=_ids(store, zero),
        constant=_ids(store, constant & finite),
        outliers={
            store.ids[i]: float(norms[i] / median) for i in (_outliers(norms, usual) if spec.holds_features else ())
        },
        median_norm=median,
        mean=mean,
        std=max(0.0, squares / numbers - mean**2) ** 0.5,
    )


def _numbers(store: Store, tap: str, rows: range) -> tuple[Bools, Bools, Bools, npt.NDArray[np.float64], float]:
    """Of each row whether it is finite, zero, constant, and its norm; and the sum over all finite rows."""
    spec = store.taps[tap]
    values = store.read(rows, [tap])[tap].reshape(len(rows), spec.channels, -1)
    finite: Bools = np.isfinite(values).all((1, 2))
    zero: Bools = np.logical_not(values.any((1, 2)))
    constant: Bools = (values == values[:, :, :1]).all((1, 2)) & ~zero
    wide = np.where(finite[:, None, None], values, values.dtype.type(0)).astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ncp,ncp->n", wide, wide, dtype=np.float64))
    return finite, zero, constant, norms, float(wide.sum(dtype=np.float64))


def _outliers(norms: npt.NDArray[np.float64], usual: npt.NDArray[np.bool_]) -> list[int]:
    """Rows whose log norm is more than `OUTLIER` robust standard deviations (1.4826 MAD) from the median."""
    if usual.sum() < 3:
        return []
    logs = np.log(norms, where=usual, out=np.zeros_like(norms))
    centre = np.median(logs[usual])
    spread = max(1.4826 * float(np.median(np.abs(logs[usual] - centre))), 1e-3)
    return np.flatnonzero(usual & (np.abs(logs - centre) > OUTLIER * spread)).tolist()


def _ids(store: Store, chosen: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(store.ids[i] for i in np.flatnonzero(chosen))


def _twins(store: Store, labels: Labels | None) -> tuple[Twins, ...]:
    """Groups of rows that share a slot, which is to say pixels."""
    groups: dict[int, list[int]] = {}
    for row, slot in enumerate(store.slots.tolist()):
        groups.setdefault(slot, []).append(row)
    return tuple(_twin(store, rows, labels) for rows in groups.values() if len(rows) > 1)


def _twin(store: Store, rows: Sequence[int], labels: Labels | None) -> Twins:
    ids = tuple(store.ids[row] for row in rows)
    if labels is None:
        return Twins(ids, (), ())
    found = labels.select(rows)
    return Twins(ids, tuple(dict.fromkeys(found.splits)), tuple(dict.fromkeys(found.labels)))


def _counts(labels: Labels | None) -> dict[str, dict[str, int]]:
    """Samples by split and class; a sample of several classes counts in each."""
    if labels is None:
        return {}
    counts: dict[str, Counter[str]] = {}
    for split, label in zip(labels.splits, labels.labels, strict=True):
        numbers = [label] if isinstance(label, int) else [i for i, has in enumerate(label) if has]
        counts.setdefault(split, Counter()).update(labels.class_names[i] for i in numbers)
    return {split: {name: found[name] for name in labels.class_names} for split, found in counts.items()}
