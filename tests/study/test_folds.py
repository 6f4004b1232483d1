"""Cross-validation: folds are runs like any other, and together a test in which every sample is scored once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline import records
from pipeline.config.schema import load_config
from pipeline.errors import ConfigError, RunError
from pipeline.evaluate.evaluate import scores_with_intervals
from pipeline.stages.inputs import load_dataset
from pipeline.stages.loaded import Shared
from pipeline.stages.study_plan import load_study
from pipeline.study.files import write_files
from pipeline.study.folds import pooled
from pipeline.study.runs import Planned
from pipeline.study.table import Summary
from tests.cli.conftest import TINY, complaint, copy_of, run_pipeline, succeed
from tests.evaluate.test_compare import NAMES, binary_case, write_run

STUDY = """\
base: tiny.yaml
folder: studies/crossed
baseline: plain
folds: 3
set: {train.epochs: 1, model.image_px: 32}
variants:
  plain: {model.gates: []}
  own: {model.gates: [{tap: own, stage: stage4}]}
"""


def make(folder: Path, *, variants=("plain", "other"), seeds=(0,), folds=3, each=30) -> list[Planned]:
    """Runs of a cross-validation as `evaluate` leaves them; the other variant ranks better."""
    runs = []
    for seed in seeds:
        for fold in range(folds):
            for variant in variants:
                planned = Planned(
                    f"{variant}-{seed}-{fold}",
                    folder / f"{variant}-{seed}-{fold}",
                    {"variant": variant, "backbone": "tiny", "fraction": 1.0},
                    {},
                    seed,
                    fold,
                )
                ids = [f"s{fold}{i:02d}" for i in range(each)]
                groups = [f"patient {fold}{i // 2}" for i in range(each)]
                labels = np.arange(each) % 2
                _, p = binary_case(each, strength=1 + 2 * (variant == "other"), seed=17 * seed + fold)
                write_run(planned.folder, labels, p, ids=ids, groups=groups)
                found = scores_with_intervals("binary", labels, groups, p, NAMES, resamples=50)
                figures = {"n": each, "bootstrap": {"groups": each // 2}, **found}
                records.write_json(planned.folder / "metrics.json", figures)
                scores = {name: found[name] for name in ("auc", "acc")}
                result = {"scores": scores, "val_auc": 0.5, "best_epoch": 1, "seconds": 1.0}
                records.write_json(planned.folder / "result.json", result)
                runs.append(planned)
    return runs


def said_by(runs: list[Planned], variant: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of the second class, of all folds one after the other."""
    rows = [
        row
        for planned in runs
        if planned.cell["variant"] == variant and planned.seed == seed
        for row in records.read_csv(planned.folder / "predictions.csv")
    ]
    return (
        np.array([NAMES.index(row["label"]) for row in rows]),
        np.array([float(row[f"p_{NAMES[1]}"]) for row in rows]),
    )


