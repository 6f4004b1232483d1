"""What a classifier is worth on a split: ranking, decisions and calibration, for one weighting of the samples or many.

MedMNIST's conventions: AUC is the unweighted mean of one-vs-rest over the classes, accuracy is that of the likeliest
class; of two classes the last one alone is ranked, and called above a half; for several labels at once both are means
over the labels, each called above a half. Everything is computed from weights of samples, so that a bootstrap is the
same code on many weightings; what does not depend on them is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.model.tasks import Task

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BINS = 15  # of the calibration error, as Guo et al. (ICML 2017) have it


def check_labels(task: Task, labels: Ints, class_names: Sequence[str], split: str) -> None:
    """Refuse a split on which AUC is not defined.

    Args:
        task: What the labels mean.
        labels: (n,) class numbers, or (n, K) of 0 and 1 for `multilabel`.
        class_names: The K names.
        split: Its name, for the message.

    Raises:
        DataError: The split is empty, or has a class without a sample (or a label that is always or never set).
    """
    if not len(labels):
        msg = f"Split {split!r} has no samples: AUC is not defined; give it some."
        raise DataError(msg)
    counts = one_hot(task, labels, len(class_names)).sum(axis=0)
    empty = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    full = [name for name, count in zip(class_names, counts, strict=True) if count == len(labels)]
    if full and task != "multilabel":
        msg = f"Split {split!r} holds one class only ({full[0]!r}): AUC is not defined; put samples of others into it."
        raise DataError(msg)
    if empty or full:
        what = "no sample of" if empty else "only samples of"
        names = ", ".join(repr(name) for name in empty or full)
        msg = f"Split {split!r} holds {what} {names}: AUC is not defined; split the data again, or drop the class."
        raise DataError(msg)


def one_hot(task: Task, labels: Ints, classes: int) -> Bools:
    """Spread labels into (n, K) yes and no."""
    if task == "multilabel":
        return labels.astype(bool)
    return np.equal(labels[:, None], np.arange(classes))


def predictions(task: Task, probabilities: Floats) -> Ints:
    """Decide: the likeliest class (n,), of two the last above a half (n,), or every label above a half (n, K).

    Exactly a half is a no, as in MedMNIST's evaluator.
    """
    if task == "multilabel":
        return (probabilities > 0.5).astype(np.int64)
    if task == "binary":
        return (probabilities[:, -1] > 0.5).astype(np.int64)
    return np.asarray(probabilities.argmax(axis=1), dtype=np.int64)


class Scorer:
    """Scores of one set of predictions, for any weights of its samples.

    Args:
        task: What the labels mean.
        labels: (n,) class numbers, or (n, K) of 0 and 1 for `multilabel`.
        probabilities: (n, K).
        positive: Class whose average precision stands for two classes; None for the last.
    """

    def __init__(self, task: Task, labels: Ints, probabilities: Floats, positive: int | None = None) -> None:
        self.task, self.classes = task, probabilities.shape[1]
        self._positive = self.classes - 1 if positive is None else positive
        self._hits = one_hot(task, labels, self.classes)
        self._rankings = [_Ranking(self._hits[:, k], probabilities[:, k]) for k in range(self.classes)]
        predicted = predictions(task, probabilities)
        self._called = one_hot(task, predicted, self.classes)
        errors = (probabilities - self._hits) ** 2
        self._brier = {"binary": errors[:, -1], "multilabel": errors.mean(axis=1)}.get(task, errors.sum(axis=1))
        self.cells = None if task == "multilabel" else np.equal(
            (labels * self.classes + predicted)[:, None], np.arange(self.classes**2)
        )  # fmt: skip
        self._gaps = _calibration_gaps(task, self._hits, self._called, probabilities)

    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Score under R weightings at once.

        Args:
            weights: (R, n), not negative; their dtype is that of the sums.

        Returns:
            By name, (R,), or (R, K) for what each class has: `class_auc`, `class_ap`, `sensitivity`, `specificity`.
            Where a weighting leaves a class empty, what needs it is NaN.

            `ece` is never negative: chance alone parts confidence from truth in every step, the more so in a draw that
            repeats samples. The ends of its percentile interval therefore lie too high, and for a well calibrated
            classifier both may lie above the value itself.
        """
        curves = [ranking.areas(weights) for ranking in self._rankings]
        auc, ap = (np.stack([curve[number] for curve in curves], axis=1) for number in (0, 1))
        two = self.task == "binary"
        ranked = slice(-1, None) if two else slice(None)  # the first of two may tie by rounding to 1
        found = [self._positive] if two else slice(None)
        hit_called, hits = _sums(weights, self._hits & self._called), _sums(weights, self._hits)
        called, total = _sums(weights, self._called), weights.sum(axis=1)
        misses = total[:, None] - hits
        sensitivity = _ratio(hit_called, hits)
        specificity = _ratio(misses - called + hit_called, misses)
        right = (sensitivity + specificity) / 2 if self.task == "multilabel" else sensitivity
        result = {
            "auc": auc[:, ranked].mean(axis=1),
            "ap": ap[:, found].mean(axis=1),
            "acc": self._accuracy(weights, total),
            "balanced_acc": right.mean(axis=1),
            "f1": _ratio(2 * hit_called, np.where(hits > 0, hits + called, 0)).mean(axis=1),
        }
        if self.task == "ordinal" and self.cells is not None:
            result["kappa"] = _quadratic_kappa(_sums(weights, self.cells).reshape(-1, self.classes, self.classes))
        return result | {
            "ece": np.abs(_sums(weights, self._gaps)).sum(axis=1) / total,
            "brier": _sums(weights, self._brier[:, None])[:, 0] / total,
            "class_auc": auc,
            "class_ap": ap,
            "sensitivity": sensitivity,
            "specificity": specificity,
        }

    def proportions(self) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """The scores that are shares of decisions, as counts: right decisions and decisions made, of each sample.

        Returns:
            `acc` (n,), `sensitivity` and `specificity` (n, K).
        """
        agreed = self._hits == self._called
        made = np.full(len(agreed), self.classes if self.task == "multilabel" else 1)
        return {
            "acc": (agreed.sum(axis=1) if self.task == "multilabel" else agreed.all(axis=1), made),
            "sensitivity": (self._hits & self._called, self._hits),
            "specificity": (~self._hits & ~self._called, ~self._hits),
        }

    def _accuracy(self, weights: Floats, total: Floats) -> Floats:
        agreed = self._hits == self._called
        each = agreed.mean(axis=1) if self.task == "multilabel" else agreed.all(axis=1)
        return _sums(weights, each[:, None])[:, 0] / total


