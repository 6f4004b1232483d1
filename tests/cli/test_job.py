"""The whole job through the real command: both formats, real images, and what each step leaves behind."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import cache
from pipeline.encoders import ARCHITECTURES
from pipeline.evaluate.operating import POINTS
from tests.encoders.seeded import seeded_state

from .conftest import ROOT, TINY, complaint, copy_of, run_pipeline, succeed

X_RAYS = """\
data: {layout: folder, path: images}
encoder: {name: sam_vit_b, checkpoint: seeded.pth, taps: [early, neck], pool: 4, precision: bfloat16}
store: {path: features/x_rays.zarr}
model:
  backbone: resnet18
  image_px: 224
  gates: [{tap: early, stage: stage1}, {tap: neck, stage: stage4}]
train: {epochs: 1, batch_size: 8, lr: 1e-4}
run: runs/x_rays
"""


def metrics(folder: Path, run: str = "runs/demo") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / run / "metrics.json").read_text())
    return found


def test_the_job_leaves_a_store_a_model_and_metrics(trained: Path) -> None:
    with cache.open_store(trained / "features/demo.zarr") as store:
        assert len(store) == 48
        assert set(store.taps) == {"patch", "early", "middle", "late", "neck"}
    assert not list((trained / "features").glob("*.partial"))
    for name in ("model.safetensors", "model.json", "history.csv", "predictions.csv"):
        assert (trained / "runs/demo" / name).stat().st_size > 0
    found = metrics(trained)
    for name in ("auc", "acc", "balanced_acc"):
        assert 0 <= float(str(found[name])) <= 1


def test_metrics_are_the_same_from_zarr_and_hdf5(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "h5")
    settings = ("-c", "tiny.yaml", "--set", "store.path=features/demo.h5", "--set", "run=runs/h5")
    for command in ("extract", "train", "evaluate"):
        succeed(folder, command, *settings)
    assert metrics(folder, "runs/h5") == metrics(folder)
    group = zarr.open_group(str(folder / "features/demo.zarr"), mode="r")
    with h5py.File(folder / "features/demo.h5") as file:
        np.testing.assert_array_equal(file["neck"][:], group["neck"][:])


def test_extracting_again_encodes_nothing_and_keeps_every_byte(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "again")
    before = {p: (p.stat().st_ino, p.read_bytes()) for p in folder.glob("features/demo.zarr/**/*") if p.is_file()}
    report = succeed(folder, "extract", "-c", "tiny.yaml")
    assert (report["encoded"], report["reused"]) == (0, 48)
    assert before == {
        p: (p.stat().st_ino, p.read_bytes()) for p in folder.glob("features/demo.zarr/**/*") if p.is_file()
    }


def test_operating_points_are_chosen_on_the_command_line(trained: Path, tmp_path: Path) -> None:
    assert list(metrics(trained)["operating_points"]) == list(POINTS)
    said = " ".join(run_pipeline(trained, "evaluate", "--help").stdout.split())
    assert f"[default: {', '.join(POINTS)}]" in said
    assert "pipeline evaluate --point sensitivity=0.9 --point specificity=0.8" in said
    folder = copy_of(trained, tmp_path / "points")
    chosen = ("--point", "sensitivity=0.9", "--point", "specificity=0.8")
    report = succeed(folder, "evaluate", "-c", "tiny.yaml", *chosen)
    assert list(report["operating_points"]) == ["sensitivity=0.9", "specificity=0.8"]
    assert metrics(folder)["operating_points"] == report["operating_points"]
    for names in report["operating_points"].values():
        for found in names.values():
            assert 0 <= found["sensitivity"]["low"] <= found["sensitivity"]["high"] <= 1
    said = complaint(folder, "evaluate", "-c", "tiny.yaml", "--point", "sensitivity=95", status=2)
    assert said == (
        "error: There is no operating point 'sensitivity=95': write 'youden', 'sensitivity=0.95' or "
        "'specificity=0.95', the number above 0 and at most 1.\n"
    )
    assert metrics(folder)["operating_points"] == report["operating_points"]


def test_predict_agrees_with_evaluate(trained: Path) -> None:
    with (trained / "runs/demo/predictions.csv").open() as file:
        evaluated = next(csv.DictReader(file))
    report = succeed(trained, "predict", "-c", "tiny.yaml", trained / "data/demo" / evaluated["id"])
    (predicted,) = report["predictions"]
    for name, probability in predicted["probabilities"].items():
        # stored features are rounded to float16, those made on the fly are not
        assert probability == pytest.approx(float(evaluated[f"p_{name}"]), abs=5e-3)


def test_predict_names_the_files_that_it_cannot_read(trained: Path) -> None:
    good = sorted((trained / "data/demo/images").glob("*.png"))[:9]  # more than are encoded at a time
    bad = trained / "torn.png"
    bad.write_bytes(good[0].read_bytes()[:100])
    thin = trained / "thin.png"
    Image.new("L", (3000, 1)).save(thin)
    alone = succeed(trained, "predict", "-c", "tiny.yaml", *good)
    report = succeed(trained, "predict", "-c", "tiny.yaml", good[0], bad, *good[1:], thin, "nothing.png", status=3)
    assert alone["set_aside"] == {}
    assert [item["image"] for item in report["predictions"]] == [str(path) for path in good]
    for found, expected in zip(report["predictions"], alone["predictions"], strict=True):
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
        assert found["predicted"] == max(found["probabilities"], key=found["probabilities"].get)
    assert report["set_aside"].keys() == {str(bad), str(thin), "nothing.png"}
    assert report["set_aside"][str(thin)].startswith(f"{thin}: an image of 1x3000 px has no pixel left")
    assert "torn.png" in report["set_aside"][str(bad)]
    assert "torn.png" in complaint(trained, "predict", "-c", "tiny.yaml", bad, status=1)


def test_plain_classifier_needs_no_store(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path / "plain")
    settings = ("-c", "tiny.yaml", "--set", "model.gates=[]")
    succeed(folder, "train", *settings)
    assert succeed(folder, "evaluate", *settings)
    assert not (folder / "features").exists()


def test_real_ultrasound_in_both_formats(prepared: Path, real_data: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path / "breast")
    with np.load(real_data / "breastmnist_224.npz") as file:
        few = {name: file[name][:48] for name in file.files}
    np.savez(folder / "few.npz", **few)
    config = TINY.replace(
        "data: {layout: demo, path: data/demo, count: 48, size_px: 64, seed: 0}",
        "data: {layout: medmnist, name: breastmnist, path: few.npz, size_px: 224}",
    )
    (folder / "breast.yaml").write_text(config)
    for suffix in ("zarr", "h5"):
        settings = ("-c", "breast.yaml", "--set", f"store.path=features/b.{suffix}", "--set", f"run=runs/{suffix}")
        for command in ("extract", "train", "evaluate"):
            succeed(folder, command, *settings)
    assert metrics(folder, "runs/zarr") == metrics(folder, "runs/h5")


def test_real_x_rays_as_a_folder(prepared: Path, real_data: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path / "xray")
    config = TINY.replace(
        "data: {layout: demo, path: data/demo, count: 48, size_px: 64, seed: 0}",
        f"data: {{layout: folder, path: {real_data / 'nih_cxr'}, group_pattern: '^(\\d+)_'}}",
    )
    (folder / "xray.yaml").write_text(config)
    for command in ("extract", "train", "evaluate"):
        succeed(folder, command, "-c", "xray.yaml")
    assert 0 <= float(str(metrics(folder)["auc"])) <= 1


def test_a_sam_of_full_size_on_real_x_rays(real_data: Path, tmp_path: Path) -> None:
    """SAM ViT-B at 1024 px with seeded weights: the sizes and the memory of the real thing, not its knowledge."""
    torch.save(
        {f"image_encoder.{name}": value for name, value in seeded_state(ARCHITECTURES["sam_vit_b"]).items()},
        tmp_path / "seeded.pth",
    )
    for name in ("No_findings", "Pneumonia"):
        files = sorted((real_data / "nih_cxr" / name).glob("*.png"))
        for split, few in {"train": files[:1], "val": files[1:2], "test": files[2:3]}.items():
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for file in few:
                shutil.copy(file, tmp_path / "images" / split / name)
    (tmp_path / "x_rays.yaml").write_text(X_RAYS)
    report = succeed(tmp_path, "extract", "-c", "x_rays.yaml")
    assert (report["encoded"], report["set_aside"]) == (6, {})
    with cache.open_store(tmp_path / "features/x_rays.zarr") as store:
        shapes = {tap: (spec.channels, spec.height, spec.width) for tap, spec in store.taps.items()}
        assert shapes == {"early": (768, 16, 16), "neck": (256, 16, 16)}
    assert succeed(tmp_path, "train", "-c", "x_rays.yaml")["epoch"] == 1
    assert 0 <= succeed(tmp_path, "evaluate", "-c", "x_rays.yaml")["auc"] <= 1


def test_a_person_sees_a_table(trained: Path) -> None:
    done = run_pipeline(trained, "store", "info", "features/demo.zarr")
    assert done.returncode == 0
    assert "48" in done.stdout
    assert "sam_demo" in done.stdout
    assert run_pipeline(trained, "store", "verify", "features/demo.zarr").returncode == 0


def test_every_shipped_config_is_valid() -> None:
    from pipeline.config.schema import load_config

    for path in sorted(ROOT.glob("configs/*.yaml")):
        load_config(path)
