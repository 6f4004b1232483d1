"""Folds of a cross-validation: every sample is test once, groups are whole, classes have their share everywhere."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import Dataset, Sample, in_fold
from pipeline.errors import DataError
from tests.train.scenes import Arrays, make_dataset

NOTHING = Arrays(np.zeros((0, 1, 1, 3), np.uint8))


def grouped(sizes: list[tuple[int, int]], splits: bool = False) -> Dataset:
    """Groups of so many samples, each of one class; all are train by themselves, or else turn about."""
    names = ("train", "val", "test")
    samples = [
        Sample(f"{g}-{i}", label, names[g % 3] if splits else "train", f"patient {g}")
        for g, (size, label) in enumerate(sizes)
        for i in range(size)
    ]
    return Dataset("grouped", tuple(samples), ("a", "b"), "binary", NOTHING)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=40, max_size=70),
    of=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_every_sample_is_test_once_and_no_group_straddles(sizes: list[int], of: int, seed: int) -> None:
    dataset = grouped([(size, k % 2) for k, size in enumerate(sizes)], splits=True)
    folds = [in_fold(dataset, number, of=of, seed=seed) for number in range(of)]
    tested = Counter(sample.id for fold in folds for sample in fold.samples if sample.split == "test")
    assert tested == Counter(sample.id for sample in dataset.samples)
    for fold in folds:
        assert [dataclasses.replace(s, split="train") for s in fold.samples] == [
            dataclasses.replace(s, split="train") for s in dataset.samples
        ]
        by_group: dict[str, set[str]] = {}
        for sample in fold.samples:
            by_group.setdefault(sample.group, set()).add(sample.split)
        assert all(len(splits) == 1 for splits in by_group.values())


@pytest.mark.parametrize("of", [2, 5, 10])
def test_each_class_has_its_share_in_every_part(of: int) -> None:
    dataset = grouped([(1, 0)] * 140 + [(1, 1)] * 60)
    for number in range(of):
        counts = Counter((sample.split, sample.label) for sample in in_fold(dataset, number, of=of, val=0.2).samples)
        for label, total in ((0, 140), (1, 60)):
            assert abs(counts["test", label] - total / of) <= 1
            assert abs(counts["val", label] - 0.2 * (total - total / of)) <= 1


def test_folds_belong_to_the_seed_and_not_to_the_order_of_the_samples() -> None:
    dataset = make_dataset((60, 20, 20))
    turned = dataclasses.replace(dataset, samples=dataset.samples[::-1])

    def tests_of(dataset: Dataset, seed: int) -> list[str]:
        return sorted(sample.id for sample in in_fold(dataset, 1, of=4, seed=seed).samples if sample.split == "test")

    assert tests_of(dataset, 0) == tests_of(turned, 0) != tests_of(dataset, 1)


def test_several_labels_are_stratified_too() -> None:
    dataset = make_dataset((120, 0, 0), classes=3, task="multilabel")
    for number in range(4):
        labels = np.array([s.label for s in in_fold(dataset, number, of=4).samples if s.split == "test"])
        np.testing.assert_allclose(labels.sum(axis=0), dataset.labels.sum(axis=0) / 4, atol=2)


def test_a_class_of_too_few_groups_is_said_before_anything_is_trained() -> None:
    dataset = grouped([(1, 0)] * 30 + [(6, 1), (6, 1)])
    said = r"in fold 0 of 5, (val|test) has no sample of 'b'; 'b' lies in 2 groups: choose fewer folds"
    with pytest.raises(DataError, match=said):
        in_fold(dataset, 0, of=5)


@pytest.mark.parametrize("number", [-1, 5])
def test_a_fold_that_there_is_not_is_refused(number: int) -> None:
    with pytest.raises(DataError, match=f"no fold {number} of 5; they are numbered from 0 to 4"):
        in_fold(grouped([(1, 0), (1, 1)] * 20), number, of=5)
