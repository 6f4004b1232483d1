"""`dvc repro` runs what a change touches and nothing else; the metrics and plots that it declares are there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cache

from .conftest import ROOT, TINY, environment

BIN = Path(sys.executable).parent
STAGES = ["prepare", "extract", "train", "evaluate", "explain", "report"]


class Project:
    """A clone of this project whose demo is small."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (".dvcignore", ".gitignore"):
            shutil.copy(ROOT / name, folder / name)
        stages = (ROOT / "dvc.yaml").read_text()
        assert "cmd: pipeline explain\n" in stages
        (folder / "dvc.yaml").write_text(stages.replace("pipeline explain\n", "pipeline explain --count 1\n"))
        for name in ("pipeline", "cache"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / ".dvc").mkdir()
        for name in ("config", ".gitignore"):
            shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
        (folder / "configs").mkdir()
        (folder / "configs/default.yaml").write_text(TINY)
        self.run("git", "init", "-q")
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "clone")

    def run(self, *command: str) -> str:
        path = f"{BIN}:{environment()['PATH']}"
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**environment(), "PATH": path, "DVC_NO_ANALYTICS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro(self, *targets: str) -> list[str]:
        """Run `dvc repro`; the stages that ran."""
        return re.findall(r"Running stage '(\w+)'", self.run("dvc", "repro", *targets))

    def change(self, old: str, new: str) -> None:
        config = self.folder / "configs/default.yaml"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new))


def test_killing_dvc_alone_never_leads_to_two_writers(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.change("pool: 4", "pool: 4\n  input_px: 512")  # long enough to be caught at it
    project.repro("prepare")
    command = [str(BIN / "dvc"), "repro", "extract"]
    path = f"{BIN}:{environment()['PATH']}"
    dvc = subprocess.Popen(command, cwd=tmp_path, env={**environment(), "PATH": path}, stdout=subprocess.DEVNULL)
    lock = tmp_path / "features/demo.zarr.partial/lock"
    while not lock.exists():
        assert dvc.poll() is None
        time.sleep(0.01)
    dvc.terminate()
    dvc.wait()
    writer = json.loads(lock.read_text())["pid"]
    os.kill(writer, signal.SIGSTOP)  # the stage outlived its dvc, and is at work
    again = subprocess.run(
        command, cwd=tmp_path, env={**environment(), "PATH": path}, capture_output=True, text=True, check=False
    )
    assert again.returncode != 0
    assert str(writer) in again.stdout + again.stderr
    os.kill(writer, signal.SIGKILL)
    assert project.repro("extract") == ["extract"]
    assert cache.verify(tmp_path / "features/demo.zarr") == ()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def test_what_changes_runs_and_nothing_else(project: Project) -> None:
    assert project.repro() == STAGES
    assert project.repro() == []
    left = project.run("git", "status", "--porcelain")
    assert left.split() == ["??", "dvc.lock"]

    metrics = json.loads(project.run("dvc", "metrics", "show", "--json"))[""]["data"]
    assert 0 <= metrics["runs/demo/metrics.json"]["data"]["auc"] <= 1
    assert 0 <= metrics["weights/sam_demo.json"]["data"]["dice"] <= 1
    project.run("dvc", "plots", "show")
    page = (project.folder / "dvc_plots/index.html").read_text()
    for shown in ('"fpr"', '"tpr"', '"train_loss"', '"val_auc"', "confusion.png"):
        assert shown in page

    project.change("lr: 1e-3", "lr: 2e-3")
    assert project.repro() == STAGES[2:]

    project.change("pool: 4", "pool: 4\n  taps: [early, neck]")
    assert project.repro() == STAGES[1:]
    assert not (project.folder / "features/demo.zarr/late").exists()
    cached = [p for p in (project.folder / ".dvc/cache/files/md5").glob("??/*") if p.is_file()]
    assert cached
    for path in cached:  # the store is hard-linked into this cache, under names that say what the files must hold
        name = (path.parent.name + path.name).removesuffix(".dir")
        assert hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == name
