"""What a data set holds, in numbers: images and groups by class and split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.data.dataset import SPLITS, Dataset, positives
from pipeline.errors import DataError

ALL = "all"


@dataclass(frozen=True)
class Counts:
    """Images and groups of a data set.

    Attributes:
        images: How many there are.
        splits: Images by split.
        classes: Images by class name and split; one with several labels counts for each.
        groups: Groups by split.
        largest_group: Images of the largest group; 1 where every image is a group of its own.
    """

    images: int
    splits: Mapping[str, int]
    classes: Mapping[str, Mapping[str, int]]
    groups: Mapping[str, int]
    largest_group: int


def count(dataset: Dataset) -> Counts:
    """Count the samples of a data set."""
    splits: dict[str, int] = dict.fromkeys(SPLITS, 0)
    classes: dict[str, dict[str, int]] = {name: dict.fromkeys(SPLITS, 0) for name in dataset.class_names}
    groups: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for sample in dataset.samples:
        splits[sample.split] += 1
        members = groups[sample.split]
        members[sample.group] = members.get(sample.group, 0) + 1
        for k in positives(sample.label):
            classes[dataset.class_names[k]][sample.split] += 1
    largest = max(n for members in groups.values() for n in members.values())
    return Counts(len(dataset), splits, dict(classes), {split: len(groups[split]) for split in SPLITS}, largest)


def check_expected(dataset: Dataset, expected: Mapping[str, int]) -> None:
    """Refuse a data set that has other numbers of images than its makers, or a paper, say.

    Args:
        dataset: As it was loaded.
        expected: Images by split of the data set's own, before val is drawn from train, or in `all`.

    Raises:
        DataError: A number is another one, or a split is expected of a data set that has none of its own.
    """
    splits = sorted(expected.keys() - {ALL})
    if splits and dataset.drawn is not None:
        message = (
            f"{dataset.name}: data.expect names {', '.join(splits)}, and this data set has no splits of its own: say "
            f"how many images there are in `all`"
        )
        raise DataError(message)
    there = {split: len(dataset.indices(split)) for split in SPLITS} | {ALL: len(dataset)}
    if dataset.val_drawn:
        there["train"], there["val"] = there["train"] + there["val"], 0
    if all(there[what] == number for what, number in expected.items()):
        return
    lines = ", ".join(f"{number} in {what} and found {there[what]}" for what, number in expected.items())
    message = (
        f"{dataset.name}: expected {lines} images (data.expect). Look whether the download is whole and of the version "
        f"that is meant; to use what is there, say so: --set data.expect=null"
    )
    raise DataError(message)
