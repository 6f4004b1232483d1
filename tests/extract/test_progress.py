"""What a person sees while stage one works: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pipeline.cli import terminal

from .fakes import CountingEncoder
from .pictures import pictures
from .test_extract import run

ROOT = Path(__file__).parents[2]
DRAW = """
import time
from pipeline.cli.terminal import bars
with bars() as progress:
    progress("plan", 1, 1, encode=200, reuse=0, needed_mib=25.0, free_mib=64123.4)
    for done in range(0, 201, 50):
        progress("encode", done, 200, images_per_s=51.234, mib=f"{done / 8:.4g}/25")
        time.sleep(0.3)
        if done == 150:
            break
"""


def on_a_terminal(code: str, columns: int = 80) -> str:
    """What a program writes to a terminal, without the control sequences."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            written += piece
            if not piece:
                break
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def test_a_bar_shows_speed_bytes_and_time_left() -> None:
    drawn = on_a_terminal(DRAW)
    last = [line for line in drawn.replace("\r", "\n").split("\n") if "encode" in line and "150/200" in line][-1]
    assert "images/s 51.23" in last
    assert "mib 18.75/25" in last
    assert re.search(r"0:00:0\d", last), last
    assert "free mib 64123" in drawn


EPOCHS = """
from pipeline.cli.terminal import bars
with bars() as progress:
    for epoch in (1, 2, 3):
        progress("train", 10 * epoch, 30, epoch=epoch, loss=0.5)
        figures = {"train_loss": 1 / epoch, "val_loss": 0.75, "val_auc": 0.5 + epoch % 3 / 10, "seconds": 12.34}
        progress("epoch", epoch, 3, **figures, best_epoch=min(epoch, 2))
"""


def test_each_epoch_leaves_a_row_and_the_best_is_marked() -> None:
    drawn = [line.strip() for line in on_a_terminal(EPOCHS).replace("\r", "\n").split("\n")]
    rows = [line for line in drawn if line.startswith(("epoch ", "1 ", "2 ", "3 "))]
    assert rows == [
        "epoch  train loss    val loss     val AUC     seconds",
        "1      1.0000      0.7500      0.6000        12.3  best so far",
        "2      0.5000      0.7500      0.7000        12.3  best so far",
        "3      0.3333      0.7500      0.5000        12.3",
    ]
    assert any("train" in line and "30/30" in line for line in drawn)


def test_a_narrow_terminal_cuts_a_row_and_wraps_none() -> None:
    drawn = on_a_terminal(EPOCHS, columns=40).replace("\r", "\n").split("\n")
    assert [line.strip() for line in drawn if line.startswith("    1")] == ["1      1.0000      0.7500      0.600"]


def test_the_epochs_of_a_study_are_a_bar(tmp_path: Path) -> None:
    drawn = on_a_terminal(EPOCHS.replace("best_epoch=", 'of="plain-0", best_epoch='))
    assert "train loss    val loss" not in drawn
    assert "of plain-0" in drawn
    assert "best epoch" not in drawn


def test_where_there_is_no_terminal_an_epoch_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.bars() as progress:
        progress("epoch", 1, 1, train_loss=0.5, val_loss=0.25, val_auc=0.75, seconds=3.0, best_epoch=1)
    assert capsys.readouterr().err == "epoch 1/1  train loss 0.5  val loss 0.25  val auc 0.75\n"


def test_lines_come_after_the_first_piece_every_half_minute_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.bars() as progress:
        for done in range(21):
            progress("encode", done, 20, images_per_s=0.1, mib=f"{done}/20")
            now[0] += 10.0
    assert capsys.readouterr().err.splitlines() == [
        "encode 1/20  images/s 0.1  mib 1/20  190 s left",
        *(
            f"encode {done}/20  images/s 0.1  mib {done}/20  {200 - 10 * done} s left"
            for done in (4, 7, 10, 13, 16, 19)
        ),
        "encode 20/20  images/s 0.1  mib 20/20",
    ]


def test_a_task_met_half_way_tells_no_time_left_that_it_cannot_know(capsys: pytest.CaptureFixture[str]) -> None:
    lines = terminal._Lines()
    lines("encode", 5, 20)
    lines("encode", 20, 20)
    assert capsys.readouterr().err.splitlines() == ["encode 20/20"]


def test_one_of_several_processes_on_a_machine_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with terminal.bars() as progress:
        progress("encode", 1, 1)
    assert capsys.readouterr().err == ""


def test_the_encoder_reports_its_start_its_speed_and_bytes(tmp_path: Path) -> None:
    said: list[tuple[int, dict[str, float | str]]] = []

    def listen(task: str, done: int, total: int, **info: float | str) -> None:
        if task == "encode":
            said.append((done, info))

    run(pictures(4), CountingEncoder(), tmp_path / "s.zarr", batch_size=2, progress=listen)
    assert [done for done, _ in said] == [0, 2, 4]
    assert "images_per_s" not in said[0][1]
    assert float(said[1][1]["images_per_s"]) > 0
    mib = (2 * 4 * 4 + 1 * 2 * 2) * 2 / 2**20
    assert said[1][1]["mib"] == f"{2 * mib:.4g}/{4 * mib:.4g}"
