"""`pipeline probe` and what takes its run, as a person calls them; and a study of every place for features."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, complaint, copy_of, run_pipeline, succeed

HANDED = "runs/demo-probe"


@pytest.fixture
def extracted(trained: Path, tmp_path: Path) -> Path:
    return copy_of(trained, tmp_path / "work")


def test_a_probe_is_a_run_for_every_command(extracted: Path) -> None:
    done = run_pipeline(extracted, "probe", "-c", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("→", done.stdout)) == 1
    assert f"Next: pipeline evaluate --set run={HANDED}" in done.stdout
    report = succeed(extracted, "probe", "-c", "tiny.yaml", "--set", "resources.workers=1")
    (chosen,) = [row for row in report["table"] if row["chosen"]]
    here = ("-c", "tiny.yaml", "--set", f"run={HANDED}")
    figures = succeed(extracted, "evaluate", *here)
    assert figures["auc"] == pytest.approx(chosen["test"]["auc"], abs=1e-6)
    page = Path(succeed(extracted, "report", *here)["report"])
    text = (extracted / page).read_text()
    assert "How well do pooled features of the frozen encoder sam_demo alone tell" in text
    assert re.search(rf"pipeline probe -c tiny.yaml .*--run {HANDED} --tap", text)
    assert "Loss by penalty, strong to weak" in text
    assert "pipeline train" not in text
    succeed(extracted, "export", HANDED, "handed_on", "-c", "tiny.yaml")
    image = next((extracted / "data/demo/images").glob("*.png")).relative_to(extracted)
    said = [
        succeed(extracted, "predict", *how, image)["predictions"][0]["probabilities"]
        for how in (here, ("--model", "handed_on", "--checkpoint", "weights/sam_demo.pth"))
    ]
    assert said[0] == pytest.approx(said[1], abs=1e-9)
    assert "no place that it looked at" in complaint(extracted, "explain", *here, status=1)
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