def score(
    task: Task, labels: Ints, probabilities: Floats, class_names: Sequence[str], positive: int | None = None
) -> dict[str, Any]:
    """Score probabilities against labels.

    Args:
        task: What the labels mean.
        labels: (n,) class numbers, or (n, K) of 0 and 1 for `multilabel`; `check_labels` has passed them.
        probabilities: (n, K).
        class_names: The K names, keys of the figures per class.
        positive: Class whose average precision stands for two classes; None for the last.

    Returns:
        JSON values: `n`; `auc`, `ap` (average precision), `acc`, `balanced_acc`, macro `f1`, quadratic `kappa` (for
        `ordinal`), `ece` (expected calibration error), `brier`; `class_auc`, `class_ap`, `sensitivity`, `specificity`
        by class name; and `confusion` (rows true, columns predicted; not for `multilabel`). `auc` and `ap` are means
        over the classes; two classes have one `auc`, and for them `ap` is that of the positive class.
    """
    scorer = Scorer(task, labels, probabilities, positive)
    weights = np.ones((1, len(labels)))
    result: dict[str, Any] = {"n": len(labels), **by_name({k: v[0] for k, v in scorer(weights).items()}, class_names)}
    if scorer.cells is not None:
        counts = scorer.cells.sum(axis=0).reshape(scorer.classes, scorer.classes)
        result["confusion"] = counts.tolist()
    return result