def test_the_table_has_the_score_of_all_samples_pooled(tmp_path):
    runs = make(tmp_path, seeds=(0, 1))
    table = Summary(runs, "plain", ("auc", "acc"), resamples=200).table()
    assert len(table) == 2 * 2
    (row,) = (row for row in table if (row["variant"], row["score"]) == ("other", "auc"))
    ours, theirs = ([roc_auc_score(*said_by(runs, variant, seed)) for seed in (0, 1)] for variant in ("other", "plain"))
    assert row["mean"] == pytest.approx(np.mean(ours))
    assert row["sd"] == pytest.approx(np.std(ours, ddof=1))
    assert row["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert row["low"] < row["mean"] < row["high"]
    assert (row["seeds"], row["missing"]) == (2, 0)


def test_the_interval_of_a_single_seed_is_over_patients(tmp_path):
    runs = make(tmp_path)
    rows = [r for r in Summary(runs, "plain", ("auc", "acc"), resamples=300).table() if r["variant"] == "plain"]
    said = pooled([planned.folder for planned in runs if planned.cell["variant"] == "plain"])
    ends = scores_with_intervals("binary", said.labels, said.groups, said.probabilities, NAMES, resamples=300)
    for row, score in zip(rows, ("auc", "acc"), strict=True):  # that of a share is exact
        assert {"low": row["low"], "high": row["high"]} == ends["intervals"][score]
        assert row["sd"] is None


def test_each_fold_and_the_pool_have_their_own_row(tmp_path):
    runs = make(tmp_path)
    rows = [r for r in Summary(runs, "plain", ("auc",), resamples=100).folds() if r["variant"] == "plain"]
    assert [row["fold"] for row in rows] == [0, 1, 2, "pooled", "mean"]
    plain = [planned for planned in runs if planned.cell["variant"] == "plain"]
    by_fold = [json.loads((planned.folder / "metrics.json").read_text()) for planned in plain]
    for row, figures in zip(rows, by_fold, strict=False):
        assert (row["value"], row["n"], row["groups"]) == (figures["auc"], 30, 15)
        assert {"low": row["low"], "high": row["high"]} == figures["intervals"]["auc"]
    assert rows[3]["value"] == pytest.approx(roc_auc_score(*said_by(runs, "plain")))
    assert (rows[3]["n"], rows[3]["groups"]) == (90, 45)
    assert rows[4]["value"] == pytest.approx(np.mean([figures["auc"] for figures in by_fold]))
    assert rows[4]["sd"] == pytest.approx(np.std([figures["auc"] for figures in by_fold], ddof=1))
    assert rows[4]["low"] is None


def test_a_seed_of_which_a_fold_is_missing_does_not_count(tmp_path):
    runs = make(tmp_path, seeds=(0, 1))
    (tmp_path / "other-1-2/result.json").unlink()
    summary = Summary(runs, "plain", ("auc",), resamples=50)
    (row,) = (row for row in summary.table() if row["variant"] == "other")
    assert (row["seeds"], row["missing"]) == (1, 1)
    assert {row["seed"] for row in summary.folds() if row["variant"] == "other"} == {0}
    assert len(summary.results()) == 11
    assert {row["fold"] for row in summary.results()} == {0, 1, 2}


def test_while_no_cross_validation_is_complete_there_is_no_table(tmp_path):
    runs = make(tmp_path)
    for planned in runs[2:]:
        (planned.folder / "result.json").unlink()
    assert write_files(tmp_path, Summary(runs, "plain", ("auc",), resamples=50)) == []
    assert len(records.read_csv(tmp_path / "results.csv")) == 2
    assert not (tmp_path / "table.csv").exists()


def test_folds_that_share_samples_are_none(tmp_path):
    runs = make(tmp_path, variants=("plain",))
    with pytest.raises(RunError, match="none of one cross-validation, for they share test samples"):
        pooled([runs[0].folder, runs[0].folder])


def test_the_files_say_what_the_numbers_are(tmp_path):
    write_files(tmp_path, Summary(make(tmp_path, seeds=(0, 1)), "plain", ("auc",), resamples=50))
    assert "95 % interval over groups" in (tmp_path / "table.md").read_text()
    by_fold = (tmp_path / "folds.md").read_text()
    assert re.search(r"\| plain \| 1 \| AUC \| pooled \| 90 \| 45 \| 0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\] \|", by_fold)
    assert re.search(r"\| plain \| 0 \| AUC \| mean \|  \|  \| 0\.\d{3} ± 0\.\d{3} \|", by_fold)
    assert "share training samples" in by_fold
    assert len(records.read_csv(tmp_path / "folds.csv")) == 2 * 2 * 5


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes the study with some text in place of `folds: 3`."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)

    def write(folds="folds: 3"):
        Path("study.yaml").write_text(STUDY.replace("folds: 3", folds))
        return load_study(Path("study.yaml"))

    return write


def test_every_fold_is_a_run_like_any_other(written):
    plan = written("folds: {of: 4, seed: 2, val: 0.2}\ngrid: {train.seed: [5, 6]}")
    assert len(plan.runs) == 2 * 2 * 4
    assert [(run.seed, run.fold, run.cell["variant"]) for run in plan.runs[:5]] == [
        (5, 0, "plain"), (5, 0, "own"), (5, 1, "plain"), (5, 1, "own"), (5, 2, "plain"),
    ]  # fmt: skip
    fold = plan.configs[plan.runs[2].name].fold
    assert (fold.number, fold.of, fold.seed, fold.val) == (1, 4, 2, 0.2)
    assert len({run.name for run in plan.runs}) == 16
    assert re.fullmatch(r"plain-seed5-fold1-[0-9a-f]{6}", plan.runs[2].name)
    assert all("fold" not in run.cell for run in plan.runs)


@pytest.mark.parametrize(
    ("folds", "said"),
    [
        ("folds: 1", "folds.*got 1, expected greater than or equal to 2"),
        ("folds: 3\ngrid: {fold.seed: [0, 1]}", "grid.fold.seed: `folds` sets it for every run"),
        ("folds: 3\ngrid: {fold: {a: {train.lr: 1e-3}}}", "an axis that is called 'fold'"),
        ("folds: {of: 3, vall: 0.1}", "vall: unknown key"),
    ],
)
def test_folds_that_cannot_be_are_refused(written, folds, said):
    with pytest.raises(ConfigError, match=said):
        written(folds)


def test_a_fold_can_be_named_on_the_command_line(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    tested = []
    for number in range(4):
        config = load_config(Path("tiny.yaml"), [f"fold.number={number}", "fold.of=4"])
        tested += [sample.id for sample in load_dataset(config).samples if sample.split == "test"]
    assert sorted(tested) == sorted(sample.id for sample in load_dataset(load_config(Path("tiny.yaml"))).samples)


def test_one_fold_is_held_at_a_time(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    folds = [load_config(Path("tiny.yaml"), [f"fold.number={number}"]) for number in range(2)]
    shared = Shared()
    first, held = shared.dataset(folds[0]), shared.holdings
    assert shared.dataset(folds[0]) is first
    assert shared.holdings is held
    second = shared.dataset(folds[1])
    assert second is not first
    assert second.source is first.source  # loaded once
    assert second == load_dataset(folds[1])
    assert shared.holdings is not held


def test_the_command_cross_validates(prepared, tmp_path):
    folder = copy_of(prepared, tmp_path / "work")
    (folder / "study.yaml").write_text(STUDY)
    report = succeed(folder, "study", "-c", "study.yaml")
    assert (report["runs"], report["done"]) == (6, 6)
    rows = records.read_csv(folder / "studies/crossed/folds.csv")
    assert [row["fold"] for row in rows if row["score"] == "auc"] == ["0", "1", "2", "pooled", "mean"] * 2
    assert {row["n"] for row in rows if row["fold"] == "pooled"} == {"48"}
    runs = sorted((folder / "studies/crossed/runs").glob("plain-*"))
    learnt = [{row["id"] for row in records.read_csv(run / "samples.csv")} for run in runs]
    tested = [{row["id"] for row in records.read_csv(run / "predictions.csv")} for run in runs]
    assert sum(map(len, tested)) == 48 == len(set.union(*tested))
    assert not any(used & seen for used, seen in zip(learnt, tested, strict=True))
    named = [json.loads((run / "model.json").read_text())["provenance"]["data"]["name"] for run in runs]
    assert named == [f"demo, fold {number} of 3" for number in range(3)]
    shown = run_pipeline(folder, "study", "-c", "study.yaml", "--tables-only").stdout
    assert "pooled" in shown
    assert "interval over groups" in shown
    # evaluated again without its fold, a run of a fold would be tested on what it has learnt
    config = ("-c", "tiny.yaml", "--set", f"run={runs[0].relative_to(folder)}", "--set", "model.gates=[]")
    assert "were used otherwise by the run" in complaint(folder, "evaluate", *config, status=1)
