"""An external test set: other images under the run's own classes and thresholds, in files of their own."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.data import as_test_set, load_dataset
from pipeline.data.depth import Reading
from pipeline.errors import DataError, RunError
from pipeline.evaluate.evaluate import evaluate
from pipeline.evaluate.external import evaluate_elsewhere
from pipeline.evaluate.metrics import score
from pipeline.records import read_csv
from tests.train.scenes import PLAIN, do, make_dataset, make_store

NAMED = {"benign": "a", "malignant": "b"}


@pytest.fixture(scope="module")
def plain(scene, tmp_path_factory):
    """A run without features, evaluated on its own test set."""
    folder = do(scene, None, tmp_path_factory.mktemp("plain") / "run", model=PLAIN).folder
    evaluate(folder, scene, None, resamples=20)
    return folder


@pytest.fixture(scope="module")
def elsewhere():
    """Other images of the same kind, whose splits say nothing about the run."""
    return dataclasses.replace(make_dataset((6, 4, 14), seed=9), name="elsewhere")


def renumbered(dataset):
    """The same data set with its classes in the other order."""
    samples = tuple(dataclasses.replace(sample, label=1 - sample.label) for sample in dataset.samples)
    return dataclasses.replace(dataset, samples=samples, class_names=dataset.class_names[::-1])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_images_are_scored_at_the_thresholds_of_the_runs_own_val(plain, elsewhere):
    before, own = contents(plain), json.loads((plain / "metrics.json").read_text())
    found = evaluate_elsewhere(plain, "hospital", elsewhere, None, resamples=20)
    target = plain / "external/hospital"
    assert found == json.loads((target / "metrics.json").read_text())
    assert found["external"]["data_set"] == "elsewhere"
    assert found["n"] == 24
    for point, classes in own["operating_points"].items():
        for name, figures in classes.items():
            assert found["operating_points"][point][name]["threshold"] == figures["threshold"]
    rows = read_csv(target / "predictions.csv")
    assert {row["id"] for row in rows} == {sample.id for sample in elsewhere.samples}
    labels = np.array(["ab".index(row["label"]) for row in rows])
    said = np.array([[float(row["p_a"]), float(row["p_b"])] for row in rows])
    assert score("binary", labels, said, ("a", "b"))["auc"] == found["auc"]
    for name in ("roc.png", "roc.csv", "reliability.csv", "confusion.png", "decision_curve.csv"):
        assert (target / name).is_file()
    assert {path: data for path, data in contents(plain).items() if path in before} == before


def test_classes_are_found_by_name_whatever_their_order(plain, elsewhere):
    wanted = evaluate_elsewhere(plain, "order", elsewhere, None, resamples=20)
    found = evaluate_elsewhere(plain, "other_order", renumbered(elsewhere), None, resamples=20)
    del wanted["external"], found["external"], wanted["split"], found["split"]
    assert found == wanted


def test_classes_of_other_names_are_named(plain, elsewhere):
    foreign = dataclasses.replace(elsewhere, class_names=("benign", "malignant"))
    with pytest.raises(
        DataError, match=r"the model knows no class 'benign', 'malignant', only 'a', 'b'.*--class 'beni"
    ):
        evaluate_elsewhere(plain, "foreign", foreign, None)
    found = evaluate_elsewhere(plain, "foreign", foreign, None, named=NAMED, resamples=20)
    assert found["auc"] == evaluate_elsewhere(plain, "again", elsewhere, None, resamples=20)["auc"]
    assert found["external"]["named"] == NAMED


def test_several_classes_may_be_one():
    three = make_dataset((12, 0, 0), classes=3, task="multiclass")
    seen = as_test_set(three, ("x", "a"), "binary", named={"b": "x", "c": "x"})
    assert [sample.label for sample in seen.samples] == [{0: 1, 1: 0, 2: 0}[s.label] for s in three.samples]
    assert {sample.split for sample in seen.samples} == {"test"}
    assert seen.task == "binary"


def test_labels_that_are_several_are_put_in_the_models_order():
    several = make_dataset((12, 0, 0), classes=3, task="multilabel")
    seen = as_test_set(several, ("c", "a", "b"), "multilabel")
    assert [sample.label for sample in seen.samples] == [(s.label[2], s.label[0], s.label[1]) for s in several.samples]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"named": {"q": "a"}}, "'q' is to be 'a', and the data set has no class 'q'; it has 'a', 'b'"),
        ({"named": {"a": "bb"}}, "the model has no class 'bb'; did you mean 'b'"),
        ({"named": {"a": "b"}}, "no image of 'a', which the model tells apart"),
        ({"split": "val"}, "no image in split 'val'"),
        ({"task": "multilabel"}, "its labels are binary and those of the model multilabel"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused(changes, said):
    options = {"task": "binary", **changes}
    with pytest.raises(DataError, match=said):
        as_test_set(make_dataset((8, 0, 8)), ("a", "b"), **options)


def test_one_split_can_be_taken(plain, elsewhere):
    found = evaluate_elsewhere(plain, "part", elsewhere, None, split="test", resamples=20)
    assert found["n"] == 14
    ids = {row["id"] for row in read_csv(plain / "external/part/predictions.csv")}
    assert ids == {sample.id for sample in elsewhere.samples if sample.split == "test"}


@pytest.mark.parametrize("position", [3, 30], ids=["trained on", "chosen on"])
def test_images_that_the_run_has_learnt_are_refused_by_their_pixels(scene, plain, elsewhere, position):
    images = elsewhere.source.images.copy()
    images[5] = scene.source.images[position]
    leaked = dataclasses.replace(elsewhere, source=dataclasses.replace(elsewhere.source, images=images))
    with pytest.raises(RunError, match=r"1 of 24 images of split 'test' were used otherwise .*: 's005', for one, was"):
        evaluate_elsewhere(plain, "leaked", leaked, None)
    assert not list((plain / "external/leaked").glob("*"))


def test_the_folder_of_other_images_is_not_overwritten(plain, elsewhere):
    evaluate_elsewhere(plain, "twice", elsewhere, None, resamples=20)
    before = contents(plain / "external/twice")
    with pytest.raises(RunError, match="holds the scores of other images or classes, of 'elsewhere'"):
        evaluate_elsewhere(plain, "twice", make_dataset((6, 6, 6), seed=3), None, resamples=20)
    assert contents(plain / "external/twice") == before
    evaluate_elsewhere(plain, "twice", elsewhere, None, resamples=20)


def test_features_have_to_be_made_as_the_runs_were(scene, store, elsewhere, tmp_path):
    folder = do(scene, store, tmp_path / "run").folder
    with pytest.raises(RunError, match="has not been evaluated on its own data"):
        evaluate_elsewhere(folder, "elsewhere", elsewhere, store)
    evaluate(folder, scene, store, resamples=20)
    theirs = make_store(tmp_path / "theirs.zarr", elsewhere)
    assert evaluate_elsewhere(folder, "elsewhere", elsewhere, theirs, resamples=20)["n"] == 24
    other = make_store(tmp_path / "other.zarr", elsewhere, fields={"encoder": "another"})
    with pytest.raises(RunError, match="was trained on other features: encoder is 'another' and was 'random'"):
        evaluate_elsewhere(folder, "another", elsewhere, other)


def test_a_folder_of_test_images_alone_is_a_data_set(tmp_path):
    for split, name in (("test", "a"), ("test", "b")):
        (tmp_path / "own" / split / name).mkdir(parents=True)
        (tmp_path / "none" / name).mkdir(parents=True)
        for k in range(2):
            for place in (tmp_path / "own" / split / name, tmp_path / "none" / name):
                Image.new("RGB", (8, 8)).save(place / f"{k}.png")
    rule = {"val": 0.15, "test": 0.25, "seed": 0, "draw": "steady"}
    for place in ("own", "none"):  # with splits of its own, and without any
        found = load_dataset(
            "folder", path=tmp_path / place, reading=Reading(), only_test=True, group_pattern=None, split=rule
        )
        assert {sample.split for sample in found.samples} == {"test"}
