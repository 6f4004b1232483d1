"""Images from elsewhere as a test set for a model that knows its own classes: theirs are found among them by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

from pipeline.data.dataset import Dataset, Label, Sample, Split, Task, listing, positives
from pipeline.errors import DataError


def as_test_set(
    dataset: Dataset,
    class_names: Sequence[str],
    task: Task,
    *,
    named: Mapping[str, str] | None = None,
    split: Split | None = None,
) -> Dataset:
    """View a data set as test images with the classes of a model.

    Args:
        dataset: Any; where its samples lie in splits, these say nothing about the model.
        class_names: The classes that the model knows, in its order.
        task: What its labels mean.
        named: Which of them a class of the data set is, where it has another name; several may be the same.
        split: Only the samples of this split; None for all.

    Returns:
        The same samples in the same order, with the model's classes: those asked for in test, and the others in val,
        which nothing reads.

    Raises:
        DataError: A class is none that the model knows, `named` names one that is not there, the split is empty, or
            the labels mean something else, or there is no image of some class.
    """
    several = task == "multilabel"
    if several != (dataset.task == "multilabel"):
        message = (
            f"{dataset.name}: its labels are {dataset.task} and those of the model {task}: give data with one class an "
            f"image" + (", as many as there are findings, in label_columns" if several else "")
        )
        raise DataError(message)
    numbers = _numbers(dataset, class_names, dict(named or {}))

    def renamed(label: Label) -> Label:
        present = {numbers[k] for k in positives(label)}
        return tuple(int(k in present) for k in range(len(class_names))) if several else present.pop()

    if split is not None and not dataset.indices(split):
        message = f"{dataset.name}: there is no image in split {split!r}; leave it out to test on all"
        raise DataError(message)
    samples = tuple(
        Sample(
            sample.id,
            renamed(sample.label),
            "test" if split in (None, sample.split) else "val",
            sample.group,
            sample.subgroups,
        )
        for sample in dataset.samples
    )
    absent = set(range(len(class_names))) - {k for sample in samples for k in positives(sample.label)}
    if absent:
        message = (
            f"{dataset.name}: it has no image of {listing(class_names[k] for k in sorted(absent))}, which the model "
            f"tells apart, so no AUC is defined on it: add some, or name the class that they have here with `--class`"
        )
        raise DataError(message)
    return dataclasses.replace(
        dataset,
        samples=samples,
        class_names=tuple(class_names),
        task=task,
        positive=None,
        drawn=None,
        val_drawn=False,
    )


def _numbers(dataset: Dataset, class_names: Sequence[str], named: dict[str, str]) -> list[int]:
    """The model's number of each class of a data set."""
    known = listing(class_names)
    for theirs, ours in named.items():
        for what, name, among in (("data set", theirs, dataset.class_names), ("model", ours, class_names)):
            if name not in among:
                near = difflib.get_close_matches(name, among, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {listing(among)}"
                message = f"{dataset.name}: {theirs!r} is to be {ours!r}, and the {what} has no class {name!r}; {hint}"
                raise DataError(message)
    unknown = [name for name in dataset.class_names if named.get(name, name) not in class_names]
    if unknown:
        like = difflib.get_close_matches(unknown[0].lower(), [name.lower() for name in class_names], n=1, cutoff=0)
        meant = next(name for name in class_names if name.lower() == like[0])
        message = (
            f"{dataset.name}: the model knows no class {listing(unknown)}, only {known}: say which of them it is, as "
            f"by `--class '{unknown[0]}={meant}'`, or leave its images out"
        )
        raise DataError(message)
    return [class_names.index(named.get(name, name)) for name in dataset.class_names]
