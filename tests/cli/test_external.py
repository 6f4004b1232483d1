"""`evaluate --data`: the real command on another data set and its own store."""

from __future__ import annotations

from pathlib import Path

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
