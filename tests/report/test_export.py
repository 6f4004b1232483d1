"""A folder to hand on is whole or not there, says what it is, and its ONNX file computes what torch computes."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import data
from pipeline.clip import is_clip
from pipeline.errors import CheckpointError, ConfigError, RunError
from pipeline.evaluate.evaluate import evaluate
from pipeline.model.backbones import standardise
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.report import export
from pipeline.report.onnx_file import write_onnx
from pipeline.train import run_folder, trained_model
from pipeline.train.provenance import data_in_numbers
from tests.report.conftest import CLASSES, HOSTILE, Case
from tests.train.scenes import PLAIN, do, make_dataset


def hand_on(case: Case, target: Path, **changes: Any) -> dict[str, Any]:
    facts = data_in_numbers(case.dataset)
    return export.export(case.folder, target, facts, **{"reading": data.Reading(), **changes})


def copied(case: Case, folder: Path) -> Case:
    """A copy of a run, to change."""
    shutil.copytree(case.folder, folder)
    return Case(folder, case.dataset, case.store)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Case:
    """A plain run on three grades, whose head is not a softmax."""
    folder, dataset = tmp_path_factory.mktemp("grades"), make_dataset(classes=3, task="ordinal")
    do(dataset, None, folder, model=PLAIN)
    evaluate(folder, dataset, None, resamples=100)
    return Case(folder, dataset, None)


def test_the_folder_holds_what_is_promised(gated: Case, tmp_path: Path) -> None:
    found = hand_on(gated, tmp_path / "out", license_name="CC BY 4.0", citation="Somebody | 2026")
    names = ["README.md", "classes.json", "config.json", "metrics.json", "model.json", "model.safetensors"]
    assert found["files"] == [*names, "predict.py", "preprocessing.json"]
    assert json.loads((tmp_path / "out/classes.json").read_text()) == list(CLASSES)
    ours, theirs = trained_model.load_classifier(gated.folder)[0], trained_model.load_classifier(tmp_path / "out")[0]
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == gated.figures
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert not [sample.id for sample in gated.dataset.samples if sample.id in text]
    assert str(gated.folder) not in text


def test_the_configuration_is_the_run_s_without_the_places_of_files(gated: Case, tmp_path: Path) -> None:
    here = copied(gated, tmp_path / "run")
    described = json.loads((here.folder / "model.json").read_text())
    for model in (described["model"], described["provenance"]["settings"]["model"]):
        model["weights"] = "/home/somebody/weights.pth"
    described["fingerprint"] |= {"preprocessing": {"name": "medsam", "version": 1}, "dtype": "float16"}
    (here.folder / "model.json").write_text(json.dumps(described))
    hand_on(here, tmp_path / "out")
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found["data"] == {"name": "<i>scene</i>", "task": "binary", "reading": data.reading_rules(data.Reading())}
    assert found["encoder"] == {
        "name": "random", "taps": ["early", "neck"], "weights_sha256": "1" * 64, "input_px": 64, "pool": 4,
        "preprocessing": "medsam",
    }  # fmt: skip
    assert found["store"] == {"dtype": "float16"}
    model, train = found["model"], found["train"]
    assert (model["backbone"], model["weights"], model["image_px"]) == ("tiny", "weights.pth", 16)
    assert model["gates"] == [{"tap": "early", "stage": "stage1"}, {"tap": "neck", "stage": "stage4"}]
    assert model["slca"]["reduction"] == 16
    assert not [path for path in (tmp_path / "out").iterdir() if b"/home/somebody" in path.read_bytes()]
    assert (train["epochs"], train["seed"], train["augment"]["flip_vertical"]) == (3, 1, 0.5)


def test_a_plain_run_is_configured_without_an_encoder(plain: Case, tmp_path: Path) -> None:
    hand_on(plain, tmp_path / "out")
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert (found["encoder"], found["store"], found["model"]["gates"]) == (None, None, [])


def test_the_card_has_data_use_figures_limits_licence(gated: Case, tmp_path: Path) -> None:
    hand_on(gated, tmp_path / "out", license_name="CC BY 4.0", citation="Somebody | 2026", generated=True)
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith('---\nlicense: "CC BY 4.0"\n')
    figures = gated.figures
    ends = figures["intervals"]["auc"]
    row = f"| AUC (area under the ROC curve) | {figures['auc']:.3f} | {ends['low']:.3f} to {ends['high']:.3f} |"
    assert row in card
    assert "| test | 12 | 6 | 6 | 6 |" in card
    assert "It is not meant for any decision about a patient." in card
    assert "The images are generated by a program" in card
    assert "Somebody \\| 2026" in card
    assert HOSTILE not in card
    assert "&lt;script&gt;" in card


def test_the_fingerprint_is_narrowed_to_what_is_read(tmp_path: Path, gated: Case) -> None:
    hand_on(gated, tmp_path / "out")
    fields = json.loads((tmp_path / "out/model.json").read_text())["fingerprint"]
    assert set(fields["taps"]) == {"early", "neck"}
    described = json.loads((tmp_path / "out/model.json").read_text())
    described["fingerprint"] = fields | {"encoder": "sam_demo", "weights_sha256": "0" * 64}
    (tmp_path / "out/model.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="give the sam_demo weights with the SHA-256"):
        export.load_export(tmp_path / "out")


def test_it_is_whole_or_not_there(gated: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "render_card", stopped)
    with pytest.raises(KeyboardInterrupt):
        hand_on(gated, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_not_kept_cannot_be_handed_on(gated: Case, tmp_path: Path) -> None:
    shutil.copytree(gated.folder, tmp_path / "run", ignore=shutil.ignore_patterns("model.safetensors"))
    with pytest.raises(RunError, match=r"weights of the run '.*run' were not kept: delete .* `keep_weights: true`, or"):
        hand_on(Case(tmp_path / "run", gated.dataset, gated.store), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_not_handed_on(gated: Case, tmp_path: Path) -> None:
    shutil.copytree(gated.folder, tmp_path / "run")
    weights = tmp_path / "run/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"does not hold the weights that model.json describes \(they are other weights"):
        hand_on(Case(tmp_path / "run", gated.dataset, gated.store), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_export_is_not_overwritten(gated: Case, plain: Case, tmp_path: Path) -> None:
    assert not hand_on(gated, tmp_path / "out")["unchanged"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert hand_on(gated, tmp_path / "out")["unchanged"]
    with pytest.raises(RunError, match=r"holds something else \(not the same: README\.md, .*model\.json.*name another"):
        hand_on(plain, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"notes\.txt"):
        hand_on(gated, tmp_path / "mine")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_masks_are_no_encoder_to_hand_on(gated: Case, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for path in gated.folder.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    described = json.loads((folder / "model.json").read_text())
    described["fingerprint"]["masks_sha256"] = "0"
    (folder / "model.json").write_text(json.dumps(described))
    with pytest.raises(RunError, match="reads the known masks, which new images do not have"):
        hand_on(Case(folder, gated.dataset, None), tmp_path / "out")


def test_a_plain_model_predicts_without_a_checkpoint(plain: Case, tmp_path: Path) -> None:
    from PIL import Image

    hand_on(plain, tmp_path / "out")
    pixels = plain.dataset.read(0)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (row,) = export.load_export(tmp_path / "out").predict([tmp_path / "image.png"])
    classifier, _ = trained_model.load_classifier(plain.folder)
    with torch.no_grad():
        z = classifier(standardise(torch.from_numpy(pixels).permute(2, 0, 1)[None].float()), {})[0].double()
    on = torch.sigmoid(z)  # P(y > k | y >= k)
    expected = [1 - on[0], on[0] * (1 - on[1]), on[0] * on[1]]
    assert row == pytest.approx([float(p) for p in expected], abs=1e-6)


def onnx_probabilities(path: Path, **inputs: np.ndarray) -> np.ndarray:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(inputs)
    assert {value.shape[0] for value in session.get_inputs()} == {"batch"}
    return np.asarray(session.run(["probabilities"], inputs)[0])


def test_onnx_of_a_gated_model_gives_torch_s_numbers(gated: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    found = hand_on(gated, tmp_path / "out", onnx=True)["onnx"]
    assert found["largest_difference"] < 1e-5
    assert found["inputs"]["early"] == ["B", 5, 4, 4]
    classifier, _ = trained_model.load_classifier(gated.folder)
    random = np.random.default_rng(0)
    for batch in (1, 7):
        images = random.integers(0, 256, (batch, 3, 16, 16)).astype(np.float32)
        extents = random.uniform(0.4, 1.0, (batch, 2)).astype(np.float32)
        maps = {
            tap: random.standard_normal((batch, *shape)).astype(np.float32) for tap, shape in classifier.taps.items()
        }
        said = onnx_probabilities(tmp_path / "out/model.onnx", images=images, extents=extents, **maps)
        tensors = {tap: torch.from_numpy(value) for tap, value in maps.items()}
        with torch.no_grad():
            logits = classifier(standardise(torch.from_numpy(images)), tensors, torch.from_numpy(extents))
        np.testing.assert_allclose(said, torch.softmax(logits, dim=1).numpy(), atol=1e-5)
    content = (tmp_path / "out/model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(run_folder.__file__).parent).encode() not in content
    assert hand_on(gated, tmp_path / "out", onnx=True)["unchanged"]


def test_onnx_of_a_plain_model_takes_images_alone(plain: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    write_onnx(plain.folder, tmp_path / "model.onnx")
    images = np.stack([plain.dataset.read(i) for i in range(5)]).transpose(0, 3, 1, 2).astype(np.float32)
    said = onnx_probabilities(tmp_path / "model.onnx", images=images)
    assert said.shape == (5, 3)
    np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-6)
    hand_on(plain, tmp_path / "out")
    from PIL import Image

    Image.fromarray(plain.dataset.read(4)).save(tmp_path / "image.png")
    (row,) = export.load_export(tmp_path / "out").predict([tmp_path / "image.png"])
    np.testing.assert_allclose(said[4], row, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "side", "gates"),
    [
        ("resnet18", 32, (("neck", "stage4"), ("own", "stage2"))),
        ("swin_v2_t", 64, (("own", "stage3"),)),
        ("convnext_tiny", 64, (("neck", "stage2"),)),
        ("efficientnet_v2_s", 64, (("neck", "stage3"),)),
        ("clip:demo", 64, (("neck", "stage2"),)),
        ("clip:ViT-S-32", 64, (("neck", "stage3"), ("own", "stage4"))),
    ],
)
def test_onnx_of_the_backbones_of_real_runs(backbone, side, gates, tmp_path: Path, monkeypatch) -> None:
    """With statistics that are not those of the start, where a backbone keeps some."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    torch.manual_seed(0)
    classifier = Classifier(ModelOptions(backbone=backbone, image_px=side, gates=gates), {"neck": (3, 4, 4)}, 2)
    if is_clip(backbone):
        nn.init.normal_(classifier.backbone.head[-1].classes, std=0.1)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5, 3, side, side)).astype(np.float32)
    inputs = {"images": images}
    if classifier.taps:
        inputs["extents"] = random.uniform(0.4, 1.0, (5, 2)).astype(np.float32)
        inputs["neck"] = random.standard_normal((5, 3, 4, 4)).astype(np.float32)
    extents, neck = (torch.from_numpy(inputs[name]) if name in inputs else None for name in ("extents", "neck"))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return classifier(
                classifier.backbone.standardise(torch.from_numpy(images)),
                {} if neck is None else {"neck": neck},
                extents,
            )

    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    classifier.train()
    logits()
    classifier.eval()
    described = types.SimpleNamespace(head="softmax")
    monkeypatch.setattr(trained_model, "load_classifier", lambda folder: (classifier, described))
    assert write_onnx(tmp_path, tmp_path / "model.onnx")["largest_difference"] < 1e-5
    said = onnx_probabilities(tmp_path / "model.onnx", **inputs)
    expected = torch.softmax(logits(), dim=1).numpy()
    assert np.ptp(expected[:, 0]) > 1e-3  # else any constant would do
    np.testing.assert_allclose(said, expected, atol=1e-5)


class Branching(nn.Module):
    """Code that depends on the numbers: no graph can hold it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(dim=(2, 3))[:, :2]
        return x if x.sum() > 0 else -x


def test_what_onnx_has_no_word_for(gated: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    classifier, description = trained_model.load_classifier(gated.folder)
    classifier.backbone.head = Branching()
    monkeypatch.setattr(trained_model, "load_classifier", lambda folder: (classifier, description))
    with pytest.raises(RunError, match=r"The tiny in .* cannot be written as ONNX \(.+\): export it without --onnx"):
        hand_on(gated, tmp_path / "out", onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_differ_are_not_written(gated: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.report import onnx_file

    monkeypatch.setattr(onnx_file, "_exported", lambda served, folder: b"")
    monkeypatch.setattr(onnx_file, "_largest_difference", lambda served, content: float("nan"))
    with pytest.raises(RunError, match="differ from torch's by nan"):
        hand_on(gated, tmp_path / "out", onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_the_extra_is_named(gated: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"Writing ONNX needs the extra 'onnx'.*uv sync --extra onnx"):
        write_onnx(gated.folder, tmp_path / "model.onnx")
