"""Is acting on the model worth it? Net benefit over the odds that a person would act at (Vickers and Elkin, 2006)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.evaluate import intervals
from pipeline.evaluate.metrics import Bools, Floats

THRESHOLDS = np.arange(1, 100) / 100  # probabilities from which a person would act


class NetBenefit:
    """Net benefit of acting on one class, for any weights of the samples.

    At a threshold t a person takes 1 needless action to be worth t / (1 - t) missed ones. Then acting on all samples
    with a probability of at least t is worth TP / n - FP / n * t / (1 - t), in true positives per sample without
    anything against them (Vickers and Elkin, Medical Decision Making 2006). It takes the probabilities at their word,
    so a model that is badly calibrated loses by it.

    Args:
        hits: (n,), what is true.
        probabilities: (n,), of that.
        thresholds: (m,), between 0 and 1.
    """

    def __init__(self, hits: Bools, probabilities: Floats, thresholds: Floats = THRESHOLDS) -> None:
        called = probabilities[:, None] >= thresholds
        price = thresholds / (1 - thresholds)
        self._model = np.where(hits[:, None], called, -price * called)
        self._all = np.where(hits[:, None], 1.0, -price)

    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Give the worth of acting on what the `model` calls, and on `all`, (R, m) each; acting on nobody has 0."""
        total = weights.sum(axis=1, keepdims=True)
        return {
            name: weights @ worth.astype(weights.dtype) / total
            for name, worth in (("model", self._model), ("all", self._all))
        }


def curve(
    hits: Bools, probabilities: Floats, groups: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> list[dict[str, float]]:
    """Trace the decision curve of one class, with the interval of each of its points.

    Args:
        hits: (n,), what is true.
        probabilities: (n,), of that.
        groups: Of each sample.
        resamples: Draws of groups for the intervals.
        seed: Of the draws.

    Returns:
        A row per threshold: `threshold`, `net_benefit` with `low` and `high`, and `treat_all`.
    """
    scorer = NetBenefit(hits, probabilities)
    whole = scorer(np.ones((1, len(hits))))
    low, high = intervals.interval(intervals.resample(scorer, groups, resamples=resamples, seed=seed)["model"])
    columns = (THRESHOLDS, whole["model"][0], low, high, whole["all"][0])
    names = ("threshold", "net_benefit", "low", "high", "treat_all")
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]


def worthwhile(rows: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """The ranges of thresholds, first and last, at which the model is worth more than acting on all and on none."""
    better = [row["net_benefit"] > max(row["treat_all"], 0.0) + 1e-12 for row in rows]
    found: list[tuple[float, float]] = []
    for number, row in enumerate(rows):
        if better[number] and number and better[number - 1]:
            found[-1] = (found[-1][0], row["threshold"])
        elif better[number]:
            found.append((row["threshold"], row["threshold"]))
    return found
