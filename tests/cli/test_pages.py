"""What people read at a command's end: a page that fits a screen, and what happened to their images, in numbers."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.pages import evaluated, figure, with_interval
from pipeline.extract.changes import count_changes

from .conftest import copy_of, run_pipeline, start_pipeline, succeed
from .test_init import visits


def said(folder: Path, *arguments: object) -> list[str]:
    done = run_pipeline(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_scores_fit_a_screen(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "work")
    lines = said(folder, "evaluate", "-c", "tiny.yaml")
    assert len(lines) <= 24
    assert max(len(line.rstrip()) for line in lines) <= 100
    figures = json.loads((folder / "runs/demo/metrics.json").read_text())
    page = "\n".join(lines)
    assert f"AUC {with_interval(figures['auc'], figures['intervals']['auc'])}" in page
    for name, auc in figures["class_auc"].items():
        row = next(line for line in lines if line.startswith(f"{name} "))
        assert with_interval(auc, figures["intervals"]["class_auc"][name]) in row
    for point, found in figures["operating_points"].items():
        for name, at in found.items():
            row = next(line for line in lines if line.startswith(f"{point}, {name}"))
            assert with_interval(at["sensitivity"]["value"], at["sensitivity"]) in row
    assert "The rest: runs/demo/metrics.json" in page


def test_a_run_that_was_finished_before_says_so(trained: Path, tmp_path: Path) -> None:
    lines = said(copy_of(trained, tmp_path / "work"), "train", "-c", "tiny.yaml")
    assert "data       not read: the run was finished before" in lines


def test_the_gates_share_is_counted_in_parameters_not_in_the_backbones(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "work")
    lines = said(folder, "train", "-c", "tiny.yaml")
    counts = json.loads(said(folder, "train", "-c", "tiny.yaml", "--json")[-1])["parameters"]
    assert counts["slca"] > 0
    trains, of_gates = (f"{counts[key]:,}" for key in ("trainable", "slca"))
    assert f"model      {trains} parameters to train, {of_gates} of them in gates" in lines


def made_up(names: list[str], positive: str | None) -> dict[str, Any]:
    """What `evaluate` reports, with figures of no meaning."""
    ends = {"low": 0.25, "high": 0.75}
    of_classes = {name: 0.5 for name in names}
    at = {
        "threshold": 0.5,
        **{key: {"value": 0.5, **ends, "n": 9} for key in ("sensitivity", "specificity", "ppv", "npv")},
    }
    return {
        "run": "runs/x",
        "split": "test",
        "positive": positive,
        "n": 90,
        **dict.fromkeys(("auc", "ap", "acc", "balanced_acc", "f1", "ece", "brier"), 0.5),
        **dict.fromkeys(("class_auc", "class_ap", "sensitivity", "specificity"), of_classes),
        "prevalence": {name: 1 / len(names) for name in names},
        "intervals": {
            **dict.fromkeys(("auc", "ap", "acc", "balanced_acc", "f1", "ece", "brier"), ends),
            **dict.fromkeys(("class_auc", "class_ap", "sensitivity", "specificity"), dict.fromkeys(names, ends)),
        },
        "operating_points": {
            point: dict.fromkeys(names, at) for point in ("youden", "sensitivity=0.95", "specificity=0.95")
        },
        "bootstrap": {"groups": 90},
    }


@pytest.mark.parametrize(
    ("names", "positive", "points"),
    [
        (["normal", "malignant"], "malignant", 3),
        ([f"organ {k}" for k in range(14)], None, 12),
        (["[red]a", "b\x1b[2J"], None, 6),
    ],
)
def test_any_number_of_classes_fits(
    names: list[str],
    positive: str | None,
    points: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "96")
    evaluated(made_up(names, positive))
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert len(lines) <= 36
    assert max(len(line.rstrip()) for line in lines) <= 96
    assert sum(line.startswith(("youden", "sensitivity=", "specificity=")) for line in lines) == points
    assert "\x1b[2J" not in page
    for name in names[:10]:
        assert name.replace("\x1b", "\\x1b") in page
    if len(names) > 10:
        assert "and 4 more" in page
        assert "and 30 more" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8016, ".802"), (1.0, "1.00"), (0.0, ".000"), (-0.125, "-.125"), (None, "-"), (0.9999, "1.00")],
)
def test_a_share_has_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text
    assert with_interval(0.5, {"low": 0.25, "high": 1.0}) == ".500 [.250, 1.00]"


def test_a_prediction_is_a_row_and_a_table(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "work")
    images = sorted((folder / "data/demo/images").glob("*_0.png"))[:3]
    lines = said(folder, "predict", "-c", "tiny.yaml", *images, "--csv", "out/p.csv")
    assert lines[0].split() == ["image", "predicted", "lobed", "round", "spiked"]
    with (folder / "out/p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == list(map(str, images))
    for line, row in zip(lines[1:], rows, strict=False):
        words = line.split()
        assert words[-4] == row["predicted"]
        assert words[-3:] == [figure(float(row[f"p_{name}"])) for name in ("lobed", "round", "spiked")]


def test_prepare_shows_classes_and_warns_of_images_without_patients(tmp_path: Path) -> None:
    visits(tmp_path / "scans", 12)
    (tmp_path / "scans/ill/x.heic").touch()
    succeed(tmp_path, "init", "scans", "--encoder", "sam_demo", "--out", "with.yaml")
    succeed(tmp_path, "init", "scans", "--encoder", "sam_demo", "--group-pattern", "none", "--out", "without.yaml")
    quick = ("--set", "encoder.training.steps=0")
    page = said(tmp_path, "prepare", "-c", "with.yaml", *quick)
    assert next(line.split()[-1] for line in page if line.startswith("healthy")) == "24"
    assert next(line.split()[-1] for line in page if line.startswith("patients")) == "24"
    assert "ignored    1 (.heic 1)" in page
    assert not [line for line in page if line.startswith("warning")]
    page = said(tmp_path, "prepare", "-c", "without.yaml", *quick)
    assert any("48 images counts as a patient of its own, because there is no data.group_pattern" in x for x in page)
    pages = [Image.fromarray(np.zeros((40, 50), np.uint8)) for _ in range(2)]
    pages[0].save(tmp_path / "scans/ill/000001_000.tif", save_all=True, append_images=pages[1:])
    notes = succeed(tmp_path, "prepare", "-c", "with.yaml", *quick)["data"]["notes"]
    assert any("1 of 1 TIFF files that were opened have several pages (up to 2)" in note for note in notes)


def test_changes_are_told_by_pixels_and_names() -> None:
    a, b, c, d = (bytes([k]) for k in range(4))
    before = {"one": a, "two": b, "three": c, "four": d}
    after = {"one": a, "zwei": b, "three": b"new", "five": b"other", "again": a}
    assert count_changes(before, after) == {"added": 2, "changed": 1, "renamed": 1, "removed": 1, "reused": 1}


def test_extract_tells_what_came_went_and_was_renamed(tmp_path: Path) -> None:
    visits(tmp_path / "scans", 12, 1)
    for k, path in enumerate(sorted((tmp_path / "scans").rglob("*.png"))):
        Image.fromarray(np.full((40, 50), 5 * k, np.uint8)).save(path)  # no two alike
    succeed(tmp_path, "init", "scans", "--encoder", "sam_demo", "--out", "c.yaml")
    command = ("extract", "-c", "c.yaml")
    succeed(tmp_path, "prepare", "-c", "c.yaml", "--set", "encoder.training.steps=0")
    assert any(line.endswith("24 rows; 24 added, 0 reused") for line in said(tmp_path, *command))
    files = sorted((tmp_path / "scans/ill").glob("*.png"))
    files[0].unlink()
    files[1].rename(files[1].with_name("009991_000.png"))
    files[2].rename(files[2].with_name("009992_000.png"))
    for k in range(3):
        Image.fromarray(np.full((40, 50), 200 + k, np.uint8)).save(tmp_path / f"scans/healthy/00888{k}_000.png")
    page = said(tmp_path, *command)
    assert any(line.endswith("26 rows; 3 added, 2 renamed, 1 removed, 21 reused") for line in page)
    assert any(line.endswith("26 rows; 26 reused") for line in said(tmp_path, *command))


def test_whoever_stops_an_extraction_reads_how_much_is_kept(tmp_path: Path) -> None:
    succeed(tmp_path, "init", "demo", "--out", "c.yaml")
    quick = (
        "-c",
        "c.yaml",
        "--set",
        "data.count=900",
        "--set",
        "data.size_px=32",
        "--set",
        "encoder.training.steps=0",
    )
    succeed(tmp_path, "prepare", *quick)
    child = start_pipeline(tmp_path, "extract", *quick, "--set", "store.shard_mib=1", "--set", "resources.workers=1")
    give_up = time.monotonic() + 60
    records = tmp_path / "features/demo.zarr.partial"
    while time.monotonic() < give_up and len(list(records.rglob("shard-*.npz"))) < 2:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.wait() == 130, err
    assert "shards are finished and kept, about" in err
    assert "the same command continues from there" in err


def test_a_store_says_whose_names_it_bears_and_what_strangers_read(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "work")
    report = succeed(folder, "store", "info", "features/demo.zarr")
    assert report["pseudonyms"] is False
    assert report["labels"] == "none travel with it"
    sent = succeed(
        folder, "store", "push", "features/demo.zarr", folder / "open.zarr", "-c", "tiny.yaml", "--with-labels"
    )
    assert sent["a_stranger_reads"][0].startswith("48 ids as they are, such as images/p0000_0.png")
    assert "the folders in them, which may be diagnoses: images" in sent["a_stranger_reads"]
    assert "labels and splits" in sent["a_stranger_reads"]
    key = ("--pseudonymise", folder / "home/key")
    kept = succeed(folder, "store", "push", "features/demo.zarr", folder / "closed.zarr", *key)
    assert "a_stranger_reads" not in kept
    report = succeed(folder, "store", "info", folder / "closed.zarr")
    assert report["pseudonyms"] is True
    assert report["ids"].startswith("pseudonyms, such as ")
    assert succeed(folder, "store", "info", folder / "open.zarr")["labels"] == "travel with it: lobed, round, spiked"


def test_whoever_stops_a_training_reads_how_many_epochs_are_kept(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "work")
    child = start_pipeline(folder, "train", "-c", "tiny.yaml", "--set", "run=runs/long", "--set", "train.epochs=400")
    history = folder / "runs/long/history.json"
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and not history.is_file():
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.wait() == 130, err
    kept = len(json.loads(history.read_text()))
    assert f"{kept} of 400 epochs are finished and kept; the same command continues from there" in err
