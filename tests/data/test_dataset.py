"""What a data set refuses to be, and what it says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pipeline.data import Dataset, Image, Mask, Sample, identical_across_splits
from pipeline.errors import DataError


@dataclass
class Nothing:
    """A source without pixels."""

    def read(self, index: int) -> Image:
        return np.full((1, 1, 3), index, np.uint8)

    def stamp(self, index: int) -> str | None:
        return f"stamp {index}"

    def mask(self, index: int) -> Mask | None:
        return None


def sample(name: str, label: int | tuple[int, ...] = 0, split: Any = "train", group: str | None = None) -> Sample:
    return Sample(name, label, split, name if group is None else group)


def dataset(*samples: Sample, classes: tuple[str, ...] = ("a", "b"), task: Any = "binary") -> Dataset:
    return Dataset("set", samples, classes, task, Nothing())


FINE = (sample("1", 0), sample("2", 1))


def test_it_answers_in_the_order_of_its_samples() -> None:
    made = dataset(*FINE, sample("3", 1, "val"), sample("4", 0, "test"), sample("5", 0, "train"))
    assert len(made) == 5
    assert made.labels.tolist() == [0, 1, 1, 0, 0]
    assert made.labels.dtype == np.int64
    assert (made.indices("train"), made.indices("val"), made.indices("test")) == ([0, 1, 4], [2], [3])
    assert made.read(3)[0, 0, 0] == 3
    assert (made.stamp(2), made.mask(2)) == ("stamp 2", None)


def test_multilabel_has_a_row_of_bits_per_sample() -> None:
    made = dataset(sample("1", (0, 1, 1)), sample("2", (1, 0, 0)), classes=("a", "b", "c"), task="multilabel")
    assert made.labels.tolist() == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((), "set: there are no samples"),
        ((sample(""), *FINE), "ids must be printable and not empty"),
        ((sample("x\ny"), *FINE), r"ids must be printable.*'x\\ny'"),
        ((*FINE, sample("2", 0, "test")), r"1 ids occur more than once: '2 \(train, test\)'; keep one sample per id"),
        ((*FINE, sample("3", 2)), "a label of this binary task is one of 0 to 1, and 1 samples differ: '3: 2'"),
        ((*FINE, sample("3", (0, 1))), r"a label of this binary task is one of 0 to 1.*'3: \(0, 1\)'"),
        (
            (*FINE, sample("3", 0, "train", "p7"), sample("4", 0, "test", "p7"), sample("5", 1, "val", "p7")),
            r"1 groups lie in more than one split: 'p7 \(train, val, test\)'; move each group into one split",
        ),
        ((sample("1", 0), sample("2", 0)), "no sample belongs to 'b'; add images of it or remove the class"),
        ((sample("1", 0), sample("2", 1, "val")), r"train has no sample of 'b \(val 1, test 0\)'"),
        ((sample("1", 0, "test"), sample("2", 1)), r"train has no sample of 'a \(val 0, test 1\)'"),
    ],
)
def test_a_data_set_that_cannot_be_trained_on_is_refused(samples: tuple[Sample, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset(*samples)


@pytest.mark.parametrize(
    ("classes", "task", "message"),
    [
        (("a",), "multiclass", "a multiclass task needs at least two classes and has 1: 'a'"),
        (("a", "b", "c"), "binary", "a binary task needs exactly two classes and has 3"),
        (("a", "b"), "multilabel", "a label of this multilabel task is 2 values of 0 or 1"),
    ],
)
def test_classes_must_fit_the_task(classes: tuple[str, ...], task: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset(*FINE, classes=classes, task=task)


def test_a_long_list_is_cut_and_counted() -> None:
    many = [sample(f"x{i}", i % 2) for i in range(12)] * 2
    with pytest.raises(DataError, match=r"'x9 \(train, train\)' and 2 more; keep"):
        dataset(*many)


def test_equal_pixels_in_two_splits_are_found() -> None:
    made = dataset(*FINE, sample("3", 1, "val"), sample("4", 0, "test"), sample("5", 0, "train"))
    digests = np.zeros((5, 32), np.uint8)
    digests[:, 0] = [7, 8, 9, 7, 8]  # 1 and 4 in train and test; 2 and 5 both in train
    assert identical_across_splits(made, digests) == (("1", "4"),)
    digests[[0, 2, 3]] = 0  # these could not be read, which makes them no copies of each other
    assert identical_across_splits(made, digests) == ()
