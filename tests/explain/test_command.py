"""`pipeline explain` through the real command, on the demo data and its own masks."""

from __future__ import annotations

import csv
import json
from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image

from pipeline.data import generate_demo, load_demo
from pipeline.model.classifier import ModelOptions
from pipeline.train.train import train
from tests.cli.conftest import complaint, run_pipeline, succeed
from tests.train.scenes import QUICK, make_store

CONFIG = """\
data: {layout: demo, path: data, count: 36, size_px: 64}
encoder: {name: sam_demo, checkpoint: weights.pth}
store: {path: features.zarr}
model: {backbone: resnet18, image_px: 64, gates: [{tap: neck, stage: stage4}]}
train: {epochs: 1, batch_size: 8, lr: 1e-3}
run: run
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run on the demo, with features that are each image's darkness, in cells."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "c.yaml").write_text(CONFIG)
    generate_demo(folder / "data", count=36, size_px=64)
    dataset = load_demo(folder / "data")
    images = np.stack([dataset.read(i)[:, :, 0] for i in range(len(dataset))]).astype(np.float32)
    dark = 1 - images.reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4))[:, None] / 255
    model = ModelOptions(image_px=64, gates=(("neck", "stage4"),))
    with make_store(folder / "features.zarr", dataset, taps={"neck": (1, 8, 8)}, features={"neck": dark}) as store:
        train(dataset, store, folder / "run", model=model, options=QUICK)
    return folder


def test_pictures_for_people_and_for_programs(folder):
    report = succeed(folder, "explain", "-c", "c.yaml", "--count", "1", "--split", "val")
    on_disk = json.loads((folder / "run/explain/explain.json").read_text())
    assert report == {"run": "run", "folder": "run/explain", **on_disk}
    assert report["localisation"]["images"] > 3
    done = run_pipeline(folder, "explain", "-c", "c.yaml", "--count", "1", report["images"][0]["id"], "--split", "val")
    assert done.returncode == 0, done.stderr
    assert "run/explain/sheet.png" in done.stdout
    assert "1 in run/explain" in done.stdout
    auc = report["localisation"]["maps"]["neck → stage4"]["auc"]
    assert f"AUC {auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})" in done.stdout
    assert "sheet.png" in {path.name for path in (folder / "run/explain").iterdir()}


def test_masks_of_a_folder(folder):
    """The demo's own masks, named as the masks of a public data set, for four images of the split."""
    dataset = load_demo(folder / "data")
    (folder / "masks").mkdir()
    shares = {}
    for index in dataset.indices("val")[:4]:
        shares[dataset.samples[index].id] = dataset.mask(index).mean()
        stem = PurePosixPath(dataset.samples[index].id).stem
        Image.fromarray(dataset.mask(index)).save(folder / f"masks/{stem}_segmentation.png")
    options = ("explain", "-c", "c.yaml", "--count", "1", "--split", "val", "--masks", "masks")
    found = succeed(folder, *options)["localisation"]
    assert (found["images"], found["left_out"]) == (4, len(dataset.indices("val")) - 4)
    with (folder / "run/explain/localisation_samples.csv").open() as file:
        assert {row["id"]: float(row["share"]) for row in csv.DictReader(file)} == pytest.approx(shares, rel=1e-3)
    Image.fromarray(dataset.mask(index)).save(folder / f"masks/{stem}_segmentation_1.png")
    said = " ".join(complaint(folder, *options, status=1).split())
    assert f"both 'masks/{stem}_segmentation.png' and 'masks/{stem}_segmentation_1.png' may be the mask of" in said


def test_what_a_person_reads_when_it_cannot_be(folder):
    assert "There is no sample 'nobody' in split 'test'" in complaint(
        folder, "explain", "-c", "c.yaml", "nobody", status=2
    )
    for nothing in (".", ""):
        assert "There is no sample" in complaint(folder, "explain", "-c", "c.yaml", nothing, status=2)
    said = complaint(folder, "explain", "-c", "c.yaml", "--set", "run=runs/none", status=1)
    assert "no trained model in 'runs/none': run `pipeline train` first" in said
