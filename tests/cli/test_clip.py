"""CLIP through the real command: trained, scored, explained, reported, handed on, and used on images of its own."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.config.schema import load_config
from pipeline.errors import ConfigError
from pipeline.stages.commands import prepare

from .conftest import complaint, copy_of, succeed

CLIP = """\
data: {layout: demo, path: data/demo, count: 48, size_px: 64, seed: 0}
encoder: {name: sam_demo, checkpoint: weights/sam_demo.pth, pool: 4, training: {images: 32, steps: 4}}
store: {path: features/demo.zarr}
model:
  backbone: clip:demo
  image_px: 64
  clip:
    templates: ["This is a photo of {class}", "a {class} one"]
    words: {spiked: "a lesion with, say, \\"spikes\\""}
train: {epochs: 2, batch_size: 8, lr: 1e-3, text_lr: 0.1, augment: {flip_horizontal: 0.5}}
run: runs/clip
"""


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a CLIP has been trained and scored; no features were extracted."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("clip"))
    (folder / "clip.yaml").write_text(CLIP)
    for command in ("train", "evaluate"):
        succeed(folder, command, "-c", "clip.yaml")
    return folder


def test_it_is_trained_scored_explained_and_reported(folder: Path) -> None:
    report = succeed(folder, "train", "-c", "clip.yaml")
    assert report["flops"]["backbone"] > 1e6
    described = json.loads((folder / "runs/clip/model.json").read_text())["clip"]
    assert described["prompts"]["spiked"][1] == 'a a lesion with, say, "spikes" one'
    succeed(folder, "explain", "-c", "clip.yaml")
    assert (folder / "runs/clip/explain/sheet.png").is_file()
    succeed(folder, "report", "-c", "clip.yaml")
    page = (folder / "runs/clip/report.html").read_text()
    assert "This is a photo of round" in page
    assert "trained at 0.1 times the learning rate" in page
    assert "a miniature of CLIP" in page


def test_it_is_handed_on_with_its_classes_as_constants(folder: Path, tmp_path: Path) -> None:
    with (folder / "runs/clip/predictions.csv").open() as file:
        row = next(csv.DictReader(file))
    said = {key[2:]: float(value) for key, value in row.items() if key.startswith("p_")}
    report = succeed(folder, "export", "-c", "clip.yaml", "--onnx", "runs/clip", str(tmp_path / "model"))
    assert report["onnx"]["inputs"] == {"images": ["B", 3, 64, 64]}
    assert report["onnx"]["largest_difference"] < 1e-4
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Its first weights were drawn from a seed" in card
    assert "“This is a photo of round”" in card
    shutil.copy(folder / "data/demo" / row["id"], tmp_path / "image.png")
    found = succeed(tmp_path, "predict", "--model", "model", "image.png")
    assert found["predictions"][0]["probabilities"] == pytest.approx(said, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("model.backbone=clip:dem",), "There is no CLIP 'clip:dem': the nearest are clip:demo"),
        (("model.clip.words={spikey: x}",), "did you mean 'spiked'?"),
        (("model.clip.templates=[a photo]",), "has no {class} in it"),
        (("model.weights=openia",), "There are no weights 'openia' for 'clip:demo'"),
        (("model.backbone=clip:ViT-B-32", "model.weights=openai"), "`pipeline prepare` downloads them"),
        (("model.image_px=70",), "this CLIP reads patches of 32 px: take 64 or 96"),
        (("model.backbone=resnet18",), "train's text_lr is 0.1, and 'resnet18' reads no texts"),
    ],
)
def test_what_cannot_be_is_said_before_long_work(folder: Path, changes: tuple[str, ...], words: str) -> None:
    settings = [word for change in (*changes, "run=runs/other") for word in ("--set", change)]
    status = 1 if "prepare" in words else 2
    said = " ".join(complaint(folder, "train", "-c", "clip.yaml", *settings, status=status).split())
    assert words in said
    assert not (folder / "runs/other").exists()


def test_a_missing_extra_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as where it is not installed
    (tmp_path / "clip.yaml").write_text(CLIP)
    with pytest.raises(ConfigError, match=r"pip install 'slca-pipeline\[clip\]'"):
        prepare(load_config(Path("clip.yaml")), lambda *_, **__: None)
    assert not (tmp_path / "data").exists()


def test_weights_of_a_persons_own_are_not_overwritten_by_the_miniature(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path / "work")
    (folder / "clip.yaml").write_text(CLIP)
    (folder / "mine.safetensors").write_bytes(b"mine")
    said = complaint(folder, "prepare", "-c", "clip.yaml", "--set", "model.weights=mine.safetensors", status=1)
    assert "name another file as model.weights" in " ".join(said.split())
    assert (folder / "mine.safetensors").read_bytes() == b"mine"
