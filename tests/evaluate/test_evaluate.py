"""Evaluation reads one split once and leaves figures that agree; prediction gives the same probabilities."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

import cache
from pipeline.data import Reading, pixel_digest
from pipeline.encoders import Prepared
from pipeline.errors import ConfigError, DataError, RunError
from pipeline.evaluate.compare import compare, read_predictions
from pipeline.evaluate.evaluate import evaluate
from pipeline.evaluate.plots import draw_reliability
from pipeline.evaluate.predict import ReadableImages, Taken, predict, verdicts
from pipeline.train import trained_model
from pipeline.train.run_folder import begin, held
from pipeline.train.train import Machine, train
from tests.train.scenes import QUICK, TAPS, TINY, Arrays, make_dataset, make_store

PLAIN = dataclasses.replace(TINY, gates=())


class ColourEncoder(torch.nn.Module):
    """An encoder in three lines: each tap is made of the mean colour of each cell of the padded square."""

    input_px = 32
    taps = TAPS

    def prepare(self, image):
        height, width = image.shape[:2]
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        pixels[:, :height, :width] = torch.from_numpy(image).permute(2, 0, 1)
        return Prepared(pixels=pixels, size=(height, width))

    def encode(self, pixels, sizes, dtype=torch.float32):
        cells = torch.nn.functional.avg_pool2d(pixels.float() / 255, 8)  # (B, 3, 4, 4)
        both = torch.cat((cells, cells.square()), dim=1).to(dtype)
        return {tap: both[:, :channels] for tap, (channels, _, _) in TAPS.items()}


FIELDS = {"encoder": "colour", "dtype": "float16"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A data set of wide images, a store that the encoder above filled, and a finished run."""
    folder = tmp_path_factory.mktemp("evaluate")
    dataset = make_dataset(classes=3, task="multiclass", height=24, side=32)
    encoder = ColourEncoder()
    prepared = [encoder.prepare(dataset.read(i)) for i in range(len(dataset))]
    features = encoder.encode(torch.stack([p.pixels for p in prepared]), None)
    store = make_store(
        folder / "s.zarr",
        dataset,
        dtype="float16",
        fields=FIELDS,
        features={tap: value.numpy() for tap, value in features.items()},
        extents=[(24 / 32, 1.0)] * len(dataset),
    )
    train(dataset, store, folder / "run", model=TINY, options=dataclasses.replace(QUICK, epochs=5))
    return dataset, store, folder / "run"


def test_the_figures_agree_with_the_rows_and_with_scikit_learn(setting):
    dataset, store, folder = setting
    figures = evaluate(folder, dataset, store)
    assert figures == json.loads((folder / "metrics.json").read_text())
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    test = [dataset.samples[i] for i in dataset.indices("test")]
    assert [row["id"] for row in rows] == [sample.id for sample in test]
    assert [row["group"] for row in rows] == [sample.group for sample in test]
    names = list(dataset.class_names)
    assert [row["label"] for row in rows] == [names[sample.label] for sample in test]
    p = np.array([[float(row[f"p_{name}"]) for name in names] for row in rows])
    labels = np.array([sample.label for sample in test])
    expected = sklearn.metrics.roc_auc_score(np.eye(3)[labels], p, average="macro")
    assert figures["auc"] == pytest.approx(expected, abs=1e-12)
    assert [row["predicted"] for row in rows] == [names[k] for k in p.argmax(axis=1)]
    assert np.array(figures["confusion"]).sum() == len(test) == figures["n"]
    assert figures["split"] == "test"


@pytest.mark.parametrize("place", ["host", "stream"])
def test_the_rows_name_their_pixels(setting, tmp_path, place):
    dataset, store, folder = setting
    train(dataset, None, tmp_path, model=PLAIN, options=dataclasses.replace(QUICK, epochs=1))
    for finished, features in ((folder, store), (tmp_path, None)):
        evaluate(finished, dataset, features, resamples=10, machine=Machine(place=place))
        with (finished / "predictions.csv").open() as file:
            named = [row["pixels_sha256"] for row in csv.DictReader(file)]
        assert named == [pixel_digest(dataset.read(i)).hex() for i in dataset.indices("test")]


