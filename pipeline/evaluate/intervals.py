"""How sure a score is: intervals by drawing groups of samples (patients) again and again, with replacement."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluate import metrics
from pipeline.model.tasks import Task
from pipeline.overlap import ahead, threads

Floats = npt.NDArray[np.floating[Any]]
LEVEL = 0.95
_CELLS = 2**20  # numbers in one block of weights: few enough to stay in a processor's cache


def draw_weights(groups: Sequence[str], *, resamples: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Draw whole groups with replacement, as many as there are.

    Samples of one patient are no independent evidence, so they come and go together.

    Args:
        groups: Of each of n samples.
        resamples: How often to draw.
        seed: Of the draws.

    Yields:
        Blocks (r, n) of how often each sample was drawn; `resamples` rows in all.
    """
    names, member_of = np.unique(np.asarray(groups), return_inverse=True)
    random = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(groups))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = random.integers(0, len(names), (count, len(names)))
        drawn += np.arange(count)[:, None] * len(names)
        times = np.bincount(drawn.ravel(), minlength=count * len(names)).reshape(count, len(names))
        yield times.astype(np.float32)[:, member_of]


def resample(
    scorer: Callable[[Floats], Mapping[str, Floats]], groups: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Floats]:
    """Score many draws of groups.

    Args:
        scorer: Weights (r, n) to scores by name, (r,) or (r, K), such as `metrics.Scorer`.
        groups: Of each of n samples.
        resamples: R, how many draws.
        seed: Of the draws; the same seed draws the same groups, so that differences can be paired.

    Returns:
        Scores by name, (R,) or (R, K).
    """
    cores = len(os.sched_getaffinity(0))
    with threads(cores, "resample") as pool:
        drawn = draw_weights(groups, resamples=resamples, seed=seed)
        blocks = list(ahead(scorer, drawn, pool, depth=2 * cores))  # numpy's loops run beside each other
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def interval(draws: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Cut off the tails of draws (R, ...): the lower and upper end, each (...).

    Draws in which a score is not defined (NaN: a class without a sample) are left out.
    """
    tail = (1 - level) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def reliability(
    task: Task,
    labels: metrics.Ints,
    probabilities: Floats,
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Compare confidence with truth, with an interval for each step of confidence.

    A draw that has no sample of a step tells nothing of it and is left out: the interval of a step with few groups is
    too narrow, and that of a single group is a point.

    Returns:
        The rows of `metrics.reliability`, each with `low` and `high` of its accuracy.
    """
    scorer = metrics.ReliabilityScorer(task, labels, probabilities)
    low, high = interval(resample(scorer, groups, resamples=resamples, seed=seed)["accuracy"])
    return [
        {**row, "low": float(low[number]), "high": float(high[number])}
        for number, row in enumerate(metrics.reliability(task, labels, probabilities))
    ]


def named_intervals(draws: Mapping[str, Floats], class_names: Sequence[str]) -> dict[str, Any]:
    """Give `low` and `high` of each score, and for scores (R, K) of each class."""

    def ends(column: Floats) -> dict[str, float]:
        low, high = interval(column)
        return {"low": float(low), "high": float(high)}

    return {
        name: ends(values)
        if values.ndim == 1
        else {name_of_class: ends(values[:, k]) for k, name_of_class in enumerate(class_names)}
        for name, values in draws.items()
    }
