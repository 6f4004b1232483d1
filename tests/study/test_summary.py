"""The table of a study against hand-computed values, known truths and what is not there."""

from __future__ import annotations

import csv
import dataclasses
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats  # comes with scikit-learn

from pipeline import records
from pipeline.evaluate.intervals import draw_weights
from pipeline.evaluate.metrics import Scorer
from pipeline.study import files
from pipeline.study.files import as_latex, as_markdown, write_files
from pipeline.study.runs import Planned
from pipeline.study.table import Summary, _over_seeds, paired_interval, t_point
from tests.evaluate.test_compare import NAMES, binary_case, write_run

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 99, 1000])
def test_students_t(freedom):
    assert t_point(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-8)


def simulate(random, seeds, groups, *, by_seed, by_group, both):
    """A mean difference per seed and test group whose truth is 1, and 200 bootstrap draws of groups."""
    each = 1 + by_seed * random.normal(size=(1, seeds)) + by_group * random.normal(size=(groups, 1))
    each = each + both * random.normal(size=(groups, seeds))
    weights = np.concatenate(
        list(draw_weights([str(i) for i in range(groups)], resamples=200, seed=int(random.integers(1e6))))
    )
    return each.mean(axis=0), weights @ each / groups


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    "spread",
    [
        {"by_seed": 1.0, "by_group": 0.0, "both": 0.5},
        {"by_seed": 0.0, "by_group": 3.0, "both": 0.5},
        {"by_seed": 0.3, "by_group": 2.0, "both": 1.0},
    ],
)
def test_the_interval_of_a_difference_holds_the_truth_for_new_seeds_and_new_patients(seeds, spread):
    random, held = np.random.default_rng(seeds), 0
    for _ in range(1000):
        low, high = paired_interval(*simulate(random, seeds, 60, **spread), groups=60)
        held += low <= 1 <= high
    assert held / 1000 > 0.92  # of .95; a little too large rather than too small


def test_an_interval_over_test_samples_alone_would_not_hold_it():
    random, held = np.random.default_rng(0), 0
    for _ in range(300):
        _, draws = simulate(random, 3, 60, by_seed=1.0, by_group=0.0, both=0.5)
        low, high = np.quantile(draws.mean(axis=1), [0.025, 0.975])
        held += low <= 1 <= high
    assert held / 300 < 0.3


def test_a_single_seed_speaks_of_the_test_set_alone():
    points, draws = simulate(np.random.default_rng(1), 1, 60, by_seed=0.0, by_group=1.0, both=0.0)
    low, high = paired_interval(points, draws, groups=60)
    half = stats.t.ppf(0.975, 59) * draws.std(ddof=1)
    assert (low, high) == pytest.approx((points[0] - half, points[0] + half))


def test_equal_runs_differ_by_nothing():
    assert paired_interval(np.zeros(3), np.zeros((50, 3)), groups=20) == (0.0, 0.0)


def make_run(folder, planned, labels, p, **options):
    write_run(folder / planned.name, labels, p, **options)
    scores = {
        name: float(value[0])
        for name, value in Scorer("binary", labels, p)(np.ones((1, len(labels)))).items()
        if value.ndim == 1
    }
    result = {"scores": scores, "val_auc": 0.5, "best_epoch": 1, "seconds": 2.0}
    records.write_json(planned.folder / "result.json", result)
    return scores


def plan(folder):
    return [
        Planned(
            f"{variant}{fraction}{seed}",
            folder / f"{variant}{fraction}{seed}",
            {"variant": variant, "backbone": "tiny", "fraction": fraction},
            {"train.fraction": fraction},
            seed,
        )
        for seed in SEEDS
        for fraction in (0.5, 1.0)
        for variant in ("plain", "gated_x")
    ]


@pytest.fixture
def done(tmp_path):
    """All runs of two variants, fractions and three seeds; the gated one ranks better."""
    runs, scores, said = plan(tmp_path), {}, {}
    for number, planned in enumerate(runs):
        labels, p = binary_case(60, strength=1.0 + (planned.cell["variant"] != "plain"), seed=number)
        labels = np.arange(60) % 2
        scores[planned.name] = make_run(tmp_path, planned, labels, p)
        said[planned.name] = p
    return runs, scores, said


