"""Stratified splits that keep groups together, drawn from the names alone: the order of the samples plays no part."""

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
    contents: dict[str, Counter[int]] = defaultdict(Counter)
    for label, group in zip(labels, groups, strict=True):
        contents[group].update(positives(label) or [-1])  # a sample without any finding is a class of its own
    totals: Counter[int] = Counter()
    for counts in contents.values():
        totals.update(counts)
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
