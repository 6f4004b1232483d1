"""A data set on a plane: pooled features of a store along their two widest directions, and the rows that lie apart.

The store is read twice, in pieces: once for the mean and the covariance (C, C) of the pooled features, once to project
them. What stays in memory is those and a dozen numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache import Store
from pipeline.mask_tap import features_of
from pipeline.progress import Progress, silent

OUTLIER = 6.0  # robust standard deviations of the log distance beyond which a row lies apart: our choice
NEIGHBOUR = 5  # which nearest neighbour the distance is measured to: our choice
_DIRECTIONS = 10
_REFERENCES = 2000
_AT_ONCE_BYTES = 64 << 20

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Plane:
    """Rows of a store on the plane of their first two principal components.

    Attributes:
        tap: The tap whose features they are.
        rows: Places in the store of the m rows with finite features.
        at: (m, 2) coordinates.
        explained: (2,) shares of the variance that the two directions hold.
        outliers: By id, how many times farther it is from its neighbours than the median row; farthest first.
    """

    tap: str
    rows: npt.NDArray[np.int64]
    at: npt.NDArray[np.float32]
    explained: tuple[float, float]
    outliers: dict[str, float]


def project(store: Store, tap: str | None = None, *, seed: int = 0, progress: Progress = silent) -> Plane:
    """Lay the rows of a store on a plane: principal components of globally averaged features.

    The average is over the part of the grid that is image. The sign of each direction makes its largest entry positive,
    so that the same features always give the same plane. A row is an outlier if its distance to its `NEIGHBOUR`th
    nearest neighbour among at most 2,000 rows (drawn with `seed`), in the first ten directions and what is left beyond
    them, is more than `OUTLIER` robust standard deviations above the median, in logarithms. That is ours: it leaves a
    small but dense class alone, which distance from the mean would not.

    Args:
        store: The features.
        tap: Which; None for `neck`, or the last tap with features of a store without one.
        seed: Of the draw of neighbours.
        progress: Called after each piece.
    """
    if tap is None:
        features = features_of(store.taps) or [*store.taps]
        tap = "neck" if "neck" in features else features[-1]
    mean, covariance, finite = _moments(store, tap, progress)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    directions = vectors[:, :_DIRECTIONS]
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
    rows = np.flatnonzero(finite)
    spots = np.empty((len(rows), directions.shape[1] + 1), np.float32)
    done = 0
    for start, pooled in _pooled(store, tap):
        centred = pooled[finite[start : start + len(pooled)]] - mean
        along = centred @ directions
        beyond = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), 0) ** 0.5
        spots[done : done + len(along)] = np.column_stack((along, beyond))
        done += len(along)
        progress("project", start + len(pooled), len(store), tap=tap)
    total = float(values.sum()) or 1.0
    at = np.zeros((len(rows), 2), np.float32)
    at[:, : min(2, directions.shape[1])] = spots[:, : min(2, directions.shape[1])]
    first, second = ([*values[:2], 0.0])[:2]
    return Plane(
        tap=tap,
        rows=rows,
        at=at,
        explained=(float(first / total), float(second / total)),
        outliers={store.ids[rows[i]]: ratio for i, ratio in _apart(spots, seed)},
    )


def _moments(store: Store, tap: str, progress: Progress) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Mean (C,) and covariance (C, C) of the rows with finite features, and which those are.

    Pieces are joined as in Chan, Golub and LeVeque (1983), which loses no digits to a large mean.
    """
    channels = store.taps[tap].channels
    count, mean, scatter = 0, np.zeros(channels), np.zeros((channels, channels))
    finite = np.zeros(len(store), bool)
    for start, pooled in _pooled(store, tap):
        good = np.isfinite(pooled).all(axis=1)
        finite[start : start + len(pooled)] = good
        if good.any():
            piece = pooled[good]
            piece_mean = piece.mean(axis=0)
            centred, step = piece - piece_mean, piece_mean - mean
            joined = count + len(piece)
            scatter += centred.T @ centred + np.outer(step, step) * (count * len(piece) / joined)
            mean, count = mean + step * (len(piece) / joined), joined
        progress("average", start + len(pooled), len(store), tap=tap)
    return mean, scatter / max(count, 1), finite


def _pooled(store: Store, tap: str) -> Iterator[tuple[int, Floats]]:
    """Yield the first row of each piece and the averages (rows, C) float64 of its features over what is image."""
    spec, extents = store.taps[tap], np.asarray(store.extents)
    step = max(1, _AT_ONCE_BYTES // (8 * spec.channels * spec.height * spec.width))
    for start in range(0, len(store), step):
        stop = min(start + step, len(store))
        features = store.read(range(start, stop), [tap])[tap].astype(np.float64)  # (rows, C, h, w)
        down = _shares(extents[start:stop, 0], spec.height)
        across = _shares(extents[start:stop, 1], spec.width)
        weights = down[:, :, None] * across[:, None, :]  # (rows, h, w)
        with np.errstate(invalid="ignore"):  # a feature that is not finite makes its row's average so, and is left out
            total = np.einsum("nchw,nhw->nc", features, weights)
        yield start, total / weights.sum(axis=(1, 2))[:, None]


def _shares(extent: Floats, cells: int) -> Floats:
    """The share of each cell that is image, from the part (rows,) of the axis that is: (rows, cells)."""
    return np.clip(extent.astype(np.float64)[:, None] * cells - np.arange(cells), 0, 1)


def _apart(spots: npt.NDArray[np.float32], seed: int) -> list[tuple[int, float]]:
    """Rows far from their neighbours, and how many times farther than the median row; farthest first."""
    count = len(spots)
    if count <= NEIGHBOUR + 1:
        return []
    drawn = np.random.default_rng(seed).permutation(count)[:_REFERENCES]
    references = spots[drawn].astype(np.float64)
    distances = np.empty(count)
    for start in range(0, count, _REFERENCES):
        piece = spots[start : start + _REFERENCES].astype(np.float64)
        squares = (piece**2).sum(axis=1)[:, None] + (references**2).sum(axis=1) - 2 * piece @ references.T
        squares[drawn[None, :] == np.arange(start, start + len(piece))[:, None]] = np.inf  # no neighbour of its own
        distances[start : start + len(piece)] = np.partition(squares, NEIGHBOUR - 1, axis=1)[:, NEIGHBOUR - 1]
    logs = 0.5 * np.log(np.maximum(distances, np.finfo(np.float64).tiny))
    centre = np.median(logs)
    spread = max(1.4826 * float(np.median(np.abs(logs - centre))), 1e-3)
    far = [i for i in np.argsort(-logs, kind="stable").tolist() if logs[i] > centre + OUTLIER * spread]
    return [(i, float(np.exp(logs[i] - centre))) for i in far]
