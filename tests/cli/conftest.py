"""The real command in a process of its own, and a demo small enough to run it many times."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm

ROOT = Path(__file__).parents[2]

TINY = """\
data: {layout: demo, path: data/demo, count: 48, size_px: 64, seed: 0}
encoder:
  name: sam_demo
  checkpoint: weights/sam_demo.pth
  pool: 4
  training: {images: 32, steps: 4}
store: {path: features/demo.zarr}
model:
  backbone: resnet18
  image_px: 64
  gates: [{tap: early, stage: stage1}, {tap: neck, stage: stage4}]
train: {epochs: 2, batch_size: 8, lr: 1e-3, augment: {flip_horizontal: 0.5}}
run: runs/demo
"""


def environment() -> dict[str, str]:
    """The environment of a child: this project importable from any folder, one thread, so that tests don't compete."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start_pipeline(folder: Path, *arguments: object) -> warm.Child:
    """Start `pipeline` with arguments in a folder."""
    return warm.start("pipeline", *arguments, cwd=folder, env=environment())


def run_pipeline(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `pipeline` with arguments in a folder; its output is text and its errors are not raised."""
    child = start_pipeline(folder, *arguments)
    out, err = child.communicate()
    return subprocess.CompletedProcess(arguments, child.wait(), out, err)


def succeed(folder: Path, *arguments: object, status: int = 0) -> dict[str, Any]:
    """Run a command that must end with `status` and give its report."""
    done = run_pipeline(folder, *arguments, "--json")
    assert done.returncode == status, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def complaint(folder: Path, *arguments: object, status: int) -> str:
    """Run a command that must fail with `status` and give what it says, which is no traceback."""
    done = run_pipeline(folder, *arguments)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `prepare` has run on the tiny demo; tests copy it and never write into it."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "tiny.yaml").write_text(TINY)
    succeed(folder, "prepare", "-c", "tiny.yaml")
    return folder


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the prepared folder in which extract, train and evaluate have run as well."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("trained"))
    for command in ("extract", "train", "evaluate"):
        succeed(folder, command, "-c", "tiny.yaml")
    return folder


def copy_of(source: Path, target: Path) -> Path:
    """Copy a working folder, hard-linking nothing."""
    import shutil

    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


@pytest.fixture
def work(prepared: Path, tmp_path: Path) -> Path:
    """A private copy of the prepared folder."""
    return copy_of(prepared, tmp_path / "work")


@pytest.fixture(autouse=True)
def few_threads() -> None:
    """Keep this process's torch off the cores that the children use."""
    torch.set_num_threads(1)
