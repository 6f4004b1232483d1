"""Features alone and late fusion are trained, continued, scored, exported and reported like any other classifier."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline import records
from pipeline.errors import DataError, RunError
from pipeline.evaluate.compare import compare
from pipeline.evaluate.evaluate import evaluate
from pipeline.explain.explain import explain
from pipeline.model.pooled import pool
from pipeline.report.onnx_file import write_onnx
from pipeline.train.feeding.pooling import pool_rows
from pipeline.train.identity import identity_of
from pipeline.train.optimise import TrainOptions
from pipeline.train.train import Augmentation, Machine
from tests.train.scenes import PLAIN, QUICK, TAPS, TINY, do, equal, make_dataset, make_store, weights_of

ALONE = dataclasses.replace(TINY, backbone="none", gates=(), fuse=("early", "neck"))
FUSED = dataclasses.replace(TINY, fuse=("early",))
FAST = dataclasses.replace(QUICK, epochs=12, lr=3e-2)


class Unreadable:
    """Images that nobody may read."""

    def read(self, index):
        message = "an image was read"
        raise DataError(message)

    def stamp(self, index):
        return None

    def mask(self, index):
        return None


def telling_store(path, dataset, **options):
    """A store whose features say the class: each has a channel of the neck that is higher."""
    random = np.random.default_rng(3)
    features = {tap: random.standard_normal((len(dataset), *shape)) for tap, shape in TAPS.items()}
    labels = dataset.labels if dataset.task == "multilabel" else np.eye(3)[dataset.labels]
    features["neck"][:, : labels.shape[1]] += 2.0 * labels[:, :, None, None]
    return make_store(path, dataset, features=features, **options)


@pytest.mark.parametrize("place", ["host", "stream"])
def test_features_alone_need_no_image_and_find_what_is_in_them(tmp_path, place):
    dataset = make_dataset()
    store = telling_store(tmp_path / "s.zarr", dataset)
    blind = dataclasses.replace(dataset, source=Unreadable())
    machine = Machine(place=place)
    do(blind, store, tmp_path / "run", model=ALONE, options=FAST, machine=machine)
    figures = evaluate(tmp_path / "run", blind, store, resamples=50, machine=machine)
    assert figures["auc"] > 0.95
    used = records.read_csv(tmp_path / "run/samples.csv")
    assert {row["pixels_sha256"] for row in used} <= {digest.tobytes().hex() for digest in store.digests}
    with pytest.raises(RunError, match="looks at no image, so there is no place that it looked at"):
        explain(tmp_path / "run", blind, store)


def test_what_is_stored_is_standardised_by_the_training_samples(tmp_path):
    dataset = make_dataset()
    extents = np.ones((len(dataset), 2), np.float32)
    extents[::3] = (1.0, 0.5)
    store = make_store(tmp_path / "s.zarr", dataset, extents=extents)
    do(dataset, store, tmp_path / "run", model=ALONE, options=dataclasses.replace(FAST, fraction=0.5))
    used = [row["id"] for row in records.read_csv(tmp_path / "run/samples.csv") if row["split"] == "train"]
    rows = [store.ids.index(name) for name in used]
    read, part = store.read(rows), torch.from_numpy(extents[rows])
    pooled = torch.cat([pool(torch.from_numpy(read[tap]), part) for tap in ("early", "neck")], dim=1).double()
    weights = weights_of(tmp_path / "run")
    torch.testing.assert_close(weights["pooled.mean"].double(), pooled.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights["pooled.scale"].double(), pooled.std(dim=0, correction=0), rtol=1e-5, atol=1e-6)


def test_rows_are_pooled_alike_in_one_piece_and_in_many(tmp_path, monkeypatch):
    dataset = make_dataset()
    store = make_store(tmp_path / "s.zarr", dataset)
    rows = np.array([5, 3, 40, 0, 17])
    whole = pool_rows(store, rows, ("neck", "early"))
    monkeypatch.setattr("pipeline.train.feeding.pooling._AT_ONCE_BYTES", 1)
    told = []
    pieces = pool_rows(store, rows, ("neck", "early"), progress=lambda *said: told.append(said))
    assert torch.equal(whole, pieces)
    assert told[-1] == ("pool", 5, 5)


@pytest.mark.parametrize("model", [ALONE, FUSED], ids=["alone", "fused"])
def test_a_run_that_was_stopped_continues_to_the_same_weights(tmp_path, model):
    dataset = make_dataset()
    store = make_store(tmp_path / "s.zarr", dataset)
    do(dataset, store, tmp_path / "whole", model=model)

    def stop(task, done, total, **info):
        if task == "epoch" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(dataset, store, tmp_path / "cut", model=model, progress=stop)
    do(dataset, store, tmp_path / "cut", model=model)
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))


@pytest.mark.parametrize("task", ["multiclass", "ordinal", "multilabel"])
def test_every_task_takes_late_fusion_and_features_alone(tmp_path, task):
    dataset = make_dataset((36, 18, 18), classes=3, task=task)
    store = telling_store(tmp_path / "s.zarr", dataset)
    for name, model in (("alone", ALONE), ("fused", FUSED), ("plain", PLAIN)):
        reads = store if model.taps else None
        do(dataset, reads, tmp_path / name, model=model, options=FAST if name == "alone" else QUICK)
        figures = evaluate(tmp_path / name, dataset, reads, resamples=20)
        assert (tmp_path / name / "metrics.json").is_file()
        if name == "alone":
            assert figures["auc"] > 0.8
    assert "scores" in compare(tmp_path / "plain", tmp_path / "alone", resamples=20)


def test_explain_shows_where_a_fused_classifier_looks(tmp_path):
    dataset = make_dataset()
    store = make_store(tmp_path / "s.zarr", dataset)
    do(dataset, store, tmp_path / "run", model=FUSED)
    found = explain(tmp_path / "run", dataset, store, count=1)
    assert (tmp_path / "run/explain" / found["sheet"]["file"]).is_file()
    assert "Grad-CAM" in found["ranges"]


@pytest.mark.parametrize("model", [ALONE, FUSED], ids=["alone", "fused"])
def test_onnx_has_the_same_numbers(tmp_path, model):
    dataset = make_dataset()
    store = make_store(tmp_path / "s.zarr", dataset)
    do(dataset, store, tmp_path / "run", model=model)
    told = write_onnx(tmp_path / "run", tmp_path / "model.onnx")
    images = ["images"] if model.reads_images else []
    assert list(told["inputs"]) == [*images, "extents", *model.taps]
    assert told["largest_difference"] < 1e-4


def test_a_run_of_an_earlier_version_is_the_same_run(tmp_path):
    dataset = make_dataset()
    store = make_store(tmp_path / "s.zarr", dataset)
    assert "fuse" not in identity_of(dataset, store, TINY, TrainOptions(), Augmentation())["model"]
    assert identity_of(dataset, store, FUSED, TrainOptions(), Augmentation())["model"]["fuse"] == ("early",)
    do(dataset, store, tmp_path / "run")
    before = weights_of(tmp_path / "run")
    file = tmp_path / "run/model.json"
    values = json.loads(file.read_text())
    del values["model"]["fuse"]
    file.write_text(json.dumps(values))
    assert equal(weights_of(tmp_path / "run"), before)
    assert do(dataset, store, tmp_path / "run").feeds == ()  # finished: nothing to do


def test_features_that_are_not_finite_name_a_sample(tmp_path):
    dataset = make_dataset()
    features = {tap: np.zeros((len(dataset), *shape)) for tap, shape in TAPS.items()}
    features["neck"][2, 0, 0, 0] = np.inf
    store = make_store(tmp_path / "s.zarr", dataset, features=features)
    with pytest.raises(RunError, match=r"tap 'neck' are not finite in 1 of 24 samples, 's002' for one"):
        do(dataset, store, tmp_path / "run", model=ALONE)


def test_weights_are_a_linear_layer_and_what_standardises(tmp_path):
    dataset = make_dataset()
    store = make_store(tmp_path / "s.zarr", dataset)
    do(dataset, store, tmp_path / "run", model=ALONE)
    shapes = {k: tuple(v.shape) for k, v in safetensors.torch.load_file(tmp_path / "run/model.safetensors").items()}
    assert shapes == {
        "pooled.mean": (24,),
        "pooled.scale": (24,),
        "backbone.head.0.weight": (2, 24),
        "backbone.head.0.bias": (2,),
    }
