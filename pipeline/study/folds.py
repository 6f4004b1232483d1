"""A cross-validation: what its folds come to one by one, and pooled as one test in which every sample is once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import records
from pipeline.errors import RunError
from pipeline.evaluate.compare import Predictions, read_predictions
from pipeline.evaluate.evaluate import scores_with_intervals
from pipeline.study.runs import Planned, Row

POOLED, MEAN = "pooled", "mean"


def pooled(folders: Sequence[Path]) -> Predictions:
    """What the runs of all folds said, each of its own test samples, in the order of the ids.

    Raises:
        RunError: A run has not been evaluated, or the folds share samples or differ in their classes.
    """
    parts = [read_predictions(folder) for folder in folders]
    ids = [name for part in parts for name in part.ids]
    first = parts[0]
    if len(set(ids)) < len(ids) or any(
        (part.task, part.class_names) != (first.task, first.class_names) for part in parts
    ):
        message = (
            f"{str(folders[0])!r} and the other folds are none of one cross-validation, for they share test samples or "
            f"differ in their classes: make the study again with --replace"
        )
        raise RunError(message)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    groups, pixels = ([value for part in parts for value in getattr(part, name)] for name in ("groups", "pixels"))
    return Predictions(
        ids=tuple(ids[i] for i in order),
        groups=tuple(groups[i] for i in order),
        labels=np.concatenate([part.labels for part in parts])[order],
        probabilities=np.concatenate([part.probabilities for part in parts])[order],
        class_names=first.class_names,
        task=first.task,
        pixels=tuple(pixels[i] for i in order),
        positive=first.positive,
    )


def rows_of(runs: Sequence[Planned], scores: Sequence[str], *, resamples: int) -> list[Row]:
    """The table of one cross-validation: a row per score and fold, then the pooled one and the mean of the folds.

    Args:
        runs: All folds of a cell and seed, done.
        scores: Names of the scores.
        resamples: Draws of groups for the interval of the pooled score.

    Returns:
        The columns of the cell; `seed`; `score`; `fold` (a number, `pooled` or `mean`); `n` and `groups` it rests on;
        `value`; `low` and `high` of its 95 % interval over groups, None for the mean, whose folds share their training
        samples; `sd` of the folds, for the mean alone; `run`.
    """
    said = pooled([planned.folder for planned in runs])
    all_scores = scores_with_intervals(
        said.task, said.labels, said.groups, said.probabilities, said.class_names, said.positive, resamples=resamples
    )
    figures = [_figures(planned.folder) for planned in runs]
    about = {**runs[0].cell, "seed": runs[0].seed}
    whole = {"n": len(said.ids), "groups": len(set(said.groups))}
    rows: list[Row] = []
    for score in scores:
        if score not in all_scores:
            continue
        for planned, of_fold in zip(runs, figures, strict=True):
            rows.append(
                {
                    **about,
                    "score": score,
                    "fold": planned.fold,
                    "n": of_fold["n"],
                    "groups": of_fold["bootstrap"]["groups"],
                    **_value(of_fold, score),
                    "sd": None,
                    "run": str(planned.folder),
                }
            )
        rows.append(
            {**about, "score": score, "fold": POOLED, **whole, **_value(all_scores, score), "sd": None, "run": ""}
        )
        values = np.array([of_fold[score] for of_fold in figures])
        mean = {"value": float(values.mean()), "low": None, "high": None, "sd": float(values.std(ddof=1))}
        rows.append({**about, "score": score, "fold": MEAN, **whole, **mean, "run": ""})
    return rows


def _value(figures: Mapping[str, Any], score: str) -> Row:
    ends = figures["intervals"].get(score, {"low": None, "high": None})
    return {"value": figures[score], "low": ends["low"], "high": ends["high"]}


def _figures(folder: Path) -> dict[str, Any]:
    """What `evaluate` found of a run.

    Raises:
        RunError: It has not been asked.
    """
    try:
        figures: dict[str, Any] = records.read_json(folder / "metrics.json")
    except (OSError, ValueError) as error:
        message = f"There are no metrics of {str(folder)!r} ({error}): make the study again with --replace."
        raise RunError(message) from error
    return figures
