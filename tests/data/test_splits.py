"""Drawn splits: every class has its share, groups stay whole, and only names decide."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.splits import split_named, stratified_split
from pipeline.errors import DataError

SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
FRACTIONS = {"val": 0.15, "test": 0.25}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(0, 5))
def test_without_groups_every_class_has_its_share_to_within_one(labels: list[int], seed: int) -> None:
    groups = [str(i) for i in range(len(labels))]
    splits = stratified_split(labels, groups, fractions=FRACTIONS, seed=seed)
    found = Counter(zip(labels, splits, strict=True))
    for label, total in Counter(labels).items():
        for split, share in SHARES.items():
            assert abs(found[label, split] - share * total) < 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=80), st.randoms())
def test_groups_stay_whole_and_the_order_plays_no_part(pairs: list[tuple[int, int]], order: random.Random) -> None:
    def draw(items: list[tuple[int, int]]) -> dict[int, set[str]]:
        splits = stratified_split([k for k, _ in items], [str(g) for _, g in items], fractions=FRACTIONS, seed=3)
        found: dict[int, set[str]] = {}
        for (_, group), split in zip(items, splits, strict=True):
            found.setdefault(group, set()).add(split)
        return found

    drawn = draw(pairs)
    assert all(len(splits) == 1 for splits in drawn.values())
    shuffled = pairs.copy()
    order.shuffle(shuffled)
    assert draw(shuffled) == drawn


def test_patients_of_one_to_three_images_come_close_to_the_shares() -> None:
    rng = random.Random(0)
    labels: list[int] = []
    groups: list[str] = []
    for patient in range(200):
        images = rng.randint(1, 3)
        labels += [patient % 3] * images
        groups += [f"p{patient}"] * images
    splits = stratified_split(labels, groups, fractions=FRACTIONS, seed=0)
    found = Counter(zip(labels, splits, strict=True))
    for label, total in Counter(labels).items():
        for split, share in SHARES.items():
            assert abs(found[label, split] - share * total) <= 2


def test_multilabel_findings_are_spread_one_by_one() -> None:
    rng = random.Random(1)
    labels = [tuple(int(rng.random() < p) for p in (0.5, 0.2, 0.05)) for _ in range(400)]
    splits = stratified_split(labels, [str(i) for i in range(400)], fractions=FRACTIONS, seed=0)
    for k in range(3):
        total = sum(label[k] for label in labels)
        for split, share in SHARES.items():
            found = sum(label[k] for label, s in zip(labels, splits, strict=True) if s == split)
            assert abs(found - share * total) <= 3


def test_another_seed_draws_other_samples() -> None:
    groups = [str(i) for i in range(50)]
    first, second = (stratified_split([0] * 50, groups, fractions=FRACTIONS, seed=s) for s in (0, 1))
    assert first != second
    assert first == stratified_split([0] * 50, groups, fractions=FRACTIONS, seed=0)


def test_a_share_of_zero_leaves_its_split_empty() -> None:
    labels = [0, 0, 0, 1, 1, 1, 1] * 5
    splits = stratified_split(labels, [str(i // 2) for i in range(35)], fractions={"val": 0, "test": 0.4}, seed=0)
    assert set(splits) == {"train", "test"}


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.2), (0.5, 0.5), (0.1, 1.0)])
def test_shares_that_leave_no_train_are_refused(val: float, test: float) -> None:
    with pytest.raises(DataError, match=f"the shares of val and test are {val} and {test}; they must"):
        stratified_split([0, 1], ["a", "b"], fractions={"val": val, "test": test}, seed=0)


@pytest.mark.parametrize(
    ("word", "split"),
    [("train", "train"), ("Training", "train"), (" VALID ", "val"), ("val", "val"), ("test", "test"), ("dev", None)],
)
def test_usual_spellings_of_splits(word: str, split: str | None) -> None:
    assert split_named(word) == split
