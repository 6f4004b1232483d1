"""Is one run better than another? Paired on the same samples: bootstrap over groups for every score, DeLong for AUC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import records
from pipeline.errors import RunError
from pipeline.evaluate.intervals import FEW, RANGES, interval, of_several, resample
from pipeline.evaluate.metrics import Bools, Floats, Ints, Scorer, by_name, one_hot
from pipeline.model.tasks import Task
from pipeline.train import run_folder, trained_model

_OF_GATES = ("pool", "reduction", "norm", "mix", "identity_start")  # options of its gates


@dataclass(frozen=True)
class Predictions:
    """What a run said about the samples of a split.

    Attributes:
        ids: Of the n samples.
        groups: Of the n samples.
        labels: (n,) class numbers, or (n, K) of 0 and 1 for `multilabel`.
        probabilities: (n, K).
        class_names: The K names.
        task: What the labels mean.
        pixels: SHA-256 of the pixels of the n images; empty where that was not recorded.
        positive: The class that is looked for; None where none was named, or the run does not say.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    labels: Ints
    probabilities: Floats
    class_names: tuple[str, ...]
    task: Task
    pixels: tuple[str, ...]
    positive: int | None = None


def read_predictions(folder: Path) -> Predictions:
    """Read what `evaluate` left in the folder of a run.

    Raises:
        RunError: The run has not been evaluated, or the file is damaged.
    """
    description = trained_model.load_description(folder)
    names, file = description.class_names, folder / "predictions.csv"
    if not file.is_file():
        msg = f"There are no predictions at {str(file)!r}: run `pipeline evaluate` on this run first."
        raise RunError(msg)
    with records.damage_named(file):
        rows = sorted(records.read_csv(file), key=lambda row: row["id"])
        if description.task == "multilabel":
            labels = np.array([[int(row[f"y_{name}"]) for name in names] for row in rows], np.int64)
        else:
            labels = np.array([names.index(row["label"]) for row in rows], np.int64)
        return Predictions(
            ids=tuple(row["id"] for row in rows),
            groups=tuple(row["group"] for row in rows),
            labels=labels,
            probabilities=np.array([[float(row[f"p_{name}"]) for name in names] for row in rows]),
            class_names=names,
            task=description.task,
            pixels=tuple(row.get("pixels_sha256") or "" for row in rows),
            positive=_positive(folder, names),
        )


def _positive(folder: Path, class_names: Sequence[str]) -> int | None:
    """The class that an evaluated run looks for; None if none was named."""
    try:
        figures = records.read_json(folder / "metrics.json")
    except (OSError, ValueError):
        return None
    named = figures.get("positive")
    return class_names.index(named) if named in class_names else None


