"""What a training leaves on a real terminal, through the real command."""

from __future__ import annotations

import csv
import re
from pathlib import Path

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
