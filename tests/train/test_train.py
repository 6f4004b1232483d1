"""Training learns what there is to learn, repeats itself, and leaves figures that agree."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.model.classifier import ModelOptions
from pipeline.train import trained_model
from pipeline.train.augment import Augmentation
from pipeline.train.feeding.feed import Feed
from pipeline.train.forward import infer
from pipeline.train.train import Machine, train
from tests.train.scenes import PLAIN, QUICK, TINY, Arrays, do, equal, make_dataset, make_store, weights_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(scene, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return do(scene, store, folder)


def test_it_learns_what_the_images_show(scene, tmp_path):
    report = do(scene, None, tmp_path, model=PLAIN, options=dataclasses.replace(QUICK, epochs=6))
    assert report.metrics["val"]["auc"] > 0.95
    assert report.history[-1]["train_loss"] < 0.3


def test_it_learns_what_only_the_features_show(tmp_path):
    dataset = make_dataset(counts=(48, 16, 2))
    noise = np.random.default_rng(1).integers(0, 256, dataset.source.images.shape, dtype=np.uint8)
    dataset = dataclasses.replace(dataset, source=dataclasses.replace(dataset.source, images=noise))
    labels = dataset.labels.astype(float)[:, None, None, None]
    neck = np.broadcast_to(np.where(labels == 1, 2.0, -2.0), (66, 3, 4, 4))
    store = make_store(tmp_path / "s.zarr", dataset, taps={"neck": (3, 4, 4)}, features={"neck": neck})
    model = dataclasses.replace(TINY, gates=(("neck", "stage4"),), mix="multiply", reduction=1)
    options = dataclasses.replace(QUICK, epochs=6, lr=5e-3, gate_lr=10.0)
    gated = train(dataset, store, tmp_path / "gated", model=model, options=options)
    plain = train(dataset, store, tmp_path / "plain", model=dataclasses.replace(model, gates=()), options=options)
    assert gated.metrics["val"]["auc"] == 1.0
    assert plain.metrics["val"]["auc"] < 0.9


def test_the_same_seed_gives_the_same_weights_and_another_does_not(scene, store, finished, tmp_path):
    again = do(scene, store, tmp_path / "again")
    assert equal(weights_of(again.folder), weights_of(finished.folder))
    other = do(scene, store, tmp_path / "other", options=dataclasses.replace(QUICK, seed=2))
    assert not equal(weights_of(other.folder), weights_of(finished.folder))


@pytest.mark.parametrize("place", ["host", "stream"])
def test_the_place_of_the_data_changes_nothing(scene, store, finished, tmp_path, place):
    report = do(scene, store, tmp_path, machine=Machine(place=place))
    assert equal(weights_of(report.folder), weights_of(finished.folder))


def test_the_scale_of_features_is_learnt_without_images_and_not_again_by_a_run_that_continues(
    scene, store, tmp_path, monkeypatch
):
    decoded, looked_at, stored = [], [], Feed.stored
    monkeypatch.setattr(Arrays, "read", lambda self, index: (decoded.append(index), self.images[index])[1])
    monkeypatch.setattr(Feed, "stored", lambda self, *asked: (looked_at.extend(asked[0]), stored(self, *asked))[1])

    def stop(task, done, total, **info):
        if task == "epoch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(scene, store, tmp_path / "run", machine=Machine(place="stream"), progress=stop)
    assert sorted(decoded) == list(range(36))  # each image of train and val once, by the epoch
    assert len(looked_at) == 24
    assert do(scene, store, tmp_path / "run", machine=Machine(place="stream")).feeds
    assert len(looked_at) == 24


def test_both_store_formats_give_the_same_run(scene, finished, tmp_path):
    report = do(scene, make_store(tmp_path / "scene.h5", scene), tmp_path / "run")
    assert equal(weights_of(report.folder), weights_of(finished.folder))
    figures = [{k: v for k, v in row.items() if k not in {"seconds", "wait_share"}} for row in report.history]
    expected = [{k: v for k, v in row.items() if k not in {"seconds", "wait_share"}} for row in finished.history]
    assert figures == expected


def test_training_leaves_the_callers_random_numbers_alone(scene, store, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    do(scene, store, tmp_path, options=dataclasses.replace(QUICK, epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_the_history_is_a_table_and_json(finished):
    with (finished.folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    stored = json.loads((finished.folder / "history.json").read_text())
    assert stored == finished.history
    assert float(rows[1]["val_auc"]) == stored[1]["val_auc"]


def test_the_best_epoch_by_val_auc_is_kept(scene, store, finished, tmp_path):
    best = max(finished.history, key=lambda row: (row["val_auc"], -row["val_loss"]))
    assert finished.metrics["epoch"] == best["epoch"]
    classifier, description = trained_model.load_classifier(finished.folder)
    feed = Feed(scene, "val", store, taps=TINY.taps, image_px=16, device=CPU)
    scores = infer(classifier, description.head, feed)
    assert scores.losses.mean() == pytest.approx(best["val_loss"])
    counts = finished.metrics["parameters"]
    assert counts["slca_share"] == counts["slca"] / counts["backbone"] > 0


@pytest.mark.parametrize("task", ["multiclass", "binary", "ordinal", "multilabel"])
def test_every_task_trains_and_scores(tmp_path, task):
    dataset = make_dataset(classes=2 if task == "binary" else 3, task=task)
    options = dataclasses.replace(QUICK, epochs=1, class_weights="balanced", label_smoothing=0.1)
    report = train(dataset, None, tmp_path, model=PLAIN, options=options)
    assert 0 <= report.metrics["val"]["auc"] <= 1
    classifier, description = trained_model.load_classifier(tmp_path)
    feed = Feed(dataset, "test", None, taps=(), image_px=16, device=CPU)
    assert infer(classifier, description.head, feed).probabilities.shape == (12, len(dataset.class_names))


def test_one_image_at_a_time_is_too_few_for_batch_norm_of_a_single_cell(scene, tmp_path):
    single = dataclasses.replace(QUICK, batch_size=1, epochs=1)
    do(scene, None, tmp_path / "cells", model=PLAIN, options=single)
    with pytest.raises(ConfigError, match=r"a batch of 1 at 4 px leaves one: set train.batch_size to 2 or more"):
        do(scene, None, tmp_path / "cell", model=dataclasses.replace(PLAIN, image_px=4), options=single)


def test_patience_ends_a_run_that_has_stopped_improving(scene, tmp_path):
    options = dataclasses.replace(QUICK, epochs=30, patience=2)
    report = train(scene, None, tmp_path, model=PLAIN, options=options)
    assert len(report.history) == report.metrics["epoch"] + 2 < 30


def test_pooling_in_the_model_and_in_the_store_trains_the_same_classifier(scene, tmp_path):
    full = np.random.default_rng(3).standard_normal((48, 6, 16, 16)).astype("float32")
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(full), 4).numpy()
    histories = []
    for name, features, pool in (("full", full, 4), ("pooled", pooled, 1)):
        store = make_store(
            tmp_path / f"{name}.zarr", scene, taps={"early": features.shape[1:]}, features={"early": features}
        )
        model = ModelOptions(backbone="tiny", image_px=16, gates=(("early", "stage1"),), pool=pool)
        histories.append(do(scene, store, tmp_path / name, model=model).history)
    for key in ("train_loss", "val_loss"):
        assert [row[key] for row in histories[0]] == pytest.approx([row[key] for row in histories[1]], abs=1e-5)


@pytest.mark.parametrize("machine", [Machine(channels_last=False), Machine(compiled=True)])
def test_layout_and_compiler_change_rounding_and_nothing_else(scene, store, tmp_path, monkeypatch, machine):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiler(module, backend="eager"))
    losses = []
    for number, chosen in enumerate((Machine(), machine)):
        steps = []

        def note(task, done, total, steps=steps, **info):
            if task == "train":
                steps.append(info["loss"])

        do(scene, store, tmp_path / str(number), machine=chosen, progress=note)
        losses.append(steps)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)  # before the first step
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=0.05)  # rounding grows with each


def test_a_margin_keeps_training_images_larger_and_val_as_the_classifier_sees_it(tmp_path, monkeypatch):
    dataset = make_dataset(side=32)
    sizes = []
    batches = Feed.batches

    def watched(self, order):
        for batch in batches(self, order):
            sizes.append((self.description.split(":")[0], batch.images.shape[-1]))
            yield batch

    monkeypatch.setattr(Feed, "batches", watched)
    augmentation = Augmentation(crop=0.8, margin=0.25)
    options = dataclasses.replace(QUICK, epochs=1)
    report = train(dataset, None, tmp_path, model=PLAIN, options=options, augmentation=augmentation)
    assert set(sizes) == {("train", 20), ("val", 16)}
    assert np.isfinite(report.history[0]["train_loss"])


def test_reduced_precision_trains_where_it_is_asked_for(scene, store, tmp_path):
    options = dataclasses.replace(QUICK, precision="bfloat16")
    report = do(scene, store, tmp_path / "reduced", options=options)
    whole = do(scene, store, tmp_path / "whole")
    assert report.history[0]["train_loss"] != whole.history[0]["train_loss"]
    assert report.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=0.1)


def test_tensorboard_gets_a_file_per_epoch(scene, tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    do(scene, None, tmp_path, model=PLAIN, machine=Machine(tensorboard=True))
    assert len(list((tmp_path / "tensorboard").iterdir())) == QUICK.epochs


def test_tensorboard_is_asked_for_before_an_epoch_is_lost(scene, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="needs the extra 'tensorboard'"):
        do(scene, None, tmp_path, model=PLAIN, machine=Machine(tensorboard=True))
    assert not (tmp_path / "history.csv").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("place", ["device", "host", "stream"])
def test_a_gpu_trains_as_the_cpu_does(scene, store, tmp_path, place):
    options = dataclasses.replace(QUICK, precision="float32", epochs=1)
    losses = []
    for device in ("cpu", "cuda"):
        report = do(scene, store, tmp_path / device, options=options, machine=Machine(device=device, place=place))
        losses.append(report.history[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    reduced = do(scene, store, tmp_path / "reduced", machine=Machine(device="cuda", place=place))
    assert np.isfinite([row["val_loss"] for row in reduced.history]).all()