def by_name(values: Mapping[str, Floats], class_names: Sequence[str]) -> dict[str, Any]:
    """Turn scores () and (K,) into numbers and into mappings from class name to number."""
    return {
        key: float(value) if value.ndim == 0 else dict(zip(class_names, value.tolist(), strict=True))
        for key, value in values.items()
    }


def reliability(task: Task, labels: Ints, probabilities: Floats) -> list[dict[str, float]]:
    """Compare confidence with truth in `BINS` equal steps of confidence.

    Confidence is the probability of the class that was called; for `multilabel`, of each label.

    Returns:
        One row per step that has samples: `confidence` and `accuracy` (means), `count`.
    """
    confidence, right = _decisions(task, labels, probabilities)
    step = _step(confidence)
    return [
        {
            "confidence": float(confidence[step == number].mean()),
            "accuracy": float(right[step == number].mean()),
            "count": int((step == number).sum()),
        }
        for number in np.unique(step)
    ]


def decisions_by_step(task: Task, labels: Ints, probabilities: Floats) -> tuple[Floats, Floats]:
    """Count the decisions of each sample by step of confidence: those that are right, and all.

    Args:
        task: What the labels mean.
        labels: (n,) class numbers, or (n, K) of 0 and 1 for `multilabel`.
        probabilities: (n, K).

    Returns:
        (n, steps) and (n, steps), for the steps that have any, in the order of `reliability`.
    """
    confidence, right = _decisions(task, labels, probabilities)
    steps, column = np.unique(_step(confidence), return_inverse=True)
    row = np.repeat(np.arange(len(labels)), len(confidence) // len(labels))  # one decision, or one per label
    counts = np.zeros((2, len(labels), len(steps)))
    np.add.at(counts[0], (row, column), right)
    np.add.at(counts[1], (row, column), 1)
    return counts[0], counts[1]


def roc_curve(hits: Bools, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Trace the ROC curve: false positive rates, true positive rates and thresholds, from (0, 0) to (1, 1)."""
    ranking = _Ranking(hits, scores)
    true, called = (sums[0] for sums in ranking.running_sums(np.ones((1, len(hits)))))
    false = called - true
    thresholds = np.append(np.inf, scores[ranking.order][ranking.ends])
    return np.append(0.0, false / max(false[-1], 1)), np.append(0.0, true / max(true[-1], 1)), thresholds


def precision_recall(hits: Bools, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Trace precision over recall: recalls, precisions and thresholds, from the highest score down."""
    ranking = _Ranking(hits, scores)
    true, called = (sums[0] for sums in ranking.running_sums(np.ones((1, len(hits)))))
    return true / max(true[-1], 1), true / called, scores[ranking.order][ranking.ends]


class RocScorer:
    """The ROC curve of one class at fixed false positive rates, for any weights of the samples.

    Args:
        hits: (n,), with at least one of each kind.
        scores: (n,), higher for likelier.
        rates: (m,) false positive rates.
    """

    def __init__(self, hits: Bools, scores: Floats, rates: Floats) -> None:
        self._ranking, self._rates = _Ranking(hits, scores), rates

    def __call__(self, weights: Floats) -> dict[str, Floats]:
        """Read `tpr` (R, m) off the curves of R weightings; NaN where a kind has no sample."""
        true, called = self._ranking.running_sums(weights.astype(np.float64))
        false = called - true
        x, y = (_ratio(sums, sums[:, -1:]) for sums in (false, true))
        start = np.zeros((len(weights), 1))
        rows = zip(np.hstack([start, x]), np.hstack([start, y]), strict=True)
        return {"tpr": np.array([np.interp(self._rates, across, up) for across, up in rows])}


class _Ranking:
    """Samples in the order of their scores, equal scores together."""

    def __init__(self, hits: Bools, scores: Floats) -> None:
        self.order = np.argsort(-scores, kind="stable")
        self.ends = np.append(np.flatnonzero(np.diff(scores[self.order])), len(scores) - 1)  # last of each tie
        self._hits = hits[self.order]
        self._ties = len(self.ends) < len(scores)

    def running_sums(self, weights: Floats) -> tuple[Floats, Floats]:
        """Sum the weights of hits, and of all, down to each distinct score: two of (R, distinct scores)."""
        ranked = weights[:, self.order]
        true, called = np.cumsum(ranked * self._hits, axis=1), np.cumsum(ranked, axis=1)
        return (true[:, self.ends], called[:, self.ends]) if self._ties else (true, called)

    def areas(self, weights: Floats) -> tuple[Floats, Floats]:
        """Compute AUC (ties count half) and average precision: two of (R,)."""
        true, called = self.running_sums(weights)
        gained = np.diff(true, axis=1, prepend=0)
        hits, total = true[:, -1], called[:, -1]
        # A hit beats the misses below it: all misses, less those above, less half of those level with it.
        above = called - true
        beaten = (total - hits)[:, None] - above
        beaten += np.diff(above, axis=1, prepend=0) / 2
        auc = _ratio(np.einsum("rt,rt->r", gained, beaten), hits * (total - hits))
        precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
        return auc, _ratio(np.einsum("rt,rt->r", gained, precision), hits)


def _sums(weights: Floats, of: npt.NDArray[Any]) -> Floats:
    """Sum columns (n, m) under each weighting (R, n): (R, m)."""
    sums: Floats = weights @ of.astype(weights.dtype)
    return sums


def _ratio(over: Floats, under: Floats) -> Floats:
    """Divide, NaN where there is nothing to divide by."""
    out: Floats = np.full(np.broadcast_shapes(over.shape, under.shape), np.nan, dtype=over.dtype)
    return np.divide(over, under, out=out, where=under > 0)


def _quadratic_kappa(counts: Floats) -> Floats:
    """Compute Cohen's kappa with quadratic weights from confusion matrices (R, K, K)."""
    grades = np.arange(counts.shape[1])
    cost = (grades[:, None] - grades) ** 2
    expected = counts.sum(axis=2)[:, :, None] * counts.sum(axis=1)[:, None, :] / counts.sum(axis=(1, 2))[:, None, None]
    return 1 - _ratio((counts * cost).sum(axis=(1, 2)), (expected * cost).sum(axis=(1, 2)))


def _decisions(task: Task, labels: Ints, probabilities: Floats) -> tuple[Floats, Bools]:
    """Give the confidence of each decision and whether it is right, both flat, those of a sample side by side."""
    hits = one_hot(task, labels, probabilities.shape[1])
    called = one_hot(task, predictions(task, probabilities), probabilities.shape[1])
    return _confidence(task, hits, called, probabilities)


def _confidence(task: Task, hits: Bools, called: Bools, probabilities: Floats) -> tuple[Floats, Bools]:
    """Give the confidence of each decision and whether it is right, both flat."""
    if task == "multilabel":
        return probabilities.ravel(), hits.ravel()
    return probabilities[called], hits[called]


def _step(confidence: Floats) -> Ints:
    """Number the step of confidence, of `BINS`, that each value is in; a step holds its upper end."""
    step: Ints = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(np.int64)
    return step


def _calibration_gaps(task: Task, hits: Bools, called: Bools, probabilities: Floats) -> Floats:
    """Give the sums of (right - confidence) per sample and step (n, BINS): the error is the size of their sums."""
    confidence, right = _confidence(task, hits, called, probabilities)
    step = _step(confidence)
    per_sample = len(confidence) // len(hits)  # one decision, or one per label
    gaps = np.zeros((len(hits), BINS))
    np.add.at(gaps, (np.repeat(np.arange(len(hits)), per_sample), step), (right - confidence) / per_sample)
    return gaps
