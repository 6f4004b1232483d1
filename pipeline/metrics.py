"""What a classifier is worth on a split: AUC, accuracies, sensitivity and specificity, confusion.

MedMNIST's conventions: AUC is the unweighted mean of one-vs-rest over the classes, accuracy is that of the likeliest
class; for several labels at once both are means over the labels, cut at a half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.tasks import Task

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


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
    hits = one_hot(task, labels, len(class_names))
    counts = hits.sum(axis=0)
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


def one_hot(task: Task, labels: Ints, classes: int) -> npt.NDArray[np.bool_]:
    """Spread labels into (n, K) yes and no."""
    if task == "multilabel":
        return labels.astype(bool)
    return np.equal(labels[:, None], np.arange(classes))


def binary_auc(hits: npt.NDArray[np.bool_], scores: Floats) -> float:
    """Compute the area under the ROC curve: the chance that a hit outscores a miss, a tie counting half.

    Args:
        hits: (n,), with at least one of each kind.
        scores: (n,), higher for likelier.
    """
    values, inverse = np.unique(scores, return_inverse=True)
    positives = np.bincount(inverse, weights=hits, minlength=len(values))
    negatives = np.bincount(inverse, weights=~hits, minlength=len(values))
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


def class_aucs(task: Task, labels: Ints, probabilities: Floats) -> npt.NDArray[np.float64]:
    """Compute one AUC per class, one against the rest: (K,)."""
    hits = one_hot(task, labels, probabilities.shape[1])
    return np.array([binary_auc(hits[:, k], probabilities[:, k]) for k in range(probabilities.shape[1])])


def macro_auc(task: Task, labels: Ints, probabilities: Floats) -> float:
    """Compute the unweighted mean of `class_aucs`."""
    return float(class_aucs(task, labels, probabilities).mean())


def predictions(task: Task, probabilities: Floats) -> Ints:
    """Decide: the likeliest class (n,), or every label of at least a half (n, K)."""
    if task == "multilabel":
        return (probabilities >= 0.5).astype(np.int64)
    return np.asarray(probabilities.argmax(axis=1), dtype=np.int64)


def confusion(labels: Ints, predicted: Ints, classes: int) -> Ints:
    """Count samples by true class (rows) and predicted class (columns): (K, K)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def score(task: Task, labels: Ints, probabilities: Floats, class_names: Sequence[str]) -> dict[str, Any]:
    """Score probabilities against labels.

    Args:
        task: What the labels mean.
        labels: (n,) class numbers, or (n, K) of 0 and 1 for `multilabel`.
        probabilities: (n, K).
        class_names: The K names, keys of the figures per class.

    Returns:
        JSON values: `n`, `auc`, `acc`, `balanced_acc`; `class_auc`, `sensitivity`, `specificity` by class name; and
        `confusion` (rows true, columns predicted; not for `multilabel`).
    """
    classes = len(class_names)
    hits, predicted = one_hot(task, labels, classes), predictions(task, probabilities)
    called = one_hot(task, predicted, classes)
    sensitivity = (hits & called).sum(axis=0) / hits.sum(axis=0)
    specificity = (~hits & ~called).sum(axis=0) / (~hits).sum(axis=0)
    balanced = (sensitivity + specificity) / 2 if task == "multilabel" else sensitivity
    aucs = class_aucs(task, labels, probabilities)

    def by_class(values: Floats) -> dict[str, float]:
        return {name: float(value) for name, value in zip(class_names, values, strict=True)}

    result: dict[str, Any] = {
        "n": len(labels),
        "auc": float(aucs.mean()),
        "acc": float((predicted == labels).mean()),
        "balanced_acc": float(balanced.mean()),
        "class_auc": by_class(aucs),
        "sensitivity": by_class(sensitivity),
        "specificity": by_class(specificity),
    }
    if task != "multilabel":
        result["confusion"] = confusion(labels, predicted, classes).tolist()
    return result


def roc_curve(hits: npt.NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Trace the ROC curve: false positive rates, true positive rates and thresholds, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    steps = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of each run of equal scores
    true = np.cumsum(hits[order])[steps]
    false = steps + 1 - true
    return (
        np.append(0.0, false / max(false[-1], 1)),
        np.append(0.0, true / max(true[-1], 1)),
        np.append(np.inf, scores[order][steps]),
    )