def test_mean_spread_and_paired_difference_by_hand(done):
    runs, scores, said = done
    table = Summary(runs, "plain", ("auc", "acc"), resamples=300).table()
    assert [(row["variant"], row["fraction"], row["score"]) for row in table[:4]] == [
        ("plain", 0.5, "auc"), ("plain", 0.5, "acc"), ("gated_x", 0.5, "auc"), ("gated_x", 0.5, "acc"),
    ]  # fmt: skip
    assert len(table) == 2 * 2 * 2
    (row,) = (r for r in table if (r["variant"], r["fraction"], r["score"]) == ("gated_x", 1.0, "auc"))
    ours = np.array([scores[f"gated_x1.0{seed}"]["auc"] for seed in SEEDS])
    theirs = np.array([scores[f"plain1.0{seed}"]["auc"] for seed in SEEDS])
    assert row["mean"] == pytest.approx(ours.mean())
    assert row["sd"] == pytest.approx(ours.std(ddof=1))
    low, high = stats.t.interval(0.95, 2, ours.mean(), ours.std(ddof=1) / math.sqrt(3))
    assert (row["low"], row["high"]) == pytest.approx((max(low, 0), min(high, 1)))
    assert row["difference"] == pytest.approx((ours - theirs).mean())
    assert (row["seeds"], row["missing"]) == (3, 0)

    labels, groups = np.arange(60) % 2, [f"g{i:03d}" for i in range(60)]
    draws = []
    for weights in np.concatenate(list(draw_weights(groups, resamples=300, seed=0))):
        again = np.repeat(np.arange(60), weights.astype(int))  # the slow way: samples repeated, seed by seed
        auc = {
            name: Scorer("binary", labels[again], p[again])(np.ones((1, 60)))["auc"][0]
            for name, p in said.items()
            if "1.0" in name
        }
        draws.append([auc[f"gated_x1.0{seed}"] - auc[f"plain1.0{seed}"] for seed in SEEDS])
    expected = paired_interval(ours - theirs, np.array(draws), groups=60)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(expected, abs=1e-4)
    assert all(row["difference"] is None for row in table if row["variant"] == "plain")


def test_nothing_is_known_of_a_difference_in_auc_where_a_class_is_one_patient(tmp_path):
    runs, labels = plan(tmp_path), np.arange(60) % 2
    groups = [f"g{i}" if label else "only" for i, label in enumerate(labels)]
    for number, planned in enumerate(runs):
        _, p = binary_case(60, strength=1.0 + (planned.cell["variant"] != "plain"), seed=number)
        make_run(tmp_path, planned, labels, p, groups=groups)
    rows = [row for row in Summary(runs, "plain", ("auc", "acc"), resamples=300).table() if row["variant"] != "plain"]
    assert {(row["difference_low"], row["difference_high"]) for row in rows if row["score"] == "auc"} == {(-1, 1)}
    assert all(-1 < row["difference_low"] < row["difference_high"] < 1 for row in rows if row["score"] == "acc")


def test_the_interval_of_a_difference_ends_where_differences_do(tmp_path):
    runs, labels = [planned for planned in plan(tmp_path) if planned.seed < 2], np.arange(60) % 2
    for planned in runs:
        worse = planned.seed == 1 and planned.cell["variant"] == "plain"
        _, p = binary_case(60, strength=3.0, seed=planned.seed)
        make_run(tmp_path, planned, labels, 1 - p if worse else p)
    rows = [row for row in Summary(runs, "plain", ("auc",), resamples=300).table() if row["variant"] != "plain"]
    assert rows
    assert all((row["difference_low"], row["difference_high"]) == (-1, 1) for row in rows)


def test_what_is_not_there_is_counted_and_left_out_of_the_pairs(done):
    runs, scores, _ = done
    for name in ("plain0.51", "gated_x0.52", "plain1.00", "plain1.01", "plain1.02"):
        (planned,) = (planned for planned in runs if planned.name == name)
        (planned.folder / "result.json").unlink()
    table = Summary(runs, "plain", ("auc",), resamples=50).table()
    rows = {(row["variant"], row["fraction"]): row for row in table}
    assert rows.keys() == {("plain", 0.5), ("gated_x", 0.5), ("gated_x", 1.0)}
    gated = rows["gated_x", 0.5]
    assert (gated["seeds"], gated["missing"]) == (2, 1)
    assert gated["difference"] == pytest.approx(scores["gated_x0.50"]["auc"] - scores["plain0.50"]["auc"])
    assert rows["gated_x", 1.0]["difference"] is None  # its baseline is not there at all


