"""Where a clinic would work: thresholds chosen on val, and what calls and all-clears come to on test."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError
from pipeline.evaluate.metrics import Bools, Floats, roc_curve

POINTS = ("youden", "sensitivity=0.95", "specificity=0.95")
_ROUNDING = 1e-12  # of 1 - .07, which is less than .93
_POINT = re.compile(r"(sensitivity|specificity)=(0?\.[0-9]+|1(?:\.0+)?)")


def read_point(point: str) -> tuple[str, float]:
    """Read what an operating point asks for: its name, and the value to reach (0 for `"youden"`, which names none).

    Raises:
        ConfigError: No such point.
    """
    if point == "youden":
        return point, 0.0
    found = _POINT.fullmatch(point)
    if found is None or not float(found[2]):
        msg = (
            f"There is no operating point {point!r}: write 'youden', 'sensitivity=0.95' or 'specificity=0.95', the "
            f"number above 0 and at most 1."
        )
        raise ConfigError(msg)
    return found[1], float(found[2])


def choose_threshold(hits: Bools, scores: Floats, point: str) -> float:
    """Choose the score from which on a sample is called.

    Args:
        hits: (n,), with at least one of each kind.
        scores: (n,), higher for likelier.
        point: `"youden"`, where sensitivity plus specificity is highest; or `"sensitivity=X"` or `"specificity=X"`, the
            threshold that reaches X at the least cost of the other.

    Raises:
        ConfigError: No such point.
    """
    name, wanted = read_point(point)
    false, true, thresholds = roc_curve(hits, scores)
    thresholds = np.minimum(thresholds, np.nextafter(1, 2))  # just above every probability: nothing is called
    thresholds[0] = np.nextafter(scores.max(), np.inf)  # the point that calls nothing, as a number that JSON has
    if name == "youden":
        return float(thresholds[np.argmax(true - false)])
    if name == "sensitivity":
        return float(thresholds[np.argmax(true >= wanted - _ROUNDING)])
    return float(thresholds[np.flatnonzero(1 - false >= wanted - _ROUNDING)[-1]])


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    """Predictive values of a call and of an all-clear where the class has another prevalence, by Bayes' rule.

    NaN where nothing would be called, or everything.
    """
    called = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    cleared = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    ppv, npv = (right / (right + wrong) if right + wrong else math.nan for right, wrong in (called, cleared))
    return ppv, npv


class PointScorer:
    """What decisions at fixed thresholds come to.

    Args:
        hits: (n, K), what is true.
        probabilities: (n, K).
        thresholds: (K,), from which probability on a class is called.
    """

    def __init__(self, hits: Bools, probabilities: Floats, thresholds: Sequence[float]) -> None:
        called = probabilities >= np.asarray(thresholds)
        self._hits, self._called = hits, called
        self._kept, self._cleared = hits & called, ~hits & ~called

    def proportions(self) -> dict[str, tuple[Bools, Bools]]:
        """Right decisions and decisions made, of each sample, (n, K) each.

        `sensitivity` of those that are positive, `specificity` of those that are not; `ppv`, the predictive value of a
        call, of those that are called, and `npv`, that of an all-clear, of the others.
        """
        return {
            "sensitivity": (self._kept, self._hits),
            "specificity": (self._cleared, ~self._hits),
            "ppv": (self._kept, self._called),
            "npv": (self._cleared, ~self._called),
        }

    def counts(self) -> dict[str, npt.NDArray[np.int64]]:
        """True and false positives and negatives: `tp`, `fp`, `fn` and `tn`, (K,) each."""
        cells = {
            "tp": self._kept,
            "fp": ~self._hits & self._called,
            "fn": self._hits & ~self._called,
            "tn": self._cleared,
        }
        return {name: cell.sum(axis=0) for name, cell in cells.items()}

    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Score under weightings (R, n): `sensitivity` and `specificity`, each (R, K), NaN where not defined."""

        def sums(of: npt.NDArray[Any]) -> Floats:
            result: Floats = weights @ of.astype(weights.dtype)
            return result

        hits, misses = sums(self._hits), sums(~self._hits)
        with np.errstate(invalid="ignore"):
            return {"sensitivity": sums(self._kept) / hits, "specificity": sums(self._cleared) / misses}
