"""A run on images from elsewhere: another data set and its own features, scored into a folder of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cache import Store
from pipeline import records
from pipeline.data import Dataset, Split, as_test_set
from pipeline.errors import RunError
from pipeline.evaluate import metrics
from pipeline.evaluate.evaluate import leave_scores
from pipeline.progress import Progress, silent
from pipeline.train import run_folder, trained_model
from pipeline.train.finished_run import Trained
from pipeline.train.forward import infer
from pipeline.train.identity import data_identity
from pipeline.train.painted import count_masks
from pipeline.train.train import Machine

FOLDER = run_folder.EXTERNAL


def evaluate_elsewhere(
    folder: Path,
    name: str,
    dataset: Dataset,
    store: Store | None,
    *,
    named: Mapping[str, str] | None = None,
    split: Split | None = None,
    resamples: int = 2000,
    seed: int = 0,
    machine: Machine | None = None,
    allow_missing: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score a run on an external test set, and leave the figures in `external/NAME` of its folder.

    The thresholds of the operating points are those that `evaluate` chose on the run's own val: none is chosen on the
    external images. Nothing of the run's own test is touched.

    Args:
        folder: A finished run that has been evaluated.
        name: Of the external test set, for the folder.
        dataset: The images.
        store: Their features, made as the run's were; None for a run without gates.
        named: Which class of the run a class of the data set is, where they differ in name.
        split: Only the samples of this split of the data set; None for all.
        resamples: Draws of groups for the intervals.
        seed: Of the draws.
        machine: What to compute on.
        allow_missing: Score without the samples that the store lacks.
        progress: Called while images are decoded.

    Returns:
        What its `metrics.json` holds: as `evaluate`, and `external`: the `data_set`, the `part` of it, how its classes
        were `named`, and `samples_sha256`.

    Raises:
        RunError: No finished run, or one that has not been evaluated; features of another fingerprint; images that the
            run has learnt; or the folder holds the scores of other images.
        DataError: The classes do not fit, or AUC is not defined.
    """
    description = trained_model.load_description(folder)
    own = _own_figures(folder)
    tested = as_test_set(dataset, description.class_names, description.task, named=named, split=split)
    tested = dataclasses.replace(tested, positive=own["positive"])
    external: dict[str, Any] = {
        "data_set": dataset.name,
        "part": split or "all",
        "named": dict(named or {}),
        "samples_sha256": data_identity(tested, None)["samples_sha256"],
    }
    target = folder / FOLDER / name
    _check_target(target, external)
    labels = np.asarray(tested.labels)[tested.indices("test")]
    metrics.check_labels(tested.task, labels, tested.class_names, "test")
    trained = Trained(
        folder, tested, store, machine=machine or Machine(), allow_missing=allow_missing, progress=progress
    )
    feed = trained.feed("test")
    metrics.check_labels(tested.task, feed.labels, tested.class_names, "test")  # without those that the store lacks
    said = infer(trained.classifier, description.head, feed, precision=trained.precision).probabilities
    trained.check(feed)
    thresholds = {
        point: [of_class[name]["threshold"] for name in description.class_names]
        for point, of_class in own["operating_points"].items()
    }
    about = {"split": f"{FOLDER}/{name}", "external": external}
    if painted := count_masks(trained.classifier, feed):
        about["overlay"] = painted
    with run_folder.held(target):
        return leave_scores(target, folder, tested, feed, said, thresholds, about=about, resamples=resamples, seed=seed)


def _own_figures(folder: Path) -> dict[str, Any]:
    """What `evaluate` found on the run's own test set.

    Raises:
        RunError: It has not been asked.
    """
    try:
        figures: dict[str, Any] = records.read_json(folder / "metrics.json")
        return {"positive": figures.get("positive"), "operating_points": figures["operating_points"]}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        message = (
            f"The run {str(folder)!r} has not been evaluated on its own data, which chooses the thresholds of its "
            f"operating points: run `pipeline evaluate` without --data first."
        )
        raise RunError(message) from error


def _check_target(target: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder that holds what other images came to.

    Raises:
        RunError: It does.
    """
    try:
        before = records.read_json(target / "metrics.json")["external"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{str(target)!r} holds something else than an external test: move it away ({error})."
        raise RunError(message) from error
    if before != about:
        message = (
            f"{str(target)!r} holds the scores of other images or classes, of {before.get('data_set')!r}: copy the "
            f"configuration of this data set under another name, or move the folder away."
        )
        raise RunError(message)
