"""How much gates vary is measured on val, written down after each epoch, and said where it is next to nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pipeline import records
from pipeline.model.slca import spread
from pipeline.train import gate_spread, trained_model
from pipeline.train.feeding.feed import Feed
from tests.train.scenes import PLAIN, QUICK, TINY, do

ONE = dataclasses.replace(QUICK, epochs=1)


def test_the_history_has_the_spread_of_each_gate_over_the_val_images(scene, store, tmp_path):
    report = do(scene, store, tmp_path, options=ONE)
    classifier, description = trained_model.load_classifier(tmp_path)
    feed = Feed(scene, "val", store, taps=TINY.taps, image_px=TINY.image_px, device=torch.device("cpu"))
    (batch,) = feed.batches([torch.arange(len(feed))])
    by_hand = {}
    with torch.no_grad():
        for (tap, stage), gate in zip(TINY.gates, classifier.gates, strict=True):
            attention, extents = gate(batch.features[tap], batch.extents)
            by_hand[f"{tap}_{stage}"] = spread(attention, extents).mean().item()
    (row,) = records.read_csv(tmp_path / "history.csv")
    for name, value in by_hand.items():
        assert value > gate_spread.FLAT
        assert float(row[f"gate_spread_{name}"]) == pytest.approx(value, rel=1e-4)
    assert float(row["gate_spread"]) == pytest.approx(min(by_hand.values()), rel=1e-4)
    assert report.metrics["gate_spread"] == pytest.approx(by_hand, rel=1e-4)
    assert description.metrics["gate_spread"] == report.metrics["gate_spread"]
    assert gate_spread.flat_gates(report.metrics) == ""


def test_gates_that_end_flat_are_named(scene, store, tmp_path):
    still = dataclasses.replace(ONE, lr=1e-9)
    report = do(scene, store, tmp_path, model=dataclasses.replace(TINY, identity_start=True), options=still)
    assert report.history[0]["gate_spread"] == pytest.approx(0, abs=1e-6)
    said = gate_spread.flat_gates(report.metrics)
    assert said.startswith("2 of 2 gates ended flat and so change next to nothing: early_stage1 (0.000), neck_stage4 (")


def test_a_gate_without_places_and_a_plain_classifier_have_no_spread(scene, store, tmp_path):
    squeezed = do(scene, store, tmp_path / "se", model=dataclasses.replace(TINY, pool=64), options=ONE)
    plain = do(scene, None, tmp_path / "plain", model=PLAIN, options=ONE)
    for report in (squeezed, plain):
        assert not any(key.startswith("gate_spread") for key in [*report.history[0], *report.metrics])
        assert gate_spread.flat_gates(report.metrics) == ""


@pytest.mark.parametrize(("old", "new"), [(None, "layer_on_blocks"), (True, "layer"), (False, "none")])
def test_a_run_of_an_older_version_still_loads(scene, store, tmp_path, old, new):
    do(scene, store, tmp_path, model=dataclasses.replace(TINY, norm=new), options=ONE)
    before, _ = trained_model.load_classifier(tmp_path)
    file = tmp_path / "model.json"
    values = json.loads(file.read_text())
    del values["model"]["norm"], values["metrics"]["gate_spread"], values["training"]["gate_lr"]
    values["model"] |= {"normalise": old, "gain": 16.0}
    file.write_text(json.dumps(values))
    classifier, description = trained_model.load_classifier(tmp_path)
    assert description.model.norm == new
    assert gate_spread.flat_gates(description.metrics) == ""  # nobody measured it
    assert all(map(torch.equal, classifier.state_dict().values(), before.state_dict().values()))
