"""`pipeline doctor`: what it says of a machine is what the machine has, and its clocks clock the real thing."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import encoders
from pipeline.config.schema import load_config
from pipeline.errors import ConfigError
from pipeline.model.classifier import ModelOptions
from pipeline.stages import clocks, doctor
from pipeline.stages.first_config import Given, propose
from pipeline.stages.inputs import load_dataset

from .conftest import copy_of, run_pipeline, succeed


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of a moment, and no large encoder beside the configured one."""
    monkeypatch.setattr(clocks, "_ROUNDS_SECONDS", 0.05)
    monkeypatch.setattr(doctor, "_COMPARED", ())


@pytest.mark.usefixtures("quick")
def test_the_machine_and_the_experiment_are_told(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(trained, tmp_path / "work")
    monkeypatch.chdir(folder)
    config = load_config(Path("tiny.yaml"))
    report = doctor.examine(config, lambda *_, **__: None)
    assert report["software"]["torch"] == torch.__version__.partition("+")[0]
    assert report["processor"]["cores"] == len(os.sched_getaffinity(0))
    assert report["memory_gib"]["available"] <= report["memory_gib"]["total"]
    assert report["disk"]["free_gib"] <= report["disk"]["total_gib"]
    assert {"timm", "dicom", "onnx"} <= set(report["extras"])
    (weights,) = [found for found in report["weights"] if found["configured"]]
    assert weights["sha256"] == hashlib.sha256(Path("weights/sam_demo.pth").read_bytes()).hexdigest()
    for name in ("decode", "read", "train", "encode sam_demo at 256 px"):
        assert report["clocks"][name] > 0
    seconds = report["clocks"]["encode sam_demo at 256 px"]
    said = next(sentence for sentence in report["means"] if sentence.startswith("extract: sam_demo"))
    assert said == (
        f"extract: sam_demo at 256 px: {doctor._duration(seconds)} an image here; 48 images: "
        f"{doctor._duration(48 * seconds)}"
    )
    images = len(load_dataset(config).indices("train"))
    assert any(f"2 epochs of {images} images" in sentence for sentence in report["means"])
    assert any(sentence.startswith("store: 48 rows are 0.00 GiB") for sentence in report["means"])
    Path("weights/sam_demo.pth").unlink()
    report = doctor.examine(config, lambda *_, **__: None)
    assert "the weights 'weights/sam_demo.pth' are not here: `pipeline prepare` has them" in report["means"]


def test_the_classifiers_weights_are_listed_as_well(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    mine = tmp_path / "clip.safetensors"
    mine.write_bytes(b"weights")

    def listed(backbone: str, weights: str) -> tuple[str, str | None]:
        given = [f"model.backbone={backbone}", f"model.weights={weights}", "model.gates=[]"]
        (_, found) = [one for one in doctor._weights(load_config(Path("tiny.yaml"), given)) if one["configured"]]
        assert found["found"] is (found["sha256"] is not None)
        return found["name"], found["sha256"]

    assert listed("clip:demo", str(mine)) == (str(mine), hashlib.sha256(b"weights").hexdigest())
    assert listed("clip:ViT-B-32", "openai") == ("openai of clip:ViT-B-32", None)
    assert listed("resnet18", "imagenet") == ("imagenet of resnet18", None)
    assert listed("clip:ViT-B-32", "unheard") == ("unheard of clip:ViT-B-32", None)


@pytest.mark.parametrize(("few", "images"), [("fraction=0.5", range(12, 17)), ("shots=2", range(5, 12))])
def test_an_epoch_has_as_many_images_as_are_trained_on(
    trained: Path, monkeypatch: pytest.MonkeyPatch, few: str, images: range
) -> None:
    monkeypatch.chdir(trained)
    config = load_config(Path("tiny.yaml"), [f"train.{few}"])
    assert doctor._trained_on(config, load_dataset(config)) in images
    assert doctor._trained_on(config, None) == {"fraction=0.5": 300, "shots=2": 4}[few]


@pytest.mark.usefixtures("quick")
def test_a_store_without_images_is_read_and_trained_on(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(trained, tmp_path / "work")
    monkeypatch.chdir(folder)
    succeed(folder, "store", "push", "features/demo.zarr", folder / "sent.zarr", "-c", "tiny.yaml", "--with-labels")
    made = propose("sent.zarr", Given())
    assert made["images"] == 48
    assert made["next"][0] == "pipeline probe -c configs/sent.yaml"
    report = doctor.examine(load_config(Path(made["config"])), lambda *_, **__: None)
    assert report["clocks"].keys() == {"read", "train", "bfloat16_over_float32"}
    images = made["counts"]["splits"]["train"]
    assert any(sentence.startswith(f"train: none: 100 epochs of {images} images") for sentence in report["means"])
    assert run_pipeline(folder, "train", "-c", made["config"], "--set", "train.epochs=1").returncode == 0
    with pytest.raises(ConfigError, match="no labels travel with this store"):
        propose("features/demo.zarr", Given())


def test_a_clock_tells_the_time_of_what_it_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_ROUNDS_SECONDS", 0.2)
    assert 0.02 <= clocks._average([lambda: time.sleep(0.02)]) < 0.2
    calls = []
    clocks._average([lambda: calls.append(1), lambda: calls.append(2)])
    assert calls == [1, 2]  # each image once


def test_an_encoder_without_weights_is_clocked_with_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_ROUNDS_SECONDS", 0.05)
    made = []
    build = encoders.build_encoder

    def remember(*arguments: object, **options: object) -> object:
        made.append(build(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(encoders, "build_encoder", remember, raising=False)
    asked = clocks.Asked("sam_demo", ("neck",), None, input_px=64)
    assert asked.label == "sam_demo at 64 px"
    assert clocks.Asked("sam_demo", ("neck", "masks"), None).label == "sam_demo at 256 px, without masks"
    assert clocks.Asked("sam_demo", ("neck", "masks"), Path("w.pth")).label == "sam_demo at 256 px"
    assert clocks.of_encoding(asked, "cpu") > 0
    assert (made[0].fingerprint()["encoder"], made[0].input_px, list(made[0].taps)) == ("sam_demo", 64, ["neck"])
    assert clocks.of_reading(None, {"neck": (8, 4, 4)}) > 0
    assert np.isfinite(clocks.of_decoding(None))
    linear = ModelOptions(backbone="none", gates=(), fuse=("neck",))
    assert clocks.of_training(linear, {"neck": (8, 4, 4)}, 4, "cpu") > 0


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0123, "12.3 ms"), (5.04, "5.04 s"), (3900.0, "65 min"), (48240.0, "13.4 h")]
)
def test_times_are_said_as_people_do(seconds: float, said: str) -> None:
    assert doctor._duration(seconds) == said


def test_the_command_needs_no_configuration_and_says_so(tmp_path: Path) -> None:
    done = run_pipeline(tmp_path, "doctor", "--help")
    assert "in half a minute" in " ".join(done.stdout.split())
    done = run_pipeline(tmp_path, "doctor", "-c", "missing.yaml")
    assert done.returncode == 2
    assert "missing.yaml: cannot be read" in done.stderr


def test_a_clip_is_clocked_whose_weights_are_not_here() -> None:
    options = ModelOptions(backbone="clip:demo", weights="elsewhere.safetensors", image_px=64, gates=())
    assert clocks.of_training(options, {}, 2, "cpu") > 0
