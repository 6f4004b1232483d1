"""A study on a cluster: the tables are those of one process, whoever dies, and whether nodes see its folder or not."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.progress import silent
from pipeline.stages import studies
from pipeline.stages.study_plan import load_study
from pipeline.study.runs import Planned, result_of
from tests.cli.conftest import copy_of, start_pipeline

from .conftest import Nodes, descendants, what_is_left


@pytest.fixture
def work(extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy of the folder, which is the current one."""
    folder = copy_of(extracted, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def tables(folder: Path) -> dict[str, Any]:
    """The tables of a study as they are, and the results without their times."""
    study = folder / "studies/tiny"
    rows = list(csv.DictReader((study / "results.csv").read_text().splitlines()))
    for row in rows:
        del row["seconds"]
    return {"results": rows, **{name: (study / name).read_bytes() for name in ("table.csv", "table.md", "table.tex")}}


def workers_of(folder: Path) -> list[int]:
    """Processes of Ray below this one that work in a folder."""
    found = []
    for process in descendants(os.getpid()):
        try:
            if Path(f"/proc/{process}/cwd").readlink() == folder:
                found.append(process)
        except OSError:
            continue
    return found


def test_a_killed_driver_and_a_killed_worker_leave_the_tables_of_one_process(
    nodes: Nodes, alone: Path, work: Path
) -> None:
    alone_there = ("--set", "resources.ray.max=1")
    driver = start_pipeline(work, "study", "-c", "study.yaml", *alone_there, "--ray", nodes.address)
    while not list(work.glob("studies/tiny/runs/*/result.json")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    assert not what_is_left()

    plan = load_study(Path("study.yaml"))
    done = [run for run in plan.runs if result_of(run) is not None]
    times = [when_done(run) for run in done]
    assert 1 <= len(done) < 3
    killed = []
    began, ended = time.time(), threading.Event()

    def kill() -> None:
        while not any(file.stat().st_mtime > began for file in work.glob("studies/tiny/runs/*/last.pt")):
            if ended.wait(0.02):
                return
        for process in workers_of(work):
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        report = studies.study(plan, silent, ray=nodes.address)
    finally:
        ended.set()
        thread.join()
    assert killed
    assert (report["done"], report["missing"], report["failed"]) == (3, 0, {})
    assert tables(work) == tables(alone)
    assert {path.name for path in Path("studies/tiny").iterdir()} == {
        path.name for path in (alone / "studies/tiny").iterdir()
    }
    assert sum(node["runs"] for node in report["nodes"]) == 3 - len(done)
    assert sum(node["died"] for node in report["nodes"]) >= 1
    assert [when_done(run) for run in done] == times
    assert studies.study(plan, silent, ray="nowhere:1")["done"] == 3  # nothing is left, so no cluster is asked


def when_done(planned: Planned) -> int:
    return (planned.folder / "result.json").stat().st_mtime_ns
