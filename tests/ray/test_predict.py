"""Prediction on a cluster: the bytes of one process, whoever dies, and never an image lost because a node is blind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.schema import load_config
from pipeline.progress import silent
from pipeline.stages import commands
from pipeline.stages.predictions import OfRun, predict_into
from tests.cli.conftest import copy_of

from .conftest import Nodes

GATED = ("train.epochs=1", "model.image_px=32", "resources.workers=1")


@pytest.fixture(scope="module")
def scans(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gated run, images in it of which one is torn, and the table of a process by itself."""
    folder = copy_of(extracted, tmp_path_factory.mktemp("scans"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        commands.train(load_config(Path("tiny.yaml"), GATED), silent)
        Path("scans").mkdir()
        for number in range(400):
            pixels = np.full((24, 30, 3), number % 256, np.uint8)
            pixels[: number % 20] = 255 - number % 256
            Image.fromarray(pixels).save(f"scans/{number:03d}.png")
        Path("scans/300.png").write_bytes(b"torn")
        predict_into(Path("alone.csv"), OfRun(load_config(Path("tiny.yaml"), GATED)), ["scans"], silent)
    return folder


def test_parts_of_the_dead_are_made_again_and_the_bytes_are_those_of_one_process(
    nodes: Nodes, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(scans, tmp_path / "work"))
    model = OfRun(load_config(Path("tiny.yaml"), GATED))
    out = Path("p.csv")

    class Stop(Exception):
        pass

    def stop_at(task: str, done: int, total: int, **info: object) -> None:
        if done >= 128:
            raise Stop

    with pytest.raises(Stop):
        predict_into(out, model, ["scans"], stop_at, ray=nodes.address)
    assert len(list(Path("p.csv.partial").glob("0*.json"))) == 2
    victims = iter([nodes.standing[0]])

    def kill_a_node(task: str, done: int, total: int, **info: object) -> None:
        if done >= 192:
            for node in victims:
                nodes.kill(node)

    report = predict_into(out, model, ["scans"], kill_a_node, ray=nodes.address)
    assert report["kept"] == 128
    assert list(report["set_aside"]) == ["scans/300.png"]
    assert sum(node["items"] for node in report["nodes"]) == 5
    assert out.read_bytes() == Path("alone.csv").read_bytes()
    assert not Path("p.csv.partial").exists()