def test_a_variant_with_a_backbone_of_its_own_is_compared_at_the_same_point(done):
    runs, _, _ = done
    alike = Summary(runs, "plain", ("auc",), resamples=50).table()
    runs = [
        planned
        if planned.cell["variant"] == "plain"
        else dataclasses.replace(planned, cell={**planned.cell, "backbone": "none"})
        for planned in runs
    ]
    own = Summary(runs, "plain", ("auc",), resamples=50).table()
    assert [row["backbone"] for row in own] == ["tiny", "none"] * 2
    assert [{**row, "backbone": "tiny"} for row in own] == alike
    assert [row["difference"] is None for row in own] == [True, False] * 2


def test_one_seed_has_no_spread(done):
    runs, _, _ = done
    rows = Summary([planned for planned in runs if planned.seed == 0], "plain", ("auc",), resamples=50).table()
    assert {(row["seeds"], row["sd"], row["low"], row["high"]) for row in rows} == {(1, None, None, None)}
    assert "±" not in as_markdown(rows, "plain", 0).splitlines()[2]


@pytest.mark.parametrize("of", ["ids", "pixels"])
def test_runs_on_other_test_samples_are_not_compared(tmp_path, of):
    runs = plan(tmp_path)
    labels, p = binary_case(60)
    for planned in runs:
        make_run(tmp_path, planned, labels, p, pixels=[f"{i:064x}" for i in range(60)])
    (planned,) = (planned for planned in runs if planned.name == "plain0.50")
    other = dataclasses.replace(planned, folder=tmp_path / "other" / planned.name)
    other.folder.parent.mkdir()
    make_run(tmp_path / "other", other, labels, p, **{of: [f"t{i:063d}" for i in range(60)]})
    changed = [other if planned.name == "plain0.50" else planned for planned in runs]
    rows = {(row["variant"], row["fraction"]): row for row in Summary(changed, "plain", ("auc",), resamples=50).table()}
    assert rows["gated_x", 0.5]["difference"] is None
    assert rows["gated_x", 1.0]["difference"] is not None


def test_the_files_hold_the_runs_the_table_and_the_curve(done, tmp_path):
    runs, scores, _ = done
    (runs[3].folder / "result.json").unlink()
    folder = tmp_path / "out"
    folder.mkdir()
    table = write_files(folder, Summary(runs, "plain", ("auc", "acc"), resamples=50))
    results = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert len(results) == 11
    assert list(results[0])[:4] == ["variant", "backbone", "fraction", "seed"]
    assert float(results[0]["auc"]) == scores[runs[0].name]["auc"]
    assert results[0]["run"] == str(runs[0].folder)
    assert len(list(csv.DictReader((folder / "table.csv").read_text().splitlines()))) == len(table) == 8
    curve = list(csv.DictReader((folder / "curve.csv").read_text().splitlines()))
    assert [(row["variant"], row["fraction"]) for row in curve] == [
        ("plain", "0.5"), ("gated_x", "0.5"), ("plain", "1.0"), ("gated_x", "1.0"),
    ]  # fmt: skip
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    markdown = (folder / "table.md").read_text()
    head, rule, *lines = markdown.splitlines()
    assert head == "| variant | fraction | seeds | AUC | AUC less plain | ACC | ACC less plain |"
    assert rule == "|" + " --- |" * 7
    assert lines[0].startswith("| plain | 0.5 | 3 | 0.")
    assert lines[0].split(" | ")[4] == ""
    assert lines[1].split(" | ")[4][0] in "+-"
    assert "1 run is missing: run the study again" in markdown
    assert "paired by seed and test sample" in markdown


