"""Is acting on the model worth it? Net benefit over the odds that a person would act at (Vickers and Elkin, 2006)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.evaluate import intervals
from pipeline.evaluate.metrics import Bools, Floats

THRESHOLDS = np.arange(1, 100) / 100  # probabilities from which a person would act
_NOTHING = 1e-6  # a gain that rounding may feign: draws are summed in single precision


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
        A row per threshold: `threshold`, `net_benefit` with `low` and `high`, `treat_all`, and `gain_low`, the lower
        end of the interval of what the model gains on the better of acting on all and on none.
    """
    scorer = NetBenefit(hits, probabilities)
    whole = scorer(np.ones((1, len(hits))))
    drawn = intervals.resample(scorer, groups, resamples=resamples, seed=seed)
    low, high = intervals.interval(drawn["model"])
    gain_low, _ = intervals.interval(drawn["model"] - np.maximum(drawn["all"], 0))
    columns = (THRESHOLDS, whole["model"][0], low, high, whole["all"][0], gain_low)
    names = ("threshold", "net_benefit", "low", "high", "treat_all", "gain_low")
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]


def worthwhile(rows: Sequence[dict[str, float]], *, surely: bool = False) -> list[tuple[float, float]]:
    """The ranges of thresholds, first and last, at which the model is worth more than acting on all and on none.

    Args:
        rows: Of `curve`.
        surely: Only where the interval of the gain leaves no doubt.
    """
    gains = [row["gain_low"] if surely else row["net_benefit"] - max(row["treat_all"], 0.0) for row in rows]
    found: list[tuple[float, float]] = []
    for number, row in enumerate(rows):
        if gains[number] > _NOTHING and number and gains[number - 1] > _NOTHING:
            found[-1] = (found[-1][0], row["threshold"])
        elif gains[number] > _NOTHING:
            found.append((row["threshold"], row["threshold"]))
    return found
