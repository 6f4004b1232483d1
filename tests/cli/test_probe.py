"""`pipeline probe` and what takes its run, as a person calls them; and a study of every place for features."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import ROOT, complaint, copy_of, run_pipeline, succeed

HANDED = "runs/demo-probe"


@pytest.fixture
def extracted(trained: Path, tmp_path: Path) -> Path:
    return copy_of(trained, tmp_path / "work")


def test_a_probe_is_a_run_for_every_command(extracted: Path) -> None:
    done = run_pipeline(extracted, "probe", "-c", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("→", done.stdout)) == 1
    assert f"Next: pipeline evaluate -c tiny.yaml --set run={HANDED}" in done.stdout
    report = succeed(extracted, "probe", "-c", "tiny.yaml", "--set", "resources.workers=1")
    (chosen,) = [row for row in report["table"] if row["chosen"]]
    here = ("-c", "tiny.yaml", "--set", f"run={HANDED}")
    figures = succeed(extracted, "evaluate", *here)
    assert figures["auc"] == pytest.approx(chosen["test"]["auc"], abs=1e-6)
    page = Path(succeed(extracted, "report", *here)["report"])
    text = (extracted / page).read_text()
    assert "How well do pooled features of the frozen encoder sam_demo alone tell" in text
    assert re.search(rf"pipeline probe -c tiny.yaml .*--run {HANDED} --tap", text)
    assert "Loss by penalty, from strong to weak" in text
    assert "pipeline train" not in text
    succeed(extracted, "export", HANDED, "handed_on", "-c", "tiny.yaml")
    image = next((extracted / "data/demo/images").glob("*.png")).relative_to(extracted)
    said = [
        succeed(extracted, "predict", *how, image)["predictions"][0]["probabilities"]
        for how in (here, ("--model", "handed_on", "--checkpoint", "weights/sam_demo.pth"))
    ]
    assert said[0] == pytest.approx(said[1], abs=1e-9)
    assert "no place that it looked at" in complaint(extracted, "explain", *here, status=1)
    (row,) = [row for row in succeed(extracted, "runs")["runs"] if row["run"] == HANDED]
    assert row["model"].startswith("no backbone, pooled features of ")
    assert re.fullmatch(r"probe, C [\d.e-]+, seed 0", row["training"])
    assert row["test"]["auc"]["value"] == figures["auc"]
    told = succeed(extracted, "compare", "runs/demo", HANDED)
    assert told["scores"]["auc"]["second"] == pytest.approx(figures["auc"])


def test_the_commands_of_the_report_give_the_run_again(extracted: Path) -> None:
    succeed(extracted, "probe", "-c", "tiny.yaml", "--tap", "late", "--tap", "neck", "--run", "runs/two")
    weights = (extracted / "runs/two/model.safetensors").read_bytes()
    here = ("-c", "tiny.yaml", "--set", "run=runs/two")
    succeed(extracted, "evaluate", *here)
    succeed(extracted, "report", *here)
    (line,) = re.findall(r"pipeline (probe [^<\n]*)", (extracted / "runs/two/report.html").read_text())
    assert "&" not in line
    succeed(extracted, *line.split())  # the same run: nothing is refused
    (extracted / "runs/two/model.json").unlink()
    succeed(extracted, *line.split())
    assert (extracted / "runs/two/model.safetensors").read_bytes() == weights


def test_a_study_has_features_in_every_place(extracted: Path) -> None:
    study = (ROOT / "configs/studies/demo_features.yaml").read_text()
    study = study.replace("configs/default.yaml", "tiny.yaml").replace("[0.25, 1]", "[1]").replace("[0, 1, 2]", "[0]")
    (extracted / "study.yaml").write_text(study)
    succeed(extracted, "study", "-c", "study.yaml", "--set", "train.epochs=1")
    with (extracted / "studies/demo_features/table.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["score"].lower() == "auc"]
    backbones = {row["variant"]: row["backbone"] for row in rows}
    assert backbones == {
        **dict.fromkeys(("plain", "slca", "fuse"), "resnet18"),
        **dict.fromkeys(("features_alone", "probe"), "none"),
    }
    (folder,) = (extracted / "studies/demo_features/runs").glob("probe-*")
    assert json.loads((folder / "model.json").read_text())["training"]["solver"] == "logistic regression"
    assert not (folder / "model.safetensors").exists()  # keep_weights: false
    again = succeed(extracted, "study", "-c", "study.yaml", "--set", "train.epochs=1")
    assert again["done"] == 5


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--tap", "later"), 1, "holds no tap 'later', only patch, early, middle, late, neck"),
        (("--set", "store.path=features/none.zarr"), 1, "features/none.zarr"),
        (("--set", "encoder.pool=2"), 1, "encoder.pool asks for 2"),
        (("--set", "model.fuse=3"), 2, "model.fuse"),
    ],
)
def test_what_is_wrong_is_said(extracted: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    assert said in complaint(extracted, "probe", "-c", "tiny.yaml", *arguments, status=status)
    assert not (extracted / HANDED).exists()


SENT = "data: {layout: store, path: features/sent.zarr}\nrun: runs/sent\n"


@pytest.fixture
def sent(trained: Path, tmp_path: Path) -> Path:
    """An empty folder with a store that was pulled, pseudonyms for ids and labels on board, and three lines of YAML."""
    home, away = copy_of(trained, tmp_path / "home"), tmp_path / "away"
    away.mkdir()
    secret = ("--pseudonymise", tmp_path / "secret/key", "--with-labels")
    succeed(home, "store", "push", "features/demo.zarr", tmp_path / "share", "-c", "tiny.yaml", *secret)
    succeed(away, "store", "pull", tmp_path / "share", "features/sent.zarr")
    (away / "sent.yaml").write_text(SENT)
    return away


def test_a_group_without_images_has_the_same_probe(sent: Path, extracted: Path) -> None:
    here = ("-c", "sent.yaml", "--set", "run=runs/sent-probe")
    theirs = succeed(sent, "probe", "-c", "sent.yaml")
    ours = succeed(extracted, "probe", "-c", "tiny.yaml")
    assert theirs["chosen"] == ours["chosen"]
    for row, known in zip(theirs["table"], ours["table"], strict=True):
        assert row["test"]["auc"] == known["test"]["auc"]
        assert row["setting"] == known["setting"]
    weights = [load_file(run / "model.safetensors") for run in (sent / "runs/sent-probe", extracted / HANDED)]
    for name, ours_are in weights[1].items():  # of samples in another order, which hides whose they are
        torch.testing.assert_close(weights[0][name], ours_are, rtol=1e-3, atol=1e-4)
    figures = succeed(sent, "evaluate", *here)
    known = succeed(extracted, "evaluate", "-c", "tiny.yaml", "--set", f"run={HANDED}")
    assert figures["auc"] == known["auc"]
    assert figures["bootstrap"]["groups"] == known["bootstrap"]["groups"]  # patients travel, as pseudonyms
    succeed(sent, "report", *here)
    page = (sent / "runs/sent-probe/report.html").read_text()
    assert "Whether two splits share an image is not known" in page
    assert "pipeline extract" not in page
    succeed(sent, "export", "runs/sent-probe", "handed_on", "-c", "sent.yaml")
    succeed(sent, "prepare", "-c", "sent.yaml")  # which has nothing to do


def test_features_alone_are_trained_without_images_and_studied(sent: Path) -> None:
    alone = ("--set", "model.fuse=[late]", "--set", "train.epochs=2")
    succeed(sent, "train", "-c", "sent.yaml", *alone)
    succeed(sent, "evaluate", "-c", "sent.yaml", *alone)
    lines = (
        "base: sent.yaml",
        "folder: studies/sent",
        "baseline: probe",
        "variants: {probe: {command: probe}, late: {model.fuse: [late], train.epochs: 1}}",
        "grid: {train.seed: [0, 1]}",
    )
    (sent / "study.yaml").write_text("\n".join(lines))
    made = succeed(sent, "study", "-c", "study.yaml")
    assert made["done"] == 4
    late = [row for row in made["table"] if row["variant"] == "late"]
    assert late
    assert all(row["difference_low"] <= row["difference"] <= row["difference_high"] for row in late)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train", "--set", "model.backbone=resnet18"), "under pseudonyms and holds no images, so no backbone"),
        (("train",), "nothing to classify: name taps in fuse"),
        (("extract",), "no image can be encoded or added to it. Without images there are: probe"),
        (("predict", "--set", "run=runs/sent-probe", "scan.png"), "no encoder is configured"),
    ],
)
def test_what_needs_images_says_so(sent: Path, command: tuple[str, ...], said: str) -> None:
    succeed(sent, "probe", "-c", "sent.yaml", "--tap", "neck")
    assert said in complaint(sent, command[0], "-c", "sent.yaml", *command[1:], status=2)
    assert not (sent / "runs/sent").exists()


def test_whoever_has_the_images_is_told_that_ids_are_pseudonyms(sent: Path, extracted: Path) -> None:
    said = complaint(
        extracted, "probe", "-c", "tiny.yaml", "--set", f"store.path={sent / 'features/sent.zarr'}", status=1
    )
    assert "its ids are pseudonyms, so only the key's owner knows whose its rows are" in said
    assert "data: {layout: store, path: " in said


def test_a_store_without_labels_says_where_to_get_them(extracted: Path) -> None:
    (extracted / "bare.yaml").write_text(SENT.replace("sent.zarr", "demo.zarr"))
    assert "no labels travel with this store. Ask for a copy" in complaint(
        extracted, "probe", "-c", "bare.yaml", status=1
    )


def test_a_store_that_holds_images_trains_a_backbone(prepared: Path, tmp_path: Path) -> None:
    home, away = copy_of(prepared, tmp_path / "home"), tmp_path / "away"
    away.mkdir()
    stored = ("-c", "tiny.yaml", "--set", "store.image_px=64")
    succeed(home, "extract", *stored)
    succeed(home, "store", "push", "features/demo.zarr", tmp_path / "share", *stored, "--with-labels")
    succeed(away, "store", "pull", tmp_path / "share", "features/sent.zarr")
    (away / "sent.yaml").write_text(SENT)
    gated = (
        "-c", "sent.yaml", "--set", "model.backbone=resnet18", "--set", "model.image_px=64", "--set", "train.epochs=1",
        "--set", "train.batch_size=8", "--set", "train.lr=1e-3", "--set", "train.augment={flip_horizontal: 0.5}",
        "--set", "model.gates=[{tap: neck, stage: stage4}]",
    )  # fmt: skip
    succeed(away, "train", *gated)
    succeed(home, "train", *stored, *gated[2:], "--set", "run=runs/sent")
    equal = [(folder / "runs/sent/model.safetensors").read_bytes() for folder in (home, away)]
    assert equal[0] == equal[1]
    assert (away / "runs/sent/samples.csv").read_text() == (home / "runs/sent/samples.csv").read_text()
    succeed(away, "evaluate", *gated)
    succeed(away, "explain", *gated)
    plain = (*gated[:4], *gated[4:-2], "--set", "model.gates=[]", "--set", "run=runs/plain")
    succeed(away, "train", *plain)
    assert (away / "runs/plain/samples.csv").read_text() == (home / "runs/sent/samples.csv").read_text()
    said = complaint(away, "train", *gated, "--set", "model.image_px=32", "--set", "run=runs/small", status=2)
    assert "holds images at 64 px, and 32 px are asked for" in said
