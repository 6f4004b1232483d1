"""Read a held-out split once: scores, a row per sample, curves for programs and plots for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache import Store
from pipeline import metrics, plots, run
from pipeline.data import Dataset, Split
from pipeline.errors import RunError
from pipeline.feed import Feed
from pipeline.loop import infer
from pipeline.progress import Progress, silent
from pipeline.tasks import Task
from pipeline.train import Machine

Floats = npt.NDArray[np.floating[Any]]


def evaluate(
    folder: Path,
    dataset: Dataset,
    store: Store | None,
    *,
    split: Split = "test",
    machine: Machine | None = None,
    allow_missing: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score a finished run on a split, and leave the figures in its folder.

    Writes `metrics.json`, `predictions.csv` (one row per sample), `roc.csv` (one row per class and point), and as PNG
    `roc.png`, `loss.png` and, where a sample has one class, `confusion.png`.

    Args:
        folder: A finished run.
        dataset: The data set it was trained on, or another one with the same classes.
        store: Its features; may be None for a classifier without gates.
        split: What to score on.
        machine: What to compute on.
        allow_missing: Score without the samples that the store lacks.
        progress: Called while images are decoded.

    Returns:
        What `metrics.json` holds.

    Raises:
        RunError: No finished run, other classes, or features of another fingerprint.
        DataError: AUC is not defined on the split.
    """
    machine = machine or Machine()
    device = torch.device(machine.device)
    fingerprint = None if store is None else store.fingerprint
    classifier, description = run.load_classifier(folder, fingerprint=fingerprint, device=device)
    if (dataset.task, tuple(dataset.class_names)) != (description.task, description.class_names):
        msg = (
            f"The model in {str(folder)!r} knows the {description.task} classes {list(description.class_names)}; "
            f"the data set {dataset.name!r} has the {dataset.task} classes {list(dataset.class_names)}: name its own."
        )
        raise RunError(msg)
    labels = np.asarray(dataset.labels)[dataset.indices(split)]
    metrics.check_labels(dataset.task, labels, dataset.class_names, split)
    feed = Feed(
        dataset,
        split,
        store,
        taps=classifier.options.taps,
        image_px=classifier.options.image_px,
        device=device,
        place=machine.place,
        workers=machine.workers,
        allow_missing=allow_missing,
        progress=progress,
    )
    said = infer(classifier, description.head, feed, precision=description.training["precision"]).probabilities
    figures = {
        "split": split,
        **metrics.score(dataset.task, feed.labels, said, dataset.class_names),
        "best_epoch": description.metrics["epoch"],
        "val_auc": description.metrics["val"]["auc"],
        "parameters": description.metrics["parameters"],
    }
    run.write_json(folder / "metrics.json", figures)
    run.write_csv(folder / "predictions.csv", _prediction_rows(dataset.task, feed, said, dataset.class_names))
    curves = _roc_curves(dataset.task, feed.labels, said, dataset.class_names)
    run.write_csv(folder / "roc.csv", _roc_rows(curves))
    plots.draw_roc(folder / "roc.png", curves, figures["class_auc"])
    plots.draw_history(folder / "loss.png", run.read_history(folder), best_epoch=figures["best_epoch"])
    if "confusion" in figures:
        plots.draw_confusion(folder / "confusion.png", figures["confusion"], dataset.class_names)
    return figures


def _prediction_rows(task: Task, feed: Feed, said: Floats, class_names: Sequence[str]) -> list[dict[str, object]]:
    """One row per sample: id, group, label, predicted, and a probability per class."""

    def spell(label: npt.NDArray[np.int64] | np.int64) -> str:
        """Name a class, or all labels that are set, joined by `|`."""
        if task != "multilabel":
            return class_names[int(label)]
        return "|".join(name for name, present in zip(class_names, np.atleast_1d(label), strict=True) if present)

    predicted = metrics.predictions(task, said)
    return [
        {
            "id": feed.ids[i],
            "group": feed.groups[i],
            "label": spell(feed.labels[i]),
            "predicted": spell(predicted[i]),
            **{f"p_{name}": float(p) for name, p in zip(class_names, said[i], strict=True)},
        }
        for i in range(len(feed))
    ]


Curve = tuple[Floats, Floats, Floats]  # false positive rates, true positive rates, thresholds


def _roc_curves(
    task: Task, labels: npt.NDArray[np.int64], said: Floats, class_names: Sequence[str]
) -> dict[str, Curve]:
    hits = metrics.one_hot(task, labels, len(class_names))
    return {name: metrics.roc_curve(hits[:, k], said[:, k]) for k, name in enumerate(class_names)}


def _roc_rows(curves: Mapping[str, Curve]) -> list[dict[str, object]]:
    """One row per class and point; the first threshold, above every score, is left empty."""
    return [
        {"class": name, "fpr": float(x), "tpr": float(y), "threshold": float(at) if np.isfinite(at) else ""}
        for name, curve in curves.items()
        for x, y, at in zip(*curve, strict=True)
    ]
