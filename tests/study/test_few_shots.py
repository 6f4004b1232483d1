"""Class prompts, caches and shots as a study: a miniature CLIP, its features, all runs, tables and a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import cache
from pipeline import records
from pipeline.cli import cli
from pipeline.config.schema import load_config
from pipeline.encoders import weights_sha256
from pipeline.errors import CheckpointError, ConfigError
from pipeline.progress import silent
from pipeline.stages import commands, studies
from pipeline.stages.study_plan import load_study
from pipeline.train.identity import recorded_identity

BASE = """\
data: {layout: demo, path: data/demo, count: 90, size_px: 48}
encoder: {name: "clip:demo", checkpoint: weights/clip_demo.safetensors}
store: {path: features/clip.zarr}
model:
  backbone: none
  fuse: [embedding]
  clip:
    templates: ["a {class} lesion", "This is a photo of {class}"]
    words: {spiked: star-shaped}
    training: {images: 12, steps: 3}
train: {epochs: 1}
run: runs/clip
"""
STUDY = """\
base: clip.yaml
folder: studies/few
baseline: zero_shot
variants:
  zero_shot: {command: probe, probe.method: zero_shot}
  tip_f: {command: probe, probe.method: tip_f}
grid:
  train.shots: [1, 4]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip.yaml").write_text(BASE)
    Path("few.yaml").write_text(STUDY)
    return tmp_path


def test_a_study_of_few_images_makes_its_clip_its_features_and_its_runs(folder):
    plan = load_study(Path("few.yaml"))
    studies.prepare(plan, lambda *args, **info: None)
    record = json.loads(Path("weights/clip_demo.json").read_text())
    assert record["settings"]["steps"] == 3
    assert 0 <= record["zero_shot_auc"] <= 1
    before = Path("weights/clip_demo.safetensors").stat().st_mtime_ns
    report = studies.study(plan, lambda *args, **info: None)
    assert (report["done"], report["failed"]) == (4, {})
    rows = {(row["variant"], row["shots"]): row for row in report["table"] if row["score"] == "auc"}
    assert rows.keys() == {(name, shots) for name in ("zero_shot", "tip_f") for shots in (1, 4)}
    assert rows["zero_shot", 1]["mean"] == rows["zero_shot", 4]["mean"]  # prompts alone, whatever is at hand
    (few,) = (
        run for run in plan.runs if run.cell == {"variant": "tip_f", "backbone": "none", "fraction": 1.0, "shots": 4}
    )
    settings = recorded_identity(few.folder)
    assert settings["train"]["prompts"]["spiked"] == ["a star-shaped lesion", "This is a photo of star-shaped"]
    assert settings["train"]["shots"] == 4
    used = [row for row in records.read_csv(few.folder / "samples.csv") if row["split"] == "train"]
    assert 9 <= len(used) <= 15  # three classes, patients of up to three images
    assert (Path("studies/few/curve.png")).is_file()
    said = CliRunner().invoke(
        cli, ["report", "-c", "clip.yaml", "--set", f"run={few.folder}", "--json"], standalone_mode=False
    )
    assert said.exception is None, said.output
    page = (few.folder / "report.html").read_text()
    assert "miniature of CLIP" in page
    assert "probe.method=" in page
    commands.prepare(plan.configs[few.name], lambda *args, **info: None)
    assert Path("weights/clip_demo.safetensors").stat().st_mtime_ns == before  # made once


def test_prompts_that_do_not_fit_are_refused_before_anything_is_read(folder):
    Path("clip.yaml").write_text(BASE.replace("spiked: star-shaped", "spikey: star-shaped"))
    plan = load_study(Path("few.yaml"))
    studies.prepare(plan, lambda *args, **info: None)
    with pytest.raises(ConfigError, match=r"words for a class 'spikey'.* did you mean 'spiked'"):
        studies.study(plan, lambda *args, **info: None)
    sam = BASE.replace('"clip:demo"', "sam_demo")
    Path("clip.yaml").write_text(sam)
    from pipeline.stages.inputs import class_texts, load_dataset

    config = load_config(Path("clip.yaml"), ["probe.method=tip"])
    with pytest.raises(ConfigError, match=r"the encoder 'sam_demo' is no CLIP"):
        class_texts(config, load_dataset(config))


def test_whoever_is_sent_the_features_asks_the_same_prompts(folder):
    config = load_config(Path("clip.yaml"), ["probe.method=tip", "train.shots=4"])
    for command in (commands.prepare, commands.extract):
        command(config, silent)
    ours = commands.probe(config, silent)
    pushed = CliRunner().invoke(
        cli,
        ["store", "push", str(config.store.path), "sent", "-c", "clip.yaml", "--with-labels"],
        standalone_mode=False,
    )
    assert pushed.exception is None, pushed.output
    cache.pull_store("sent", Path("features/sent.zarr"))
    sent = "data: {layout: store, path: features/sent.zarr}\nrun: runs/sent\n"
    Path("sent.yaml").write_text(sent + "model: {clip: {words: {spiked: star-shaped}}}\n")
    asked = (
        "probe.method=tip",
        "train.shots=4",
        'model.clip.templates=["a {class} lesion", "This is a photo of {class}"]',
    )
    with pytest.raises(
        CheckpointError, match=r"the text tower of 'clip:demo'.* name the weights .* encoder.checkpoint"
    ):
        commands.probe(load_config(Path("sent.yaml"), asked), silent)
    theirs = load_config(Path("sent.yaml"), [*asked, "encoder.checkpoint=weights/clip_demo.safetensors"])
    assert commands.prepare(theirs, silent)["encoder"]["sha256"] == weights_sha256(
        Path("weights/clip_demo.safetensors")
    )
    for row, known in zip(commands.probe(theirs, silent)["table"], ours["table"], strict=True):
        assert row == known