def test_runs_on_other_images_of_the_same_names_are_not_compared(tmp_path):
    for name, dataset in (("easy", make_dataset()), ("hard", make_dataset(seed=1))):
        train(dataset, None, tmp_path / name, model=PLAIN, options=dataclasses.replace(QUICK, epochs=1))
        evaluate(tmp_path / name, dataset, None, resamples=10)
    compare(tmp_path / "easy", tmp_path / "easy", resamples=10)
    with pytest.raises(RunError, match="12 of 12 images have other pixels"):
        compare(tmp_path / "easy", tmp_path / "hard")


def test_every_score_has_an_interval_around_it(setting):
    dataset, store, folder = setting
    figures = evaluate(folder, dataset, store, resamples=300)
    for name, ends in figures["intervals"].items():
        for inner in [ends] if "low" in ends else ends.values():
            assert inner["low"] <= inner["high"], name
    assert figures["intervals"]["auc"]["low"] <= figures["auc"] <= figures["intervals"]["auc"]["high"]
    assert figures["intervals"].keys() == figures.keys() & figures["intervals"].keys()
    assert figures["bootstrap"] == {"resamples": 300, "seed": 0, "groups": 12}
    assert evaluate(folder, dataset, store, resamples=300) == figures


def test_operating_points_are_chosen_on_val_and_read_on_test(setting):
    dataset, store, folder = setting
    figures = evaluate(folder, dataset, store, resamples=50, points=("specificity=0.5",))
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, point in figures["operating_points"]["specificity=0.5"].items():
        called = [float(row[f"p_{name}"]) >= point["threshold"] for row in rows]
        kept = [c for c, row in zip(called, rows, strict=True) if row["label"] == name]
        assert point["sensitivity"]["value"] == pytest.approx(np.mean(kept))
        assert point["sensitivity"]["low"] <= point["sensitivity"]["value"] <= point["sensitivity"]["high"]


def test_starting_over_leaves_nothing_that_was_found_of_the_old_model(setting, tmp_path):
    dataset, store, folder = setting
    evaluate(folder, dataset, store, resamples=10)
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/notes.txt").write_text("mine")
    begin(tmp_path / "run", {"other": 1}, replace=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"settings.json", "notes.txt"}
    with pytest.raises(RunError, match=r"no trained model in .*: run `pipeline train` first"):
        read_predictions(tmp_path / "run")


def test_what_evaluate_leaves_is_written_by_one_process(setting, tmp_path):
    dataset, opened, run = setting
    evaluate(run, dataset, opened, resamples=20)
    folder = shutil.copytree(run, tmp_path / "run")
    before = (folder / "metrics.json").stat().st_mtime_ns
    with held(folder), pytest.raises(RunError, match=r"is being written by process \d+ since"):
        evaluate(folder, dataset, opened, resamples=20)
    assert (folder / "metrics.json").stat().st_mtime_ns == before
    evaluate(folder, dataset, opened, resamples=20)
    assert not (folder / "lock").exists()


def test_unknown_operating_points_are_refused_before_anything_is_computed(setting, monkeypatch):
    dataset, store, folder = setting
    monkeypatch.setattr(Arrays, "read", None)
    with pytest.raises(ConfigError, match="no operating point 'sensitivity=95'"):
        evaluate(folder, dataset, store, points=("youden", "sensitivity=95"))


