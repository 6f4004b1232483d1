"""`pipeline runs`: every run below a folder in one table, whatever state it is in."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from pipeline.cli.pages import with_interval
from pipeline.stages.runs import list_runs, write_runs

from .conftest import complaint, copy_of, run_pipeline


def test_runs_are_told_by_what_they_are_and_came_to(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "work")
    figures = json.loads((folder / "runs/demo/metrics.json").read_text())
    copy_of(folder / "runs/demo", folder / "runs/study/runs/formula")
    (folder / "runs/study/runs/formula/metrics.json").unlink()
    (folder / "runs/stopped").mkdir()
    (folder / "runs/stopped/settings.json").write_bytes((folder / "runs/demo/settings.json").read_bytes())
    (folder / "runs/stopped/history.json").write_text('[{"epoch": 1}]')
    (folder / "runs/torn").mkdir()
    (folder / "runs/torn/model.json").write_text("{")
    (folder / "runs/loop").symlink_to(folder / "runs")
    rows = {row["run"]: row for row in list_runs(folder / "runs")["runs"]}
    assert {Path(name).name for name in rows} == {"demo", "formula", "stopped", "torn"}
    demo = rows[str(folder / "runs/demo")]
    assert demo["model"] == "resnet18, 64 px, gates from early, neck"
    assert demo["training"] == "2 epochs, lr 0.001, seed 0"
    assert demo["val"]["auc"] == figures["val"]["auc"]
    assert figures["val"]["auc"]["low"] < figures["val"]["auc"]["value"] == figures["val_auc"]
    assert demo["test"]["auc"] == {"value": figures["auc"], **figures["intervals"]["auc"]}
    assert (demo["store"]["encoder"], demo["store"]["data_set"]) == ("sam_demo", "demo")
    assert rows[str(folder / "runs/study/runs/formula")]["state"] == "not evaluated"
    assert rows[str(folder / "runs/stopped")]["state"] == "stopped after epoch 1 of 2"
    assert rows[str(folder / "runs/torn")]["state"].startswith("cannot be read (")
    write_runs(list_runs(folder / "runs"), tmp_path / "out/runs.csv")
    with (tmp_path / "out/runs.csv").open() as file:
        written = {row["run"]: row for row in csv.DictReader(file)}
    assert float(written[str(folder / "runs/demo")]["test_auc_low"]) == figures["intervals"]["auc"]["low"]
    done = run_pipeline(folder, "runs")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("runs/demo "))
    assert with_interval(figures["auc"], figures["intervals"]["auc"]) in line
    assert with_interval(figures["val"]["auc"]["value"], figures["val"]["auc"]) in line


def test_where_nothing_was_trained_the_message_says_so(tmp_path: Path) -> None:
    assert "there is no folder 'runs' here" in complaint(tmp_path, "runs", status=1)
    assert "no run lies below '.'" in complaint(tmp_path, "runs", ".", status=1)
