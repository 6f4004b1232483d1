"""Read a held-out split once: scores, a row per sample, curves for programs and plots for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache import Store
from pipeline import records
from pipeline.data import Dataset, Split
from pipeline.evaluate import decision, intervals, metrics, operating, plots
from pipeline.evaluate.subgroups import by_subgroup
from pipeline.model.tasks import Task
from pipeline.progress import Progress, silent
from pipeline.train import run_folder, trained_model
from pipeline.train.feeding.feed import Feed
from pipeline.train.feeding.in_memory import Holdings
from pipeline.train.finished_run import Trained
from pipeline.train.forward import infer
from pipeline.train.identity import also_learnt, data_changed
from pipeline.train.painted import count_masks
from pipeline.train.train import Machine

Floats = npt.NDArray[np.floating[Any]]
ON_VAL = ("auc", "acc", "balanced_acc")
SUBGROUP = "subgroup_"  # begins the name of a column of `predictions.csv` that says a subgroup


def evaluate(
    folder: Path,
    dataset: Dataset,
    store: Store | None,
    *,
    split: Split = "test",
    points: Sequence[str] = operating.POINTS,
    resamples: int = 2000,
    seed: int = 0,
    machine: Machine | None = None,
    allow_missing: bool = False,
    holdings: Holdings | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score a finished run on a split, and leave the figures in its folder.

    Writes `metrics.json`; `predictions.csv`, one row per sample; `roc.csv`, `precision_recall.csv`, `reliability.csv`
    and `decision_curve.csv`, one row per point, the last two with intervals; for people the first three as PNG,
    `loss.png` and, where a sample has one class, `confusion.png`.

    Scores of other images that the folder has (the data set has grown since) are kept in `earlier`.

    Args:
        folder: A finished run.
        dataset: The data set it was trained on, or another one with the same classes.
        store: Its features; may be None for a classifier without gates.
        split: What to score on.
        points: Where to read sensitivity and specificity (see `operating.choose_threshold`), chosen on val if there is
            one.
        resamples: Draws of groups for the intervals.
        seed: Of the draws.
        machine: What to compute on.
        allow_missing: Score without the samples that the store lacks.
        holdings: Images and features that others have loaded; None to share nothing.
        progress: Called while images are decoded.

    Returns:
        What `metrics.json` holds: `val`, `n` and by score of `ON_VAL` the `value` on val and its `low` and `high` (too
        good, for val chose the epoch); `positive`, the class that is looked for, if one is; the scores of
        `metrics.score`; `prevalence`, the share of each class; `intervals`, by score `low` and `high`;
        `operating_points`, by point and class the threshold, the shares of `operating.PointScorer` with the decisions
        that they rest on, and the counts; `subgroups`, see `by_subgroup`, at the first of the points; `overlay`, see
        `count_masks`, where masks are painted; what the run is;
        and, in words, `data_changed` where the data set is not that of the training any more, and `also_learnt` where
        images have the pixels of others that the run was trained or chosen on.

    Raises:
        RunError: No finished run, other classes, features of another fingerprint, or another process writes the folder.
        DataError: AUC is not defined on the split.
        ConfigError: There is no such operating point.
    """
    for point in points:
        operating.read_point(point)
    trained = Trained(
        folder,
        dataset,
        store,
        machine=machine or Machine(),
        allow_missing=allow_missing,
        holdings=holdings,
        progress=progress,
    )
    description = trained.description
    task, names = dataset.task, dataset.class_names
    metrics.check_labels(task, np.asarray(dataset.labels)[dataset.indices(split)], names, split)

    def score_split(name: Split) -> tuple[Feed, Floats]:
        feed = trained.feed(name)
        metrics.check_labels(task, feed.labels, names, name)  # without those that the store lacks
        found = infer(trained.classifier, description.head, feed, precision=trained.precision).probabilities
        trained.check(feed)
        return feed, found

    feed, said = score_split(split)
    thresholds, about = {}, dict[str, Any](split=split)
    if dataset.indices("val"):
        chosen_on, guessed = score_split("val")
        thresholds = {point: _thresholds(point, task, chosen_on, guessed, names) for point in points}
        about["val"] = _on_val(task, chosen_on, guessed, names, resamples=resamples, seed=seed)
    if painted := count_masks(trained.classifier, feed):
        about["overlay"] = painted
    changed = data_changed(folder, dataset)
    about |= {"data_changed": changed} if changed else {}
    learnt = also_learnt(folder, feed)
    about |= {"also_learnt": learnt} if learnt else {}
    with run_folder.held(folder):
        run_folder.keep_earlier(folder, {feed.ids[i]: (feed.pixel_digest(i) or b"").hex() for i in range(len(feed))})
        return leave_scores(
            folder, folder, dataset, feed, said, thresholds, about=about, resamples=resamples, seed=seed
        )