def test_curves_are_written_for_programs_and_for_people(setting):
    dataset, store, folder = setting
    figures = evaluate(folder, dataset, store)
    with (folder / "roc.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in dataset.class_names:
        points = [row for row in rows if row["class"] == name]
        x, y = ([float(row[axis]) for row in points] for axis in ("fpr", "tpr"))
        assert np.trapezoid(y, x) == pytest.approx(figures["class_auc"][name])
        assert points[0]["threshold"] == ""
    with (folder / "precision_recall.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(dataset.class_names)
    with (folder / "reliability.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["count"]) for row in rows) == figures["n"]
    assert list(rows[0]) == ["confidence", "accuracy", "count", "low", "high"]
    assert all(0 <= float(row["low"]) <= float(row["high"]) <= 1 for row in rows)
    for name in ("roc.png", "precision_recall.png", "reliability.png", "loss.png", "confusion.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_the_picture_of_the_calibration_shows_the_intervals(tmp_path):
    def inked(low, high):
        steps = [{"confidence": 0.5, "accuracy": 0.6, "count": 9, "low": low, "high": high}]
        draw_reliability(tmp_path / "reliability.png", steps, error=0.1)
        with Image.open(tmp_path / "reliability.png") as picture:
            red, _, blue = np.moveaxis(np.asarray(picture.convert("RGB")).astype(int), 2, 0)
        return (blue - red > 20).any(axis=1).sum()  # lines of pixels that hold some blue

    assert inked(0.1, 0.9) > 4 * inked(0.6, 0.6)


def test_test_is_read_once_and_train_never(setting, monkeypatch):
    dataset, store, folder = setting
    read = []
    monkeypatch.setattr(Arrays, "read", lambda self, index: read.append(index) or self.images[index])
    evaluate(folder, dataset, store)
    assert sorted(read) == [*dataset.indices("val"), *dataset.indices("test")]  # val gives the thresholds


def test_training_never_reads_the_test_split(setting, tmp_path, monkeypatch):
    dataset, store, _ = setting
    read = []
    monkeypatch.setattr(Arrays, "read", lambda self, index: read.append(index) or self.images[index])
    train(dataset, store, tmp_path, model=TINY, options=dataclasses.replace(QUICK, epochs=1))
    assert sorted(set(read)) == [*dataset.indices("train"), *dataset.indices("val")]


def test_features_of_another_fingerprint_are_refused_by_field(setting, tmp_path):
    dataset, _, folder = setting
    other = make_store(tmp_path / "other.zarr", dataset, fields={"encoder": "shape", "dtype": "float16"})
    with pytest.raises(RunError, match="other features: encoder is 'shape' and was 'colour' in training"):
        evaluate(folder, dataset, other)
    with pytest.raises(RunError, match="encoder is 'shape' and was 'colour' in training"):
        list(predict(folder, [dataset.read(0)], encoder=ColourEncoder(), fingerprint=other.fingerprint))


def test_other_classes_are_refused(setting):
    dataset, store, folder = setting
    renamed = dataclasses.replace(dataset, class_names=("x", "y", "z"))
    with pytest.raises(RunError, match=r"knows the multiclass classes \['a', 'b', 'c'\]"):
        evaluate(folder, renamed, store)


def test_a_test_split_of_one_class_is_refused(setting):
    dataset, store, folder = setting
    samples = tuple(dataclasses.replace(s, label=0) if s.split == "test" else s for s in dataset.samples)
    with pytest.raises(DataError, match="Split 'test' holds one class only"):
        evaluate(folder, dataclasses.replace(dataset, samples=samples), store)


def test_a_folder_without_a_finished_run_is_refused(setting, tmp_path):
    dataset, store, _ = setting
    with pytest.raises(RunError, match=r"no trained model in .*: run `pipeline train` first"):
        evaluate(tmp_path, dataset, store)


def test_damaged_weights_are_refused(setting, tmp_path):
    _, _, folder = setting
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"model.safetensors' does not hold the weights that model.json describes"):
        trained_model.load_classifier(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(RunError, match=r"model.json' is no description of a model"):
        trained_model.load_classifier(tmp_path)


def test_prediction_encodes_on_the_fly_and_agrees_with_evaluation(setting):
    dataset, store, folder = setting
    evaluate(folder, dataset, store)
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [[float(row[f"p_{name}"]) for name in dataset.class_names] for row in rows]
    images = (dataset.read(i) for i in dataset.indices("test"))
    said = predict(folder, images, encoder=ColourEncoder(), fingerprint=cache.Fingerprint(FIELDS), batch_size=5)
    np.testing.assert_allclose(np.array(list(said)), expected, atol=1e-6)


def test_prediction_asks_for_the_encoder_it_needs(setting):
    dataset, _, folder = setting
    with pytest.raises(RunError, match=r"needs the taps \['early', 'neck'\]: give the encoder"):
        list(predict(folder, [dataset.read(0)]))


def test_the_plain_classifier_predicts_images_of_any_size(scene, tmp_path):
    train(scene, None, tmp_path, model=PLAIN, options=dataclasses.replace(QUICK, epochs=1))
    images = [np.zeros((9, 30, 3), np.uint8), np.full((64, 40, 3), 255, np.uint8), scene.read(0)]
    said = list(predict(tmp_path, images))
    assert [p.shape for p in said] == [(2,)] * 3
    assert [p.sum() for p in said] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("multilabel", [0.6, 0.5, 0.9], ["a", "c"]),
        ("multilabel", [0.1, 0.5, 0.2], []),
        ("multiclass", [0.3, 0.5, 0.2], "b"),
        ("ordinal", [0.3, 0.2, 0.5], "c"),
        ("binary", [0.5, 0.5], "a"),
        ("binary", [0.4, 0.6], "b"),
    ],
)
def test_a_verdict_is_what_the_test_set_is_scored_by(task, row, said):
    images = ReadableImages(["x.png"], Reading(), lambda image: Taken(None, None), read=["x.png"])
    (found,) = verdicts(images, [np.array(row)], "abc"[: len(row)], task)["predictions"]
    assert found == {"image": "x.png", "predicted": said, "probabilities": dict(zip("abc", row, strict=False))}


def test_several_labels_are_spelled_in_one_cell(tmp_path):
    dataset = make_dataset(classes=3, task="multilabel")
    train(dataset, None, tmp_path, model=PLAIN, options=dataclasses.replace(QUICK, epochs=1))
    evaluate(tmp_path, dataset, None)
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, index in zip(rows, dataset.indices("test"), strict=True):
        present = [name for name, bit in zip("abc", dataset.samples[index].label, strict=True) if bit]
        assert row["label"] == "|".join(present)
    assert not (tmp_path / "confusion.png").exists()


def test_samples_that_the_store_lacks_may_be_left_out(setting, tmp_path):
    dataset, store, folder = setting
    kept = [i for i in range(len(dataset)) if i != dataset.indices("test")[0]]
    features = store.read(range(len(store)))
    partial = make_store(tmp_path / "p.zarr", dataset, dtype="float16", fields=FIELDS, only=kept, features=features)
    with pytest.raises(RunError, match="lacks 1 of 12 samples of split 'test'"):
        evaluate(folder, dataset, partial)
    assert evaluate(folder, dataset, partial, allow_missing=True)["n"] == 11


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_the_store_lacks_is_told_before_any_score(setting, tmp_path, split):
    dataset, store, folder = setting
    gone = {i for i in dataset.indices(split) if dataset.samples[i].label == 0}
    kept = [i for i in range(len(dataset)) if i not in gone]
    features = store.read(range(len(store)))
    partial = make_store(tmp_path / "p.zarr", dataset, dtype="float16", fields=FIELDS, only=kept, features=features)
    with pytest.raises(DataError, match=f"Split '{split}' holds no sample of 'a'"):
        evaluate(folder, dataset, partial, allow_missing=True)
    if split == "val":
        with pytest.raises(DataError, match="Split 'val' holds no sample of 'a'"):
            train(dataset, partial, tmp_path / "run", model=TINY, options=QUICK, allow_missing=True)
        assert not (tmp_path / "run/history.json").exists()
