"""Cross-validation: a data set with the splits of one fold, whatever splits it has by itself."""

from __future__ import annotations

import dataclasses

from pipeline.data.dataset import SPLITS, Dataset, Split, listing, positives
from pipeline.data.splits import balanced_parts, stratified_split
from pipeline.errors import DataError


def in_fold(dataset: Dataset, number: int, *, of: int, seed: int = 0, val: float = 0.15) -> Dataset:
    """View a data set in one fold: a part of it is test, and of the rest a share is val.

    Every sample is test in exactly one of the folds. Groups stay whole, and each class has about its share in every
    part. Parts are drawn from names and the seed, so they are the same on every machine; where samples come or go they
    are drawn anew.

    Args:
        dataset: All of its samples take part, whatever their own splits are.
        number: Of the fold, from 0.
        of: How many folds there are.
        seed: Another seed, other folds.
        val: Share of the samples that are not test.

    Returns:
        The same samples in the same order, under a name that says the fold.

    Raises:
        DataError: There are fewer folds than asked for, or a split would be without some class.
    """
    if not 0 <= number < of:
        message = f"{dataset.name}: there is no fold {number} of {of}; they are numbered from 0 to {of - 1}"
        raise DataError(message)
    labels, groups = [sample.label for sample in dataset.samples], [sample.group for sample in dataset.samples]
    parts = balanced_parts(labels, groups, dict.fromkeys(range(of), 1 / of), seed=seed)
    rest = [i for i, part in enumerate(parts) if part != number]
    drawn = stratified_split(
        [labels[i] for i in rest], [groups[i] for i in rest], fractions={"val": val, "test": 0.0}, seed=seed
    )
    splits: list[Split] = ["test"] * len(dataset)
    for i, split in zip(rest, drawn, strict=True):
        splits[i] = split
    _check(dataset, splits, f"fold {number} of {of}")
    samples = tuple(
        dataclasses.replace(sample, split=split) for sample, split in zip(dataset.samples, splits, strict=True)
    )
    return dataclasses.replace(
        dataset, name=f"{dataset.name}, fold {number} of {of}", samples=samples, drawn=None, val_drawn=False
    )


def _check(dataset: Dataset, splits: list[Split], fold: str) -> None:
    """Refuse a fold that could not be trained, chosen or scored on.

    Raises:
        DataError: A split lacks a class.
    """
    found = {split: set[int]() for split in SPLITS}
    for sample, split in zip(dataset.samples, splits, strict=True):
        found[split] |= set(positives(sample.label))
    for split, present in found.items():
        absent = [k for k in range(len(dataset.class_names)) if k not in present]
        if absent:
            of_class = {sample.group for sample in dataset.samples if absent[0] in positives(sample.label)}
            message = (
                f"{dataset.name}: in {fold}, {split} has no sample of "
                f"{listing(dataset.class_names[k] for k in absent)}; {dataset.class_names[absent[0]]!r} lies in "
                f"{len(of_class)} groups: choose fewer folds, another seed of them, or a larger share of val"
            )
            raise DataError(message)
