"""`prepare` says where chance dealt a split too little of a class, and names a seed that deals evenly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.schema import load_config
from pipeline.progress import silent
from pipeline.stages.prepare import prepare_data

CONFIG = """\
data: {layout: folder, path: images}
encoder: {name: sam_demo, checkpoint: w.pth}
store: {path: s.zarr}
model: {backbone: resnet18, gates: []}
train: {}
run: r
"""


def test_a_draw_that_is_uneven_by_chance_names_one_that_is_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    for name in ("benign", "malignant"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "images" / name / f"{i}.png")

    def notes(*overrides: str) -> str:
        return "\n".join(prepare_data(load_config(Path("c.yaml"), overrides), silent)["notes"])

    said = [notes(f"data.split.seed={seed}") for seed in range(12)]
    uneven = [note for note in said if "chance put" in note]
    assert 0 < len(uneven) < len(said)
    found = re.search(
        r"chance put (\d) instead of \d images of '\w+' in (val|test).* data\.split\.seed=(\d+) ", uneven[0]
    )
    assert found
    assert int(found[1]) <= 3
    assert "chance put" not in notes(f"data.split.seed={found[3]}")
    assert "chance put" not in notes("data.split.draw=balanced")
