"""The paper's experiments run by `dvc repro configs/paper/dvc.yaml`, and by that alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.cli.conftest import ROOT
from tests.cli.test_dvc import Project

STUDY = """\
base: configs/breastmnist.yaml
folder: studies/paper/breastmnist
baseline: plain
set: {train.epochs: 1, model.image_px: 32, store.path: features/breastmnist_vit_h.zarr}
variants:
  plain: {model.gates: []}
  slca: {}
  random_sam:
    encoder.training: {steps: 0, seed: 0}
    encoder.checkpoint: weights/random.pth
    store.path: features/breastmnist_vit_h_random.zarr
grid:
  train.fraction: [0.5, 1]
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A clone whose experiment on BreastMNIST is one on the tiny demo, and the only one."""
    project = Project(tmp_path)
    shutil.copytree(ROOT / "configs/paper", tmp_path / "configs/paper")
    shutil.copy(tmp_path / "configs/default.yaml", tmp_path / "configs/breastmnist.yaml")
    (tmp_path / "configs/paper/breastmnist.yaml").write_text(STUDY)
    stages = tmp_path / "configs/paper/dvc.yaml"
    stages.write_text(stages.read_text().replace("[breastmnist, retinamnist, isic2017]", "[breastmnist]"))
    project.run("git", "add", "-A")
    project.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "paper")
    return project


def test_the_papers_table_is_made_when_asked_for_and_not_otherwise(project: Project) -> None:
    assert "configs/paper" not in project.run("dvc", "repro", "--dry", "prepare")
    with (project.folder / "dvc.yaml").open() as file:
        demo = list(YAML(typ="safe").load(file)["stages"])
    assert project.run("dvc", "stage", "list", "--name-only").split() == demo  # what a plain `dvc repro` runs

    said = project.run("dvc", "repro", "configs/paper/dvc.yaml")
    for stage in ("extract@breastmnist", "study@breastmnist"):
        assert f"Running stage 'configs/paper/dvc.yaml:{stage}'" in said
    table = (project.folder / "studies/paper/breastmnist/table.md").read_text()
    assert table.startswith("| variant | fraction | seeds | AUC | AUC less plain |")
    assert "| random_sam | 0.5 | 1 | 0." in table
    left = project.run("git", "status", "--porcelain").split()
    assert left == ["??", "configs/paper/dvc.lock"]

    shutil.rmtree(project.folder / "studies/paper/breastmnist/runs")
    assert "Running stage" not in project.run("dvc", "repro", "configs/paper/dvc.yaml")
