"""Prediction on a cluster: the table of one process, whoever dies, and never an image lost because a node is blind."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline.config.schema import Config, load_config
from pipeline.progress import silent
from pipeline.stages.predictions import OfRun, predict_into
from pipeline.stages.study_plan import load_study
from tests.cli.conftest import copy_of, start_pipeline

from .conftest import Nodes, what_is_left
from .mortal import Mortal

COUNT = 3 * 64 + 1  # the last one is in a part of its own: no other is in a smaller batch without it
FEW = ("resources.workers=1", "resources.ray.max=1")
DEADLY = f"scans/{COUNT - 1}.png"


@pytest.fixture(scope="module")
def scans(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gated run, images in it of which one is torn, and the table of a process by itself."""
    folder = copy_of(alone, tmp_path_factory.mktemp("scans"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        plan = load_study(Path("study.yaml"))
        next(run.folder for run in plan.runs if plan.reads_store(run.name)).rename("run")
        Path("scans").mkdir()
        for number in range(COUNT):
            pixels = np.full((24, 30, 3), number % 256, np.uint8)
            pixels[: number % 20] = 255 - number % 256
            Image.fromarray(pixels).save(f"scans/{number:03d}.png")
        Path("scans/150.png").write_bytes(b"torn")
        predict_into(Path("alone.csv"), OfRun(configured()), ["scans"], silent)
    return folder


def configured() -> Config:
    return load_config(Path("tiny.yaml"), ["run=run", *FEW])


def test_whoever_dies_the_table_is_that_of_one_process_without_the_image_that_kills(
    nodes: Nodes, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(scans, tmp_path / "work"))
    out = Path("p.parquet")
    options = [word for setting in ("run=run", *FEW) for word in ("--set", setting)]
    command = ("predict", "-c", "tiny.yaml", *options, "scans", "--out", out)
    driver = start_pipeline(Path.cwd(), *command, "--ray", nodes.address)
    while not list(Path("p.parquet.partial").glob("0*.json")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.005)
    driver.kill()
    driver.communicate()
    assert not what_is_left()
    kept = 64 * len(list(Path("p.parquet.partial").glob("0*.json")))
    assert kept < COUNT

    killed: list[object] = []

    def kill_a_node(task: str, done: int, total: int, **info: object) -> None:
        if done > kept and not killed:
            killed.append(nodes.at_work())
            nodes.kill(killed[0])

    report = predict_into(out, Mortal(configured(), DEADLY), ["scans"], kill_a_node, ray=nodes.address)
    assert killed
    assert report["kept"] == kept
    assert report["set_aside"].keys() == {"scans/150.png", DEADLY}
    assert report["set_aside"][DEADLY].startswith("its worker died twice: ")
    wanted = [row for row in csv.reader(Path("alone.csv").read_text().splitlines()) if row[0] != DEADLY]
    table = pyarrow.parquet.read_table(out)
    assert [table.column_names, *([str(value) for value in row.values()] for row in table.to_pylist())] == wanted
    set_aside = list(csv.reader(Path("p_set_aside.csv").read_text().splitlines()))
    assert [DEADLY, report["set_aside"][DEADLY]] in set_aside
    assert not Path("p.parquet.partial").exists()
