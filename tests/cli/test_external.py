"""`evaluate --data`: the real command on another data set and its own store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.schema import load_config
from pipeline.data import Dataset, Split
from pipeline.evaluate import external
from pipeline.progress import silent
from pipeline.stages import commands
from tests.cli.conftest import TINY, complaint, copy_of, succeed

OTHER = (
    TINY.replace(
        "path: data/demo, count: 48, size_px: 64, seed: 0", "path: data/other, count: 36, size_px: 64, seed: 5"
    )
    .replace("features/demo.zarr", "features/other.zarr")
    .replace("runs/demo", "runs/other")
)


def test_a_run_is_tested_on_data_from_elsewhere(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "work")
    (folder / "other.yaml").write_text(OTHER)
    before = (folder / "runs/demo/metrics.json").read_bytes()
    evaluate = ("evaluate", "-c", "tiny.yaml", "--data", "other.yaml")
    succeed(folder, "prepare", "-c", "other.yaml")
    assert "there is no store at features/other.zarr" in complaint(folder, *evaluate, status=1)
    succeed(folder, "extract", "-c", "other.yaml")
    found = succeed(folder, *evaluate)
    assert found["n"] == 36
    assert Path(found["folder"]) == Path("runs/demo/external/other")
    assert (folder / found["folder"] / "predictions.csv").is_file()
    assert (folder / "runs/demo/metrics.json").read_bytes() == before
    assert "no class 'disc'" in complaint(folder, *evaluate, "--class", "disc=round", status=1)
    # the run's own data are no external test: it has learnt them
    learnt = complaint(folder, "evaluate", "-c", "tiny.yaml", "--data", "tiny.yaml", status=1)
    assert "were used otherwise by the run 'runs/demo'" in learnt


def test_options_that_do_not_go_together_are_refused(trained: Path) -> None:
    evaluate = ("evaluate", "-c", "tiny.yaml")
    assert "go with --data" in complaint(trained, *evaluate, "--class", "a=b", status=2)
    assert "--point goes without" in complaint(trained, *evaluate, "--data", "x.yaml", "--point", "youden", status=2)
    assert "expected THEIRS=OURS" in complaint(trained, *evaluate, "--data", "x.yaml", "--class", "a", status=2)
    assert "x.yaml: cannot be read" in complaint(trained, *evaluate, "--data", "x.yaml", status=2)


def test_a_split_that_their_configuration_draws_is_scored_and_not_all(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(trained, tmp_path / "work")
    monkeypatch.chdir(folder)
    place = "layout: demo, path: data/demo, count: 48, size_px: 64, seed: 0"
    table = "layout: csv, path: data/demo/demo.csv, path_column: image, label_column: shape"
    Path("other.yaml").write_text(TINY.replace(place, table))
    seen: list[Dataset] = []

    def scored(run: Path, name: str, dataset: Dataset, store: object, **more: object) -> dict[str, object]:
        seen.append(dataset)
        return {}

    monkeypatch.setattr(external, "evaluate_elsewhere", scored)
    config = load_config(Path("tiny.yaml"))
    splits: tuple[Split | None, ...] = ("test", None)
    for split in splits:
        commands.evaluate_elsewhere(config, silent, Path("other.yaml"), named={}, split=split)
    drawn, all_of_it = (Counter(sample.split for sample in dataset.samples) for dataset in seen)
    assert 0 < drawn["test"] < drawn["train"] < 48
    assert all_of_it == {"test": 48}
