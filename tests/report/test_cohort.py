"""Every image is somewhere on the way from files to figures, and the numbers add up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.evaluate.evaluate import evaluate
from pipeline.report.cohort import follow
from pipeline.train.train import train
from tests.report.conftest import Case, Page, hostile_scene
from tests.train.scenes import PLAIN, QUICK, TINY, do, make_dataset, make_store


def test_an_image_that_is_not_used_is_set_aside_or_missing_or_left_out() -> None:
    dataset = dataclasses.replace(hostile_scene(), ignored={".heic": 2, ".gif": 1})
    by_split = {split: [dataset.samples[i].id for i in dataset.indices(split)] for split in ("train", "val", "test")}
    aside = {by_split["train"][0]: "scan.png: cannot be read", by_split["test"][0]: "other.png: cannot be read"}
    stored = {sample.id for sample in dataset.samples} - set(aside) - {by_split["test"][1]}
    used = {"train": by_split["train"][10:], "val": by_split["val"], "test": by_split["test"][2:]}
    found = follow(dataset, used, aside, stored)
    train_, val, test = found.parts
    assert (train_.images, train_.set_aside, train_.missing, train_.left_out, train_.used) == (24, 1, 0, 9, 14)
    assert (train_.groups, train_.used_groups) == (12, 7)
    assert (val.images, val.used) == (12, 12)
    assert (test.set_aside, test.missing, test.left_out, test.used) == (1, 1, 0, 10)
    for part in found.parts:
        assert part.images == part.set_aside + part.missing + part.left_out + part.used
    assert found.found == len(dataset) + 3
    assert sum(found.reasons.values()) == 2


@pytest.fixture(scope="module")
def partial(tmp_path_factory) -> Case:
    """A run on half of the training set, whose store lacks two images of test, beside files that are no images."""
    folder = tmp_path_factory.mktemp("partial")
    dataset = dataclasses.replace(hostile_scene(), ignored={".heic": 2})
    lacking = set(dataset.indices("test")[:2])
    store = make_store(folder / "scene.zarr", dataset, only=set(range(len(dataset))) - lacking)
    options = dataclasses.replace(QUICK, epochs=1, fraction=0.5)
    train(dataset, store, folder / "run", options=options, allow_missing=True, model=TINY)
    evaluate(folder / "run", dataset, store, resamples=50, allow_missing=True)
    return Case(folder / "run", dataset, Path(folder / "scene.zarr"))


def test_the_flow_on_the_page_says_where_each_went(partial: Case) -> None:
    text = Page(partial.page()).text
    assert "Found: 50 files" in text
    assert "Ignored, being no images of the data set: 2 (.heic 2)" in text
    assert "In the data set: 48 images of 24 patients" in text
    assert "test: 12 images of 6 patients2 missing in the storescored: 10 images of 5 patients" in text
    assert "train: 24 images of 12 patients12 left out by train.fractiontrained on: 12 images" in text
    assert "Of 50 files found 34 are used." in text


def test_few_shots_are_named_as_what_left_images_out(tmp_path) -> None:
    dataset = make_dataset()
    do(dataset, None, tmp_path, model=PLAIN, options=dataclasses.replace(QUICK, epochs=1, shots=4))
    evaluate(tmp_path, dataset, None, resamples=50)
    text = Page(Case(tmp_path, dataset, None).page()).text
    assert "16 left out by train.shotstrained on: 8 images" in text
    assert "images of each class 4" in text


def test_images_are_not_called_patients_where_nobody_knows(tmp_path) -> None:
    dataset = make_dataset()
    dataset = dataclasses.replace(dataset, samples=tuple(dataclasses.replace(s, group=s.id) for s in dataset.samples))
    do(dataset, None, tmp_path, model=PLAIN)
    evaluate(tmp_path, dataset, None, resamples=50)
    page = Page(Case(tmp_path, dataset, None).page())
    assert "Found: 48 images" in page.text
    headings = page.text.split("Contents")[1]
    assert "Patients and images" not in headings.split("Results")[0]
    assert "The test set is small: it has 12 images. With" in page.text