def leave_scores(
    folder: Path,
    run: Path,
    dataset: Dataset,
    feed: Feed,
    said: Floats,
    thresholds: Mapping[str, Sequence[float]],
    *,
    about: Mapping[str, Any],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Score what a run said of the samples of a feed, and leave the figures in a folder.

    Args:
        folder: Where `metrics.json`, the tables and the plots go.
        run: The run.
        dataset: Of the feed.
        feed: The samples.
        said: (n, K) probabilities.
        thresholds: By operating point, the K thresholds, chosen on other samples.
        about: What stands first among the figures.
        resamples: Draws of groups for the intervals.
        seed: Of the draws.

    Returns:
        What `metrics.json` holds; see `evaluate`.
    """
    description = trained_model.load_description(run)
    task, names, positive = dataset.task, dataset.class_names, dataset.positive_class
    subgroups = _subgroups(dataset, feed)
    at_points = {point: _at_point(task, feed, said, chosen, names) for point, chosen in thresholds.items()}
    first = next(iter(at_points.values()), None)
    figures = {
        **about,
        "positive": None if positive is None else names[positive],
        **scores_with_intervals(task, feed.labels, feed.groups, said, names, positive, resamples=resamples, seed=seed),
        "operating_points": at_points,
        "subgroups": by_subgroup(
            task,
            feed.labels,
            said,
            feed.groups,
            subgroups,
            positive=positive,
            threshold=None if positive is None or first is None else first[names[positive]]["threshold"],
            resamples=resamples,
            seed=seed,
        ),
        "bootstrap": {"resamples": resamples, "seed": seed, "groups": len(set(feed.groups))},
        "best_epoch": description.metrics["epoch"],
        "val_auc": description.metrics["val"]["auc"],
        "parameters": description.metrics["parameters"],
        "flops": description.metrics["flops"],
    }
    records.write_json(folder / "metrics.json", figures)
    records.write_csv(folder / "predictions.csv", _prediction_rows(task, feed, said, names, subgroups))
    steps = intervals.reliability(task, feed.labels, said, feed.groups)
    records.write_csv(folder / "decision_curve.csv", _decision_rows(task, feed, said, names, resamples, seed))
    _draw(folder, run, task, feed.labels, said, names, steps, figures)
    return figures


def _on_val(
    task: Task, feed: Feed, said: Floats, names: Sequence[str], *, resamples: int, seed: int
) -> dict[str, int | dict[str, float]]:
    """A few scores on val, with their intervals."""
    found = scores_with_intervals(task, feed.labels, feed.groups, said, names, resamples=resamples, seed=seed)
    return {"n": len(feed), **{key: {"value": found[key], **found["intervals"][key]} for key in ON_VAL}}


def scores_with_intervals(
    task: Task,
    labels: npt.NDArray[np.int64],
    groups: Sequence[str],
    said: Floats,
    names: Sequence[str],
    positive: int | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The scores of `metrics.score`, the `prevalence` of each class, and the `intervals` of both."""
    scorer = metrics.Scorer(task, labels, said, positive)
    draws = intervals.resample(scorer, groups, resamples=resamples, seed=seed)
    hits = metrics.one_hot(task, labels, len(names))
    values = metrics.score(task, labels, said, names, positive)
    ends = {
        **intervals.named_intervals(draws, names),
        **intervals.of_proportions({**scorer.proportions(), "prevalence": (hits, np.ones_like(hits))}, groups, names),
    }
    by_class = {
        name: intervals.of_auc(values["class_auc"][name], ends["class_auc"][name], hits[:, k], groups)
        for k, name in enumerate(names)
    }
    perfect = values["auc"] in (0, 1)
    widest = max(by_class.values(), key=lambda pair: pair["high"] - pair["low"])
    of_mean = widest if perfect else ends["auc"]
    ends |= {"class_auc": by_class, "auc": by_class[names[-1]] if task == "binary" else of_mean}
    shares = [ends["sensitivity"][name] for name in names]
    shares += [ends["specificity"][name] for name in names] if task == "multilabel" else []
    for score in ("balanced_acc", "f1", *(["kappa"] if "kappa" in ends else [])):
        ends[score] = intervals.beyond_a_point(score, values[score], ends[score], shares)
    ends["ap"] = intervals.beyond_a_point("ap", values["ap"], ends["ap"], [ends["auc"]])
    ends["class_ap"] = {
        name: intervals.beyond_a_point("ap", values["class_ap"][name], ends["class_ap"][name], [by_class[name]])
        for name in names
    }
    prevalence = dict(zip(names, hits.mean(axis=0).tolist(), strict=True))
    return {**values, "prevalence": prevalence, "intervals": ends}


def _subgroups(dataset: Dataset, feed: Feed) -> dict[str, list[str]]:
    """What each column of subgroups says of the samples of a feed."""
    known = {sample.id: sample.subgroups for sample in dataset.samples}
    return {name: [known[id][k] for id in feed.ids] for k, name in enumerate(dataset.subgroup_names)}


def _decision_rows(
    task: Task, feed: Feed, said: Floats, names: Sequence[str], resamples: int, seed: int
) -> list[dict[str, object]]:
    """One row per class and threshold."""
    hits = metrics.one_hot(task, feed.labels, len(names))
    return [
        {"class": name, **row}
        for k, name in enumerate(names)
        for row in decision.curve(hits[:, k], said[:, k], feed.groups, resamples=resamples, seed=seed)
    ]


def _thresholds(point: str, task: Task, feed: Feed, said: Floats, names: Sequence[str]) -> list[float]:
    """Choose a threshold per class on the samples of a feed."""
    hits = metrics.one_hot(task, feed.labels, len(names))
    return [operating.choose_threshold(hits[:, k], said[:, k], point) for k in range(len(names))]


def _at_point(
    task: Task, feed: Feed, said: Floats, thresholds: Sequence[float], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Give what thresholds come to on the samples of a feed: by class, with intervals."""
    scorer = operating.PointScorer(metrics.one_hot(task, feed.labels, len(names)), said, thresholds)
    shares, counts = scorer.proportions(), scorer.counts()
    return {
        name: {
            "threshold": thresholds[k],
            **{key: intervals.share(right[:, k], made[:, k], feed.groups) for key, (right, made) in shares.items()},
            "counts": {key: int(value[k]) for key, value in counts.items()},
        }
        for k, name in enumerate(names)
    }


def _draw(
    folder: Path,
    run: Path,
    task: Task,
    labels: npt.NDArray[np.int64],
    said: Floats,
    names: Sequence[str],
    steps: Sequence[Mapping[str, float]],
    figures: Mapping[str, Any],
) -> None:
    """Write the curves, each as a table and as a picture."""
    hits = metrics.one_hot(task, labels, len(names))
    roc = {name: metrics.roc_curve(hits[:, k], said[:, k]) for k, name in enumerate(names)}
    recall = {name: metrics.precision_recall(hits[:, k], said[:, k]) for k, name in enumerate(names)}
    records.write_csv(folder / "roc.csv", _curve_rows(roc, ("fpr", "tpr")))
    records.write_csv(folder / "precision_recall.csv", _curve_rows(recall, ("recall", "precision")))
    records.write_csv(folder / "reliability.csv", steps)
    plots.draw_roc(folder / "roc.png", roc, figures["class_auc"])
    plots.draw_precision_recall(folder / "precision_recall.png", recall, figures["class_ap"])
    plots.draw_reliability(folder / "reliability.png", steps, figures["ece"])
    plots.draw_history(folder / "loss.png", run_folder.read_history(run), best_epoch=figures["best_epoch"])
    if "confusion" in figures:
        plots.draw_confusion(folder / "confusion.png", figures["confusion"], names)


def _prediction_rows(
    task: Task, feed: Feed, said: Floats, class_names: Sequence[str], subgroups: Mapping[str, Sequence[str]]
) -> list[dict[str, object]]:
    """One row per sample: id, group, label, predicted, probabilities, digest of the pixels, subgroups.

    For `multilabel` also 0 or 1 per true class.
    """

    def spell(label: npt.NDArray[np.int64] | np.int64) -> str:
        """Name a class, or all labels that are set, joined by `|`."""
        if not several:
            return class_names[int(label)]
        return "|".join(name for name, present in zip(class_names, np.atleast_1d(label), strict=True) if present)

    predicted, several = metrics.predictions(task, said), task == "multilabel"
    return [
        {
            "id": feed.ids[i],
            "group": feed.groups[i],
            "label": spell(feed.labels[i]),
            "predicted": spell(predicted[i]),
            **{f"p_{name}": float(p) for name, p in zip(class_names, said[i], strict=True)},
            **({f"y_{name}": int(y) for name, y in zip(class_names, feed.labels[i], strict=True)} if several else {}),
            "pixels_sha256": (feed.pixel_digest(i) or b"").hex(),
            **{f"{SUBGROUP}{column}": values[i] for column, values in subgroups.items()},
        }
        for i in range(len(feed))
    ]


Curve = tuple[Floats, Floats, Floats]  # across, up, and the threshold that gives the point


def _curve_rows(curves: Mapping[str, Curve], axes: tuple[str, str]) -> list[dict[str, object]]:
    """One row per class and point; a threshold above every score is left empty."""
    return [
        {"class": name, axes[0]: float(x), axes[1]: float(y), "threshold": float(at) if np.isfinite(at) else ""}
        for name, curve in curves.items()
        for x, y, at in zip(*curve, strict=True)
    ]
