"""Splits and nested parts that keep groups together, drawn from names: their order plays no part.

Splits are drawn in one of two ways. `steady`, the default: a number drawn from the seed and the group's name alone
decides, so no group ever moves because of another; shares hold on average (of n groups val and test differ from their
share p by about sqrt(n p (1 - p)) groups). `balanced`: each class has its share to within about a sample, and a data
set that changes is drawn anew. A file of splits that is written once and grown would give both, on one machine: it is
state that must be carried along, and two people who extend the same data would not have the same splits.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from pipeline.data.dataset import LISTED, SPLITS, Draw, Label, Split, positives
from pipeline.errors import DataError

Part = TypeVar("Part")

FRACTIONS: Mapping[Split, float] = MappingProxyType({"val": 0.15, "test": 0.25})
_SEEDS_TRIED = 200  # for a draw that leaves no class out of a split
_DRAWS_TRIED = 500_000  # of groups, in all: a second


def draw_splits(
    labels: Sequence[Label],
    groups: Sequence[str],
    class_names: Sequence[str],
    *,
    draw: Draw | None,
    fractions: Mapping[Split, float],
    seed: int,
    where: str,
) -> list[Split]:
    """Draw a split for every sample of a data set that has none of its own.

    Args:
        labels: Of each sample.
        groups: Of each sample; samples of one group get one split.
        class_names: By class number.
        draw: `steady` or `balanced`, see above; None makes everything test.
        fractions: Shares of val and test, in [0, 1); train is the rest. A share of 0 leaves that split empty.
        seed: Another seed, another draw.
        where: What the data set is called in messages.

    Raises:
        DataError: The fractions leave nothing for train, or a class is missing in a split of a steady draw although
            another seed would give each split some of it.
    """
    if draw is None:
        return ["test"] * len(groups)
    if draw == "balanced":
        return stratified_split(labels, groups, fractions=fractions, seed=seed)
    splits = steady_split(groups, fractions=fractions, seed=seed)
    lacking = _lacking(labels, splits, fractions, len(class_names))
    if lacking:
        tried = range(seed + 1, seed + 1 + min(_SEEDS_TRIED, _DRAWS_TRIED // len(groups)))
        for other in tried:
            if not _lacking(labels, steady_split(groups, fractions=fractions, seed=other), fractions, len(class_names)):
                pairs = ", ".join(f"no {class_names[k]!r} in {split}" for split, k in lacking[:LISTED])
                message = (
                    f"{where}: the draw of splits leaves {pairs}. Set data.split.seed to {other} (every image is drawn "
                    f"anew, and no class is missing), or data.split.draw to 'balanced', or to null for data to test on "
                    f"only, or give splits of your own"
                )
                raise DataError(message)
    return splits


class Settled(NamedTuple):
    """The splits of a data set, and what of them was drawn.

    Attributes:
        splits: Of each sample.
        drawn: How all of them were drawn; None where the data set has its own.
        val_drawn: Whether val was drawn from the train that the data set comes with.
    """

    splits: list[Split]
    drawn: Draw | None
    val_drawn: bool


def settle_splits(
    own: Sequence[Split],
    labels: Sequence[Label],
    groups: Sequence[str],
    class_names: Sequence[str],
    *,
    draw: Draw | None,
    fractions: Mapping[Split, float],
    seed: int,
    where: str,
) -> Settled:
    """Take the splits that a data set has, and draw what it lacks: all of them, or val from its train.

    Args:
        own: Splits that the data set has, of each sample; empty if it has none.
        labels: Of each sample.
        groups: Of each sample; samples of one group that is drawn stay together.
        class_names: By class number.
        draw: `steady` or `balanced`, see above; None draws nothing: all is test, or as it came.
        fractions: Shares of val and test. Where only val is drawn, its share is one of train.
        seed: Another seed, another draw.
        where: What the data set is called in messages.

    Raises:
        DataError: See `draw_splits`.
    """
    if not own:
        drawn = draw_splits(labels, groups, class_names, draw=draw, fractions=fractions, seed=seed, where=where)
        return Settled(drawn, draw, val_drawn=False)
    splits = list(own)
    val: dict[Split, float] = {"val": fractions.get("val", 0.0)}
    train = [i for i, split in enumerate(splits) if split == "train"]
    if draw is None or not val["val"] or not train or "val" in splits:
        return Settled(splits, None, val_drawn=False)
    of_train = [labels[i] for i in train], [groups[i] for i in train]
    for i, split in zip(
        train, draw_splits(*of_train, class_names, draw=draw, fractions=val, seed=seed, where=where), strict=True
    ):
        splits[i] = split
    return Settled(splits, None, val_drawn=True)


def _lacking(
    labels: Sequence[Label], splits: Sequence[Split], fractions: Mapping[Split, float], classes: int
) -> list[tuple[Split, int]]:
    """Pairs of a split that is wanted and a class that has no sample in it."""
    found = {(split, k) for label, split in zip(labels, splits, strict=True) for k in positives(label)}
    wanted = [split for split in SPLITS if split == "train" or fractions.get(split, 0.0) > 0]
    return [(split, k) for split in wanted for k in range(classes) if (split, k) not in found]


def steady_split(groups: Sequence[str], *, fractions: Mapping[Split, float], seed: int) -> list[Split]:
    """Draw a split for every sample from its group's name and the seed, and from nothing else.

    Test takes the lowest numbers drawn, val the highest: another share of one of them exchanges groups with train only.

    Args:
        groups: Of each sample.
        fractions: Shares of val and test, in [0, 1); train is the rest.
        seed: Another seed, another draw.

    Raises:
        DataError: The fractions leave nothing for train.
    """
    val, test = _shares(fractions)
    drawn: dict[str, Split] = {}
    for group in groups:
        if group not in drawn:
            number = int.from_bytes(_draw(seed, group)[:8], "big") / 2**64
            drawn[group] = "test" if number < test else "val" if number >= 1 - val else "train"
    return [drawn[group] for group in groups]


def even_seed(
    labels: Sequence[Label], groups: Sequence[str], *, fractions: Mapping[Split, float], tries: int = 20
) -> int:
    """The seed, of the first few, whose steady draw gives each split nearest its share of each class.

    Args:
        labels: Of each sample.
        groups: Of each sample.
        fractions: Shares of val and test, in [0, 1); train is the rest.
        tries: How many seeds to try.
    """
    val, test = _shares(fractions)
    totals = _totals(_contents(labels, groups))
    shares: dict[Split, float] = {"val": val, "test": test}
    wanted = {(split, k): share * n for split, share in shares.items() for k, n in totals.items()}

    def distance(seed: int) -> tuple[float, int]:
        drawn = steady_split(groups, fractions=fractions, seed=seed)
        found = Counter(
            (split, k) for label, split in zip(labels, drawn, strict=True) for k in positives(label) or (-1,)
        )
        return max((abs(found[key] - n) / n for key, n in wanted.items() if n > 0), default=0.0), seed

    return min(map(distance, range(tries)))[1]


def _shares(fractions: Mapping[Split, float]) -> tuple[float, float]:
    """The shares of val and test.

    Raises:
        DataError: They leave nothing for train.
    """
    val, test = fractions.get("val", 0.0), fractions.get("test", 0.0)
    if val < 0 or test < 0 or val + test >= 1:
        message = (
            f"the shares of val and test are {val!r} and {test!r}; they must not be negative and add to less than 1"
        )
        raise DataError(message)
    return val, test


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
    val, test = _shares(fractions)
    shares = {split: share for split, share in zip(SPLITS, (1 - val - test, val, test), strict=True) if share > 0}
    return balanced_parts(labels, groups, shares, seed=seed)


def balanced_parts(
    labels: Sequence[Label], groups: Sequence[str], shares: Mapping[Part, float], *, seed: int
) -> list[Part]:
    """Deal groups out to parts so that each class has about a part's share in it; see `stratified_split`.

    Args:
        labels: Of each sample.
        groups: Of each sample; samples of one group go to one part.
        shares: Of each part, which add to 1.
        seed: Another seed, another draw.

    Returns:
        The part of each sample.
    """
    contents = _contents(labels, groups)
    totals = _totals(contents)
    lacking = {part: {k: share * total for k, total in totals.items()} for part, share in shares.items()}
    chosen: dict[str, Part] = {}
    for group in sorted(contents, key=lambda g: (-contents[g].total(), _draw(seed, g))):
        counts = contents[group]
        part = max(lacking, key=lambda p: _need(counts, lacking[p], totals))
        chosen[group] = part
        for k, n in counts.items():
            lacking[part][k] -= n
    return [chosen[group] for group in groups]


def _draw(seed: int, group: str) -> bytes:
    """A random number that belongs to a group and a seed."""
    return hashlib.sha256(f"{seed}:{group}".encode(errors="surrogatepass")).digest()


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


def few_shots(
    labels: Sequence[Label], groups: Sequence[str], class_names: Sequence[str], *, shots: int, seed: int
) -> list[bool]:
    """Choose about so many samples of each class and whole groups; choices of one seed are nested.

    The groups that hold a class are put in an order drawn from their names and the seed; a group is taken if the middle
    of the class's samples in it lies within the first `shots` of them. Without groups of several samples each class has
    exactly `shots`; else it differs by less than half a group, and the first group of a class is always taken. A group
    of several classes brings all of its samples along. Where samples have several labels, each label has that many
    samples with it, and there are as many without any label, or all such samples where there are fewer: our choice.

    Args:
        labels: Of each sample.
        groups: Of each sample; samples of one group come and go together.
        class_names: By class number.
        shots: Samples of each class, at least 1.
        seed: Another seed, another draw.

    Returns:
        Whether each sample is chosen, the same for the same groups and labels whatever their order.

    Raises:
        DataError: A class has fewer samples.
    """
    contents = _contents(labels, groups)
    totals = _totals(contents)
    short = [f"{name!r} has {totals[k]}" for k, name in enumerate(class_names) if totals[k] < shots]
    if short:
        message = (
            f"train.shots is {shots!r}, and of some classes there are fewer images to train on: {', '.join(short)}; "
            f"choose at most {min(totals[k] for k in range(len(class_names)))}, or set train.fraction instead"
        )
        raise DataError(message)
    order = sorted(contents, key=lambda group: _draw(seed, group))
    chosen: set[str] = set()
    for k in totals:
        before = 0
        for group in (group for group in order if contents[group][k]):
            if not before or before + contents[group][k] / 2 <= shots:
                chosen.add(group)
            before += contents[group][k]
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