def compare(first: Path, second: Path, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Compare two evaluated runs on the samples that both were scored on.

    Args:
        first: A run, the one to beat.
        second: Another run.
        resamples: Draws of the bootstrap.
        seed: Of the draws.

    Returns:
        JSON values: `n`, `groups`, `resamples`; `other_gates`, whether they differ in gates; `other_settings` (see
        there), besides; `scores`, by name `first`, `second`,
        `difference` (second minus first), `low` and `high` of its 95 % interval, and two-sided `p`; and `delong` (see
        `delong_test`).

    Raises:
        RunError: A run has not been evaluated, or they were scored on other samples.
    """
    one, two = read_predictions(first), read_predictions(second)
    _check_same_samples(one, two, first, second)
    scorers = [Scorer(p.task, p.labels, p.probabilities, one.positive) for p in (one, two)]
    hits = one_hot(one.task, one.labels, len(one.class_names))
    whole = np.ones((1, len(one.ids)))
    points = [{name: value[0] for name, value in scorer(whole).items()} for scorer in scorers]
    draws = [resample(scorer, one.groups, resamples=resamples, seed=seed) for scorer in scorers]
    scores, unknown = {}, ~np.array([of_several(column, one.groups) for column in hits.T])
    for name in points[0]:
        change = draws[1][name] - draws[0][name]
        if name == "class_auc":
            change = np.where(unknown, np.nan, change)
        elif name == "auc" and one.task == "binary":
            change = np.where(unknown[-1], np.nan, change)
        lowest, highest = RANGES.get(name, (0.0, 1.0))
        low, high = interval(change, ends=(lowest - highest, highest - lowest))
        figures = {
            "first": points[0][name],
            "second": points[1][name],
            "difference": points[1][name] - points[0][name],
            "low": low,
            "high": high,
            "p": _bootstrap_p(change),
        }
        scores[name] = by_name({key: np.asarray(value) for key, value in figures.items()}, one.class_names)
    delong = delong_test(one.task, one.labels, one.probabilities, two.probabilities, one.groups, one.class_names)
    groups = len(set(one.groups))
    return {
        "n": len(one.ids),
        "groups": groups,
        "resamples": resamples,
        "other_gates": _gates(first) != _gates(second),
        "other_settings": _what_else(first, second, all(one.pixels) and all(two.pixels)),
        "scores": scores,
        "delong": delong,
    }


def _gates(folder: Path) -> list[tuple[str, str]]:
    """The gates of a run, in any order that they were configured in."""
    return sorted(trained_model.load_description(folder).model.gates)


def _what_else(first: Path, second: Path, pixels_known: bool) -> list[dict[str, Any]] | None:
    """Give `other_settings`; None where there are none but nobody knows whether the pixels are the same."""
    found = other_settings(first, second)
    return found if found or pixels_known else None


def other_settings(first: Path, second: Path) -> list[dict[str, Any]] | None:
    """Settings besides the gates in which two runs differ: `setting`, `first`, `second`; None if a run has no record.

    Where one of them has no gates, or none that reads features, what goes with them is not listed.
    """
    one, two = (trained_model.load_description(folder).provenance.get("settings") for folder in (first, second))
    if not one or not two:
        return None
    follows = {"model.gates"}
    if not (one["model"]["gates"] and two["model"]["gates"]):
        follows |= {f"model.{name}" for name in _OF_GATES}
    if one["features"] is None or two["features"] is None:
        follows.add("features")
    if not (one["data"].get("pixels_sha256") and two["data"].get("pixels_sha256")):
        follows.add("data.pixels_sha256")  # known of runs that read a store
    return [
        {"setting": found.field, "first": found.ours, "second": found.theirs}
        for found in run_folder.differences(one, two)
        if found.field not in follows and not ("features" in follows and found.field.startswith("features."))
    ]


def delong_test(
    task: Task,
    labels: Ints,
    first: Floats,
    second: Floats,
    groups: Sequence[str],
    class_names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Test the difference of two AUCs on the same samples.

    DeLong, DeLong and Clarke-Pearson (Biometrics 1988): the variance comes from how far each sample's placement among
    the other kind lies from the AUC. Samples of one group are summed before squaring, as Obuchowski (Biometrics 1997)
    does for clusters; with a group per sample this is DeLong's own variance. The mean over the classes is tested by the
    mean of the classes' placements, which is ours; two classes have one AUC, that of the last. Where all samples of a
    class, or all others, are of one group, nothing tells how groups of that kind vary, and so nothing is known: the
    interval is that of all differences there can be, and p is 1.

    Args:
        task: What the labels mean.
        labels: (n,) class numbers, or (n, K) of 0 and 1 for `multilabel`.
        first: (n, K) probabilities of one classifier.
        second: (n, K) probabilities of the other.
        groups: Of each sample.
        class_names: The K names.

    Returns:
        For `auc` (the mean over the classes; for `binary` that of the last) and each class name: `difference`, `low`,
        `high`, `p`.
    """
    hits = one_hot(task, labels, first.shape[1])
    auc = np.array([[_placements(hits[:, k], p[:, k])[0] for k in range(len(class_names))] for p in (first, second)])
    influence = np.stack(
        [
            _placements(hits[:, k], second[:, k])[1] - _placements(hits[:, k], first[:, k])[1]
            for k in range(len(class_names))
        ],
        axis=1,
    )
    differences = auc[1] - auc[0]
    known = np.array([of_several(column, groups) for column in hits.T])
    ranked = slice(-1, None) if task == "binary" else slice(None)
    tested = {"auc": (differences[ranked].mean(), influence[:, ranked].mean(axis=1), bool(known[ranked].all()))}
    tested |= {name: (differences[k], influence[:, k], bool(known[k])) for k, name in enumerate(class_names)}
    return {
        name: _normal_test(difference, of_sample, groups)
        if is_known
        else {"difference": float(difference), "low": -1.0, "high": 1.0, "p": 1.0}
        for name, (difference, of_sample, is_known) in tested.items()
    }


def _placements(hits: Bools, scores: Floats) -> tuple[float, Floats]:
    """Compute an AUC and each sample's influence on it (n,), whose squares sum to DeLong's variance."""
    lower, upper = np.sort(scores[~hits]), np.sort(scores[hits])
    below = (np.searchsorted(lower, scores, "left") + np.searchsorted(lower, scores, "right")) / 2 / len(lower)
    above = 1 - (np.searchsorted(upper, scores, "left") + np.searchsorted(upper, scores, "right")) / 2 / len(upper)
    placement = np.where(hits, below, above)
    auc = float(placement[hits].mean())
    count = np.where(hits, len(upper), len(lower))
    return auc, (placement - auc) / np.sqrt(count * np.maximum(count - 1, 1))


def _normal_test(difference: float, influence: Floats, groups: Sequence[str]) -> dict[str, float]:
    """Give interval and p of a difference whose variance is the sum over groups of squared influence."""
    _, member_of = np.unique(np.asarray(groups), return_inverse=True)
    error = math.sqrt(float((np.bincount(member_of, weights=influence) ** 2).sum()))
    away = abs(difference) / error if error else math.inf if difference else 0.0
    reach = 1.959963984540054 * error  # the normal distribution's 97.5 % point
    low, high = float(difference - reach), float(difference + reach)
    return {"difference": float(difference), "low": low, "high": high, "p": math.erfc(away / math.sqrt(2))}


def _bootstrap_p(change: Floats) -> Floats:
    """Give the two-sided p of draws of a difference (R, ...), never below 2 / (R + 1); 1 where too few draws tell."""
    draws = np.isfinite(change).sum(axis=0)
    lower, upper = (change <= 0).sum(axis=0), (change >= 0).sum(axis=0)
    p = np.minimum(1.0, 2 * (np.minimum(lower, upper) + 1) / (draws + 1))
    return np.where(draws >= FEW * len(change), p, 1.0)


def _check_same_samples(one: Predictions, two: Predictions, first: Path, second: Path) -> None:
    if (one.task, one.class_names) != (two.task, two.class_names):
        msg = (
            f"{str(first)!r} tells {list(one.class_names)} apart and {str(second)!r} {list(two.class_names)}: "
            f"compare runs on the same classes."
        )
        raise RunError(msg)
    what = what_differs(one, two)
    if what is not None:
        msg = (
            f"{str(first)!r} and {str(second)!r} were scored on other samples ({what}): "
            f"evaluate both on the same data set and split."
        )
        raise RunError(msg)


def what_differs(one: Predictions, two: Predictions) -> str | None:
    """Say in what the samples of two runs differ; None where they are the same, as far as their pixels are known."""
    alone = set(one.ids) ^ set(two.ids)
    if alone:
        return f"{len(alone)} samples are in one of them only"
    if one.ids != two.ids or one.groups != two.groups or not np.array_equal(one.labels, two.labels):
        return "their labels or groups differ"
    pairs = zip(one.pixels, two.pixels, strict=True)
    other = sum(bool(ours) and bool(theirs) and ours != theirs for ours, theirs in pairs)
    return f"{other} of {len(one.ids)} images have other pixels" if other else None