def test_the_curve_is_the_mean_and_the_spread_over_seeds_by_fraction(done, tmp_path, monkeypatch):
    runs, scores, _ = done
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *rest, **options: (figures.append(figure), save(figure, *rest, **options))
    )
    write_files(tmp_path, Summary(runs[::-1], "plain", ("auc", "acc"), resamples=50))
    aucs = {
        (variant, fraction): np.array([scores[f"{variant}{fraction}{seed}"]["auc"] for seed in SEEDS])
        for variant in ("plain", "gated_x")
        for fraction in (0.5, 1.0)
    }
    with (tmp_path / "curve.csv").open() as file:
        rows = {(row["variant"], float(row["fraction"])): row for row in csv.DictReader(file)}
    assert rows.keys() == aucs.keys()
    for key, values in aucs.items():
        assert (rows[key]["score"], rows[key]["seeds"]) == ("auc", "3")
        assert float(rows[key]["mean"]) == pytest.approx(sum(values) / 3)
        assert float(rows[key]["sd"]) == pytest.approx(math.sqrt(((values - values.mean()) ** 2).sum() / 2))
    (figure,) = figures
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("share of the training set (%)", "AUC")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["gated_x", "plain"]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines.keys() == {"plain", "gated_x"}
    for band, (name, line) in zip(axes.collections, lines.items(), strict=True):
        means, sds = (
            np.array([function(aucs[name, f]) for f in (0.5, 1.0)])
            for function in (np.mean, lambda v: np.std(v, ddof=1))
        )
        np.testing.assert_allclose(line.get_xydata(), np.column_stack(([50, 100], means)))
        corners = band.get_paths()[0].vertices
        for at, mean, sd in zip((50, 100), means, sds, strict=True):
            there = corners[corners[:, 0] == at, 1]
            assert (there.min(), there.max()) == pytest.approx((mean - sd, mean + sd))


def test_the_curve_over_shots_doubles_and_leaves_out_what_has_none(done, tmp_path, monkeypatch):
    runs, _, _ = done
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *rest, **options: (figures.append(figure), save(figure, *rest, **options))
    )
    shots = {("plain", 0.5): 1, ("plain", 1.0): 4, ("gated_x", 0.5): 1, ("gated_x", 1.0): "all"}
    few = [
        dataclasses.replace(
            planned,
            cell={**planned.cell, "fraction": 1.0, "shots": shots[planned.cell["variant"], planned.cell["fraction"]]},
        )
        for planned in runs
    ]
    write_files(tmp_path, Summary(few, "plain", ("auc",), resamples=50))
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_xscale()) == ("images of each class", "log")
    at = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert at == {"plain": [1, 4], "gated_x": [1]}
    with (tmp_path / "curve.csv").open() as file:
        assert [row["shots"] for row in csv.DictReader(file)] == ["1", "1", "4", "all"]


def test_latex_escapes_names_and_sets_signs_as_mathematics(done):
    runs, _, _ = done
    text = as_latex(Summary(runs, "plain", ("auc",), resamples=50).table(), "plain", 0)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert rows[0] == r"variant & fraction & seeds & AUC & AUC less plain \\"
    assert any(line.startswith(r"gated\_x & 0.5 & 3 & 0.") for line in rows)
    assert all(r" $\pm$ " in line for line in rows[1:])
    assert all("$+$" in line or "$-$" in line for line in rows if line.startswith("gated"))
    assert text.count(" & ") == 5 * 4
    assert text.startswith("% Mean over seeds")
    assert NAMES == ("a", "b")


def test_a_variant_with_a_backbone_of_its_own_is_in_the_panel_of_the_others():
    def rows(*backbones):
        return [
            {"variant": variant, "backbone": backbone, "fraction": fraction, "mean": 0.5, "sd": None}
            for variant, backbone in backbones
            for fraction in (1.0, 0.5)
        ]

    (lines,) = files._panels(rows(("plain", "resnet18"), ("probe", "none")), "fraction").values()
    assert list(lines) == ["plain", "probe"]
    assert [row["fraction"] for row in lines["probe"]] == [0.5, 1.0]
    both = [(variant, backbone) for variant in ("plain", "gated") for backbone in ("resnet18", "clip")]
    panels = files._panels(rows(*both), "fraction")
    assert {title: list(lines) for title, lines in panels.items()} == {
        "backbone resnet18": ["plain", "gated"],
        "backbone clip": ["plain", "gated"],
    }


def test_a_study_without_several_fractions_has_no_curve(done, tmp_path):
    runs, _, _ = done
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("curve.png", "curve.csv", "folds.csv", "folds.md"):  # of what the study was before
        (folder / name).touch()
    whole = [planned for planned in runs if planned.cell["fraction"] == 1]
    write_files(folder, Summary(whole, "plain", ("auc",), resamples=50))
    assert sorted(path.name for path in folder.iterdir()) == ["results.csv", "table.csv", "table.md", "table.tex"]
    assert (folder / "table.md").read_text().startswith("| variant | seeds | AUC |")


def test_an_interval_ends_where_its_score_does_and_not_before():
    values = np.array([1.1, 1.2, 1.15])  # the Brier score of more than two classes adds over them
    assert _over_seeds(values, 0.0, 2.0)["high"] > 1.15
    assert _over_seeds(values - 0.2, 0.0, 1.0)["high"] == 1.0
