"""The scores of parts of the test set, such as women and men: each with how many it rests on, and intervals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluate import intervals
from pipeline.evaluate.metrics import Bools, Floats, Ints, Scorer, one_hot
from pipeline.model.tasks import Task

UNKNOWN = "not given"


def by_subgroup(
    task: Task,
    labels: Ints,
    probabilities: Floats,
    groups: Sequence[str],
    subgroups: Mapping[str, Sequence[str]],
    *,
    positive: int | None,
    threshold: float | None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score each subgroup by itself.

    Args:
        task: What the labels mean.
        labels: (n,) class numbers, or (n, K) of 0 and 1 for `multilabel`.
        probabilities: (n, K).
        groups: Of each sample.
        subgroups: By column, what it says of each sample; empty where it says nothing.
        positive: The class that is looked for; None to score all classes together.
        threshold: From which probability on it is called; None for the decision that the model makes by itself.
        resamples: Draws of groups for the intervals of AUC.
        seed: Of the draws.

    Returns:
        By column and value, in order: `n`, `groups`, `acc`, `auc` (of the positive class, or the mean over
        all), and where there is a positive class `positives`, `sensitivity` and `specificity`. Scores are `value`,
        `low`, `high` and `n`, the samples that they rest on; None where a subgroup lacks what they need.
    """

    def score(rows: Ints) -> dict[str, Any]:
        part = _Part(task, labels[rows], probabilities[rows], [groups[i] for i in rows], positive, threshold)
        return {"n": len(rows), "groups": len(set(part.groups)), **part.shares(), "auc": part.auc(resamples, seed)}

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for column, values in subgroups.items():
        named = np.array([value or UNKNOWN for value in values])
        found[column] = {value: score(np.flatnonzero(named == value)) for value in _in_order(set(named.tolist()))}
    return found


def _in_order(values: Iterable[str]) -> list[str]:
    """Values by the number that they begin with, as bands do, then by letters; the unknown last."""

    def key(value: str) -> tuple[bool, bool, float, str]:
        number = re.search(r"\d+(\.\d+)?", value)
        return value == UNKNOWN, not value.startswith("under "), float(number[0]) if number else 0.0, value

    return sorted(values, key=key)


class _Part:
    """The samples of one subgroup."""

    def __init__(
        self,
        task: Task,
        labels: Ints,
        probabilities: Floats,
        groups: Sequence[str],
        positive: int | None,
        threshold: float | None,
    ) -> None:
        self.groups, self._positive, self._threshold = groups, positive, threshold
        self._scorer, self._p = Scorer(task, labels, probabilities, positive), probabilities
        self._hits = one_hot(task, labels, probabilities.shape[1])

    def shares(self) -> dict[str, Any]:
        """`acc`; and with a positive class how many there are of it, `sensitivity` and `specificity`."""
        counts = self._scorer.proportions()
        found: dict[str, Any] = {"acc": intervals.share(*counts["acc"], self.groups)}
        if self._positive is None:
            return found
        hits = self._hits[:, self._positive]
        found["positives"] = int(hits.sum())
        if self._threshold is None:
            pairs = {
                name: (right[:, self._positive], made[:, self._positive])
                for name, (right, made) in counts.items()
                if name != "acc"
            }
        else:
            called = self._p[:, self._positive] >= self._threshold
            pairs = {"sensitivity": (hits & called, hits), "specificity": (~hits & ~called, ~hits)}
        return found | {name: intervals.share(right, made, self.groups) for name, (right, made) in pairs.items()}

    def auc(self, resamples: int, seed: int) -> dict[str, Any] | None:
        """The AUC of the positive class, or the mean over all; None where a class is missing."""
        wanted = self._hits if self._positive is None else self._hits[:, [self._positive]]
        if not (wanted.any(axis=0) & ~wanted.all(axis=0)).all():
            return None

        def score(weights: Floats) -> dict[str, Floats]:
            found = self._scorer(weights)
            return {"auc": found["auc"] if self._positive is None else found["class_auc"][:, self._positive]}

        value = float(score(np.ones((1, len(self.groups))))["auc"][0])
        low, high = intervals.interval(intervals.resample(score, self.groups, resamples=resamples, seed=seed)["auc"])
        drawn = {"low": float(low), "high": float(high)}
        columns: Sequence[Bools] = list(wanted.T)
        ends = [intervals.of_auc(value, drawn, column, self.groups) for column in columns]
        widest = max(ends, key=lambda pair: pair["high"] - pair["low"])
        return {"value": value, **widest, "n": len(self.groups)}
