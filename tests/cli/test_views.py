"""Views through the real command: encoded in stage one because the taps name them, drawn in stage two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cache

from .conftest import complaint, copy_of, succeed

VIEWS = ("-c", "tiny.yaml", "--set", "train.augment={views: [hflip, rot90]}")
TAPS = ("--set", "encoder.taps=[early, neck, early@hflip, neck@hflip, early@rot90, neck@rot90]")


def test_views_are_extracted_and_trained_with(work: Path) -> None:
    succeed(work, "extract", *VIEWS, *TAPS)
    assert set(cache.info(work / "features/demo.zarr").taps) >= {"early@hflip", "neck@rot90"}
    report = succeed(work, "train", *VIEWS, *TAPS)
    assert report["epoch"] in (1, 2)
    settings = json.loads((work / "runs/demo/settings.json").read_text())
    assert settings["augmentation"]["views"] == ["hflip", "rot90"]
    # not read as the plain taps: without views the same run is another
    assert "augmentation" in complaint(work, "train", "-c", "tiny.yaml", *TAPS, status=1)
    history = (work / "runs/demo/history.csv").read_text()
    succeed(work, "train", "-c", "tiny.yaml", *TAPS, "--replace", "--set", "train.augment={}")
    assert (work / "runs/demo/history.csv").read_text() != history
    succeed(work, "evaluate", *VIEWS, *TAPS)


def test_views_that_are_not_stored_are_named(trained: Path) -> None:
    said = complaint(trained, "train", *VIEWS, "--set", "run=runs/other", status=1)
    assert "holds no tap 'early@hflip', only patch, early, middle, late, neck: extract it (encoder.taps, then" in said
    assert said.rstrip().endswith("change the views.")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.augment={views: [flip]}", "got 'flip', expected 'hflip', 'vflip', 'rot90'"),
        ("train.augment={views: [hflip], flip_vertical: 0.5}", "draws views (hflip) and flips or turns besides"),
    ],
)
def test_views_that_make_no_sense_are_refused(work: Path, override: str, message: str) -> None:
    assert message in complaint(work, "train", "-c", "tiny.yaml", "--set", override, status=2)


def test_tensorboard_is_asked_for_in_the_configuration(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    settings = ("-c", "tiny.yaml", "--set", "run=runs/watched")
    folder = copy_of(trained, tmp_path / "work")
    succeed(folder, "train", *settings, "--set", "resources.tensorboard=true")
    assert len(list((folder / "runs/watched/tensorboard").glob("events.*"))) == 2
    assert not (folder / "runs/demo/tensorboard").exists()
