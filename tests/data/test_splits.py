"""Drawn splits: steady ones are each group's own, balanced ones give every class its share; only names decide."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.splits import draw_splits, split_named, steady_split, stratified_split
from pipeline.errors import DataError

SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
FRACTIONS = {"val": 0.15, "test": 0.25}


@given(st.sets(st.text(), min_size=1), st.sets(st.text(), min_size=1), st.integers(0, 5))
def test_a_steady_split_is_a_group_s_own(some: set[str], others: set[str], seed: int) -> None:
    alone, together = (
        dict(zip(names, steady_split(names, fractions=FRACTIONS, seed=seed), strict=True))
        for names in (sorted(some), sorted(some | others, reverse=True))
    )
    assert alone.items() <= together.items()


def test_steady_shares_hold_on_average_for_every_class_and_seed() -> None:
    """Within four standard deviations of a binomial: of n groups with share p, sqrt(n p (1 - p))."""
    for seed in range(20):
        for name, n in (("common", 900), ("rare", 100)):
            found = Counter(steady_split([f"{name}/{i}.png" for i in range(n)], fractions=FRACTIONS, seed=seed))
            for split, share in SHARES.items():
                assert abs(found[split] - share * n) <= 4 * (n * share * (1 - share)) ** 0.5, (seed, name, split)
    mean = Counter(
        split
        for seed in range(50)
        for split in steady_split([str(i) for i in range(200)], fractions=FRACTIONS, seed=seed)
    )
    for split, share in SHARES.items():
        assert abs(mean[split] / 10_000 - share) < 0.02


def test_another_share_of_one_split_exchanges_groups_with_train_alone() -> None:
    groups = [str(i) for i in range(300)]
    before = steady_split(groups, fractions={"val": 0.15, "test": 0.25}, seed=0)
    after = steady_split(groups, fractions={"val": 0.3, "test": 0.25}, seed=0)
    assert {pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]} == {("train", "val")}


def test_a_draw_that_leaves_a_class_out_names_a_seed_that_does_not() -> None:
    names = [f"{k}/{i}" for k in "ab" for i in range(6)]
    labels = [0] * 6 + [1] * 6

    def draw(seed: int) -> list[str]:
        return list(draw_splits(labels, names, "ab", draw="steady", fractions=FRACTIONS, seed=seed, where="mine"))

    pattern = r"mine: the draw of splits leaves no '[ab]' in (train|val|test).*\. Set data\.split\.seed to (\d+) "
    with pytest.raises(DataError, match=pattern) as refused:
        draw(3)
    said = re.search(pattern, str(refused.value))
    assert said
    assert set(zip(labels, draw(int(said[2])), strict=True)) == {(k, split) for k in (0, 1) for split in SHARES}
    few = draw_splits([0, 0, 1], ["x", "y", "z"], "ab", draw="steady", fractions=FRACTIONS, seed=0, where="mine")
    assert len(few) == 3  # no seed can help, so that what needs all classes says what it needs


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
