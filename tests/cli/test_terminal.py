"""What a training leaves on a real terminal, through the real command."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from pipeline.cli.terminal import show
from tests.extract.test_progress import on_a_terminal

from .conftest import copy_of

TRAIN = """
import os, sys
os.chdir({folder!r})
sys.argv = ["pipeline", "train", "-c", "tiny.yaml", "--set", "run=runs/seen"]
from pipeline.cli import main
main()
"""


def test_the_table_has_a_row_of_the_history_per_epoch(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "work")
    drawn = on_a_terminal(TRAIN.format(folder=str(folder)), columns=120).replace("\r", "\n")
    with (folder / "runs/seen/history.csv").open() as file:
        history = list(csv.DictReader(file))
    table = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)(  best so far)?\s*$", drawn, re.MULTILINE)
    assert [row[0] for row in table] == [row["epoch"] for row in history] == ["1", "2"]
    for shown, row in zip(table, history, strict=True):
        for text, key in zip(shown[1:4], ("train_loss", "val_loss", "val_auc"), strict=True):
            assert text == f"{float(row[key]):.4f}"
    assert table[0][5]
    assert drawn.count("train loss    val loss     val AUC     seconds") == 1


def test_a_report_reads_as_words_and_json_stays_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    report = {
        "run": "runs/[red]x",
        "predictions": [{"image": name, "probabilities": {"not_round": 0.12345678901}} for name in ("a.png", "b.png")],
        "twins": (),
        "set_aside": [f"row{k}" for k in range(7)],
        "mean": [1 / 3] * 7,
        "norm": 12345.678,
    }
    show(report, as_json=False)
    drawn = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert drawn == [
        "run runs/[red]x",
        "predictions",
        "image a.png",
        "probabilities",
        "not_round 0.1235",
        "image b.png",
        "probabilities",
        "not_round 0.1235",
        "twins none",
        "set aside row0, row1, row2, row3, row4, and 2 more",
        "mean " + ", ".join(["0.3333"] * 7),
        "norm 12346",
    ]
    show(report, as_json=True)
    assert json.loads(capsys.readouterr().out) == {**report, "twins": []}
