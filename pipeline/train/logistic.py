"""Logistic regression by scikit-learn as the head of a classifier: weights and bias that torch computes with alike.

Each head of `pipeline.model.tasks` is one: `softmax` the multinomial, `sigmoid` one for each label, `continuation` one
for each step from a grade to the next, on the samples that have come so far.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.model.tasks import Head

STRENGTHS = tuple(float(f"{10**power:.2g}") for power in np.arange(-5.0, 1.5, 0.5))
"""Values of C, the inverse strength of the penalty on standardised features, from the strongest on: our choice."""

_ITERATIONS = 2000
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Layer = tuple[Floats, Floats]  # weight (outputs, D) and bias (outputs,)


def fit_path(
    head: Head,
    features: Floats,
    labels: Ints,
    *,
    strengths: Sequence[float] = STRENGTHS,
    class_weights: Literal["none", "balanced"] = "none",
) -> Iterator[Layer]:
    """Fit a linear layer for each strength of the penalty, each from where the one before ended.

    The fit is made in the space that the samples span, where it is the same: a penalised weight has no part outside of
    it. So a thousand features of a hundred samples cost no more than a hundred.

    Args:
        head: What the outputs mean.
        features: (n, D), standardised.
        labels: (n,) class numbers; for `sigmoid` (n, K) of 0 and 1. Every class occurs, and every label is sometimes
            set and sometimes not.
        strengths: Values of C.
        class_weights: `"balanced"` weighs a class (of a label, yes and no) by how rare it is.

    Yields:
        The layer of each strength.
    """
    turned, back = _span(features)
    problems = list(_problems(head, turned, labels))
    fits = [_estimator(class_weights) for _ in problems]
    for strength in strengths:
        for estimator, (x, y) in zip(fits, problems, strict=True):
            estimator.set_params(C=strength)
            _fit(estimator, x, y)
        weight = np.concatenate([estimator.coef_ for estimator in fits]) @ back
        bias = np.concatenate([estimator.intercept_ for estimator in fits])
        if head == "softmax" and len(bias) == 1:  # two classes: their difference, shared evenly
            weight, bias = np.concatenate((-weight, weight)) / 2, np.concatenate((-bias, bias)) / 2
        yield weight, bias


def _span(features: Floats) -> tuple[Floats, Floats]:
    """Coordinates (n, r) in the space that the samples span, r at most n, and the way back (r, D)."""
    count, size = features.shape
    if size <= count:
        return features, np.eye(size)
    directions, _ = np.linalg.qr(features.T)  # (D, n), of length one and at right angles
    return features @ directions, directions.T


def _problems(head: Head, x: Floats, labels: Ints) -> Iterator[tuple[Floats, Ints]]:
    """The regressions that a head is made of: features and target of each."""
    if head == "softmax":
        yield x, labels
    elif head == "sigmoid":
        for k in range(labels.shape[1]):
            yield x, labels[:, k]
    else:
        for k in range(int(labels.max())):
            reached = labels >= k
            yield x[reached], (labels[reached] > k).astype(np.int64)


def _estimator(class_weights: str) -> Any:
    from sklearn.linear_model import LogisticRegression  # half a second, for those who fit one

    balanced = "balanced" if class_weights == "balanced" else None
    return LogisticRegression(max_iter=_ITERATIONS, warm_start=True, class_weight=balanced)


def _fit(estimator: Any, x: Floats, y: Ints) -> None:
    """Fit; where the penalty is so weak that the last iterations change next to nothing, that is good enough."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(x, y)
