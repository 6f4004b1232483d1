"""Stratified splits and nested parts that keep groups together, drawn from names: their order plays no part."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pipeline.data.dataset import SPLITS, Label, Split, positives
from pipeline.errors import DataError

FRACTIONS: Mapping[Split, float] = MappingProxyType({"val": 0.15, "test": 0.25})


def stratified_split(
    labels: Sequence[Label], groups: Sequence[str], *, fractions: Mapping[Split, float], seed: int
) -> list[Split]:
    """Draw a split for every sample so that each class has about its share in each split.

    Groups are taken from the largest to the smallest, equal ones in an order drawn from the seed, and each goes to
    the split that lacks most of its classes. Without groups of several samples every class has its share in every
    split to within one sample.

    Args:
        labels: Of each sample.
        groups: Of each sample; samples of one group get one split.
        fractions: Shares of val and test, in [0, 1); train is the rest. A share of 0 leaves that split empty.
        seed: Another seed, another draw.

    Returns:
        The split of each sample, the same for the same groups and labels whatever their order.

    Raises:
        DataError: The fractions leave nothing for train.
    """
    val, test = fractions.get("val", 0.0), fractions.get("test", 0.0)
    if val < 0 or test < 0 or val + test >= 1:
        message = (
            f"the shares of val and test are {val!r} and {test!r}; they must not be negative and add to less than 1"
        )
        raise DataError(message)
    contents = _contents(labels, groups)
    totals = _totals(contents)
    shares = {split: share for split, share in zip(SPLITS, (1 - val - test, val, test), strict=True) if share > 0}
    lacking = {split: {k: share * total for k, total in totals.items()} for split, share in shares.items()}
    chosen: dict[str, Split] = {}
    for group in sorted(contents, key=lambda g: (-contents[g].total(), _draw(seed, g))):
        counts = contents[group]
        split = max(lacking, key=lambda s: _need(counts, lacking[s], totals))
        chosen[group] = split
        for k, n in counts.items():
            lacking[split][k] -= n
    return [chosen[group] for group in groups]


def _draw(seed: int, group: str) -> bytes:
    """A random number that belongs to a group and a seed."""
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()


def _need(counts: Mapping[int, int], lacking: Mapping[int, float], totals: Mapping[int, int]) -> float:
    """How much a split lacks what a group brings; rare classes weigh more."""
    return sum(n * lacking[k] / totals[k] for k, n in counts.items())


def stratified_part(labels: Sequence[Label], groups: Sequence[str], *, fraction: float, seed: int) -> list[bool]:
    """Choose a part of the samples with about that share of each class and whole groups; parts of one seed are nested.

    Each group counts for the rarest class it holds. The groups of a class are put in an order drawn from their names
    and the seed; a group is in the part if the middle of it lies within the first `fraction` of the class's samples.
    Without groups of several samples a class has its share to the nearest whole number. The first group of every class
    is in every part, so that no class is lost.

    Args:
        labels: Of each sample.
        groups: Of each sample; samples of one group come and go together.
        fraction: Share, in (0, 1]; 1 takes every sample.
        seed: Another seed, another draw.

    Returns:
        Whether each sample is in the part, the same for the same groups and labels whatever their order.

    Raises:
        DataError: The share is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        message = f"the share of the samples is {fraction!r}; it must be above 0 and at most 1"
        raise DataError(message)
    contents = _contents(labels, groups)
    totals = _totals(contents)
    of_class: dict[int, list[str]] = defaultdict(list)
    for group, counts in contents.items():
        of_class[min(counts, key=lambda k: (totals[k], k))].append(group)
    sizes = Counter(groups)
    chosen: set[str] = set()
    for members in of_class.values():
        members.sort(key=lambda group: _draw(seed, group))
        total, before = sum(sizes[group] for group in members), 0
        chosen.add(members[0])
        for group in members:
            if before + sizes[group] / 2 <= fraction * total:
                chosen.add(group)
            before += sizes[group]
    return [group in chosen for group in groups]


def _contents(labels: Sequence[Label], groups: Sequence[str]) -> dict[str, Counter[int]]:
    """How many samples of each class a group holds; a sample without any finding is of a class of its own."""
    contents: dict[str, Counter[int]] = defaultdict(Counter)
    for label, group in zip(labels, groups, strict=True):
        contents[group].update(positives(label) or [-1])
    return contents


def _totals(contents: Mapping[str, Counter[int]]) -> Counter[int]:
    totals: Counter[int] = Counter()
    for counts in contents.values():
        totals.update(counts)
    return totals


def split_named(word: str) -> Split | None:
    """The split that a folder's name or a table's entry means, or None: `train`, `Training`, `valid`, ..."""
    return _NAMES.get(word.strip().lower())


_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
