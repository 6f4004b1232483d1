"""The probe: every tap scored, the one that val chooses made a run like any other, and nothing read of an image."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import cache
from pipeline import records
from pipeline.errors import DataError, RunError
from pipeline.evaluate.compare import compare
from pipeline.evaluate.evaluate import evaluate
from pipeline.evaluate.probe import Fitting, probe
from pipeline.model.pooled import pool
from pipeline.train import run_folder, trained_model
from pipeline.train.logistic import STRENGTHS
from pipeline.train.optimise import TrainOptions
from tests.train.scenes import PLAIN, TAPS, do, equal, make_dataset, make_store, weights_of
from tests.train.test_features_alone import Unreadable, telling_store


def blind(dataset):
    return dataclasses.replace(dataset, source=Unreadable())


@pytest.fixture
def scene(tmp_path):
    dataset = make_dataset((40, 30, 30))
    return blind(dataset), telling_store(tmp_path / "s.zarr", dataset)


def test_val_chooses_the_tap_that_knows_and_it_becomes_a_run(scene, tmp_path):
    dataset, store = scene
    found = probe(dataset, store, tmp_path / "run", Fitting(resamples=50))
    rows = found["table"]
    assert {(row["tap"], row["method"]) for row in rows} == {
        (tap, method) for tap in ("early", "neck", "all") for method in ("logistic regression", "nearest neighbours")
    }
    assert [row["val"]["auc"] for row in rows] == sorted((row["val"]["auc"] for row in rows), reverse=True)
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["method"] == "logistic regression"
    assert chosen["val"]["auc"] == max(r["val"]["auc"] for r in rows if r["method"] == "logistic regression")
    assert "neck" in found["chosen"]
    assert chosen["test"]["auc"] > 0.95
    by_name = {row["tap"]: row for row in rows if row["method"] == "logistic regression"}
    assert by_name["early"]["test"]["auc"] < 0.8
    assert found["samples"] == {"train": 40, "val": 30, "test": 30}
    figures = evaluate(tmp_path / "run", dataset, store, resamples=50)
    for score in ("auc", "acc", "brier", "intervals"):
        assert figures[score] == pytest.approx(chosen["test"][score], abs=1e-6) if score != "intervals" else True
    assert figures["intervals"]["auc"] == pytest.approx(chosen["test"]["intervals"]["auc"], abs=1e-6)
    assert figures["val_auc"] == chosen["val"]["auc"]


def test_a_row_is_what_scikit_learn_alone_would_say(tmp_path):
    dataset = make_dataset((40, 30, 30))
    extents = np.ones((len(dataset), 2), np.float32)
    extents[::2] = (0.5, 1.0)
    store = telling_store(tmp_path / "s.zarr", dataset, extents=extents)
    found = probe(blind(dataset), store, tmp_path / "run", Fitting(resamples=20), taps=("neck",))
    (row,) = [row for row in found["table"] if row["chosen"]]
    x = pool(torch.from_numpy(store.read(range(100))["neck"]), torch.from_numpy(extents)).double().numpy()
    train, val, test = (dataset.indices(split) for split in ("train", "val", "test"))
    x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    labels = dataset.labels
    oracle = LogisticRegression(C=row["setting"]["c"], max_iter=5000, tol=1e-9).fit(x[train], labels[train])
    for split, indices in (("val", val), ("test", test)):
        said = oracle.predict_proba(x[indices])[:, 1]
        assert row[split]["auc"] == pytest.approx(roc_auc_score(labels[indices], said), abs=0.01)
    classifier, _ = trained_model.load_classifier(tmp_path / "run")
    read = torch.from_numpy(store.read(test)["neck"])
    said = classifier(None, {"neck": read}, torch.from_numpy(extents[test])).softmax(1)[:, 1].detach().numpy()
    np.testing.assert_allclose(said, oracle.predict_proba(x[test])[:, 1], atol=2e-3)


@pytest.mark.parametrize("task", ["multiclass", "ordinal", "multilabel"])
def test_every_task_is_probed(tmp_path, task):
    dataset = make_dataset((60, 36, 36), classes=3, task=task)
    store = telling_store(tmp_path / "s.zarr", dataset)
    found = probe(blind(dataset), store, tmp_path / "run", Fitting(resamples=20))
    best = {row["method"]: row for row in reversed(found["table"])}
    assert best["logistic regression"]["test"]["auc"] > 0.85
    assert best["nearest neighbours"]["test"]["auc"] > 0.65
    figures = evaluate(tmp_path / "run", blind(dataset), store, resamples=20)
    (chosen,) = [row for row in found["table"] if row["chosen"]]
    assert figures["auc"] == pytest.approx(chosen["test"]["auc"], abs=1e-6)


def test_the_folder_is_that_of_a_run_with_the_table_beside_it(scene, tmp_path):
    dataset, store = scene
    found = probe(dataset, store, tmp_path / "run", Fitting(resamples=20))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = {"model.json", "model.safetensors", "samples.csv", "settings.json", "history.json", "history.csv"}
    assert names == wanted | {"probe.json", "probe.csv", "probe.png"}
    assert json.loads((tmp_path / "run/probe.json").read_text())["table"] == found["table"]
    with (tmp_path / "run/probe.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [float(row["val_auc"]) for row in table] == [row["val"]["auc"] for row in found["table"]]
    assert {"test_auc", "test_auc_low", "test_auc_high", "test_acc"} <= table[0].keys()
    assert (tmp_path / "run/probe.png").read_bytes().startswith(b"\x89PNG")
    history = run_folder.read_history(tmp_path / "run")
    assert [row["c"] for row in history] == list(STRENGTHS)
    best = history[trained_model.load_description(tmp_path / "run").metrics["epoch"] - 1]
    assert best["val_auc"] == max(row["val_auc"] for row in history)
    used = records.read_csv(tmp_path / "run/samples.csv")
    assert [row["split"] for row in used] == ["train"] * 40 + ["val"] * 30
    assert all(row["pixels_sha256"] for row in used)


def test_a_second_probe_finds_its_run_and_other_settings_are_refused(scene, tmp_path):
    dataset, store = scene
    probe(dataset, store, tmp_path / "run", Fitting(resamples=20))
    before = weights_of(tmp_path / "run")
    stamp = (tmp_path / "run/model.safetensors").stat().st_mtime_ns
    probe(dataset, store, tmp_path / "run", Fitting(resamples=20))
    assert (tmp_path / "run/model.safetensors").stat().st_mtime_ns == stamp
    half = TrainOptions(fraction=0.5)
    with pytest.raises(RunError, match=r"train.fraction is 0.5 and was 1.0"):
        probe(dataset, store, tmp_path / "run", Fitting(half, resamples=20))
    probe(dataset, store, tmp_path / "run", Fitting(half, resamples=20, replace=True))
    assert not equal(before, weights_of(tmp_path / "run"))


@pytest.mark.parametrize("part", [{"fraction": 0.3}, {"shots": 6}])
def test_a_part_is_that_of_a_training(scene, tmp_path, part):
    dataset, store = scene
    probe(dataset, store, tmp_path / "probe", Fitting(TrainOptions(**part, seed=4), resamples=20))
    plain = make_dataset((40, 30, 30))
    do(plain, None, tmp_path / "plain", model=PLAIN, options=TrainOptions(**part, seed=4, epochs=1))
    used = [[row["id"] for row in records.read_csv(tmp_path / name / "samples.csv")] for name in ("probe", "plain")]
    assert used[0] == used[1]


def test_a_probe_is_compared_with_a_classifier_of_images(scene, tmp_path):
    dataset, store = scene
    probe(dataset, store, tmp_path / "probe", Fitting(resamples=20))
    evaluate(tmp_path / "probe", dataset, store, resamples=20)
    plain = make_dataset((40, 30, 30))
    do(plain, None, tmp_path / "plain", model=PLAIN)
    evaluate(tmp_path / "plain", plain, None, resamples=20)
    told = compare(tmp_path / "plain", tmp_path / "probe", resamples=20)
    assert "model.backbone" in {setting["setting"] for setting in told["other_settings"]}
    assert told["n"] == 30


def test_without_a_test_split_the_table_has_val_alone(tmp_path):
    dataset = make_dataset((40, 30, 0))
    store = telling_store(tmp_path / "s.zarr", dataset)
    found = probe(blind(dataset), store, tmp_path / "run", Fitting(resamples=20))
    assert all(row["test"] is None for row in found["table"])


def test_what_cannot_be_probed_is_said_before_anything_is_written(scene, tmp_path):
    dataset, store = scene
    with pytest.raises(RunError, match=r"holds no tap 'late', only early, neck"):
        probe(dataset, store, tmp_path / "run", taps=("late",))
    no_val = make_dataset((40, 0, 30))
    with pytest.raises(DataError, match="Split 'val' has no samples"):
        probe(blind(no_val), store, tmp_path / "run")
    lacking = make_store(tmp_path / "part.zarr", make_dataset((40, 30, 30)), only=set(range(90)))
    with pytest.raises(RunError, match=r"lacks 10 of 30 samples of split 'test'"):
        probe(make_dataset((40, 30, 30)), lacking, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    found = probe(make_dataset((40, 30, 30)), lacking, tmp_path / "run", Fitting(allow_missing=True, resamples=20))
    assert found["samples"]["test"] == 20


def test_images_and_views_in_the_store_are_no_taps_to_probe(tmp_path):
    dataset = make_dataset((40, 30, 30))
    taps = {"neck": TAPS["neck"], "neck@hflip": TAPS["neck"]}
    store = make_store(tmp_path / "s.zarr", dataset, taps=taps)
    assert probe(blind(dataset), store, tmp_path / "run", Fitting(resamples=20))["chosen"] == ["neck"]
    asked = probe(blind(dataset), store, tmp_path / "asked", Fitting(resamples=20), taps=("neck@hflip",))
    assert asked["chosen"] == ["neck@hflip"]
    rows = [cache.Row(sample.id, bytes([i]) * 32) for i, sample in enumerate(dataset.samples)]
    specs = {"image": cache.TapSpec(3, 16, 16, "uint8")}
    with cache.create_store(tmp_path / "i.zarr", fingerprint=cache.Fingerprint({}), taps=specs, rows=rows) as writer:
        for plan in writer.pending:
            writer.write(
                plan,
                {"image": np.zeros((len(plan.rows), 3, 16, 16), np.uint8)},
                np.ones((len(plan.rows), 2), np.float32),
            )
        images = writer.commit()
    with pytest.raises(RunError, match="holds no features, only images"):
        probe(blind(dataset), images, tmp_path / "none")
