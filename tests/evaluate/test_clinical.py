"""What a clinic asks of a classifier: predictive values, net benefit, subgroups, and which class is looked for."""

from __future__ import annotations

import csv
import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evaluate import decision, intervals, metrics
from pipeline.evaluate.compare import read_predictions
from pipeline.evaluate.evaluate import evaluate, scores_with_intervals
from pipeline.evaluate.operating import PointScorer
from pipeline.evaluate.subgroups import by_subgroup
from pipeline.train.train import train
from tests.train.scenes import PLAIN, QUICK, make_dataset

# ten patients: four have it, and the model gives these probabilities
HITS = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
SAID = np.array([0.9, 0.8, 0.6, 0.2, 0.7, 0.4, 0.3, 0.2, 0.1, 0.05])
ALONE = [f"p{i}" for i in range(10)]


def test_predictive_values_by_hand() -> None:
    """Called from 0.5 on: 0.9, 0.8, 0.6 rightly and 0.7 wrongly; of the other six one has it."""
    scorer = PointScorer(HITS[:, None], SAID[:, None], [0.5])
    assert {name: int(count[0]) for name, count in scorer.counts().items()} == {"tp": 3, "fp": 1, "fn": 1, "tn": 5}
    found = {
        name: intervals.share(right[:, 0], made[:, 0], ALONE) for name, (right, made) in scorer.proportions().items()
    }
    values = {name: (share["value"], share["n"]) for name, share in found.items() if share is not None}
    assert values == {"sensitivity": (3 / 4, 4), "specificity": (5 / 6, 6), "ppv": (3 / 4, 4), "npv": (5 / 6, 6)}
    assert found["ppv"] is not None
    assert (found["ppv"]["low"], found["ppv"]["high"]) == pytest.approx((0.1941, 0.9937), abs=1e-4)  # 3 of 4, exact


def test_nothing_called_has_no_predictive_value() -> None:
    shares = PointScorer(HITS[:, None], SAID[:, None], [0.95]).proportions()
    assert intervals.share(*(of[:, 0] for of in shares["ppv"]), ALONE) is None
    assert intervals.share(*(of[:, 0] for of in shares["npv"]), ALONE)["value"] == 6 / 10


def test_net_benefit_by_hand() -> None:
    """At 0.25: called 3 true and 3 false of ten, a false one costs a third; at 0.5: 3 and 1, which cost the same."""
    thresholds = np.array([0.25, 0.5, 0.75])
    found = decision.NetBenefit(HITS, SAID, thresholds)(np.ones((1, 10)))
    assert found["model"][0] == pytest.approx([3 / 10 - 3 / 10 / 3, 3 / 10 - 1 / 10, 2 / 10])
    assert found["all"][0] == pytest.approx([4 / 10 - 6 / 10 / 3, 4 / 10 - 6 / 10, 4 / 10 - 6 / 10 * 3])


def test_net_benefit_of_weighted_samples_is_that_of_repeated_ones() -> None:
    times = np.array([2, 0, 1, 3, 1, 1, 0, 2, 1, 1])
    weighted = decision.NetBenefit(HITS, SAID)(times[None].astype(float))
    repeated = decision.NetBenefit(np.repeat(HITS, times), np.repeat(SAID, times))(np.ones((1, times.sum())))
    for name, values in weighted.items():
        assert values == pytest.approx(repeated[name])


def test_a_decision_curve_lies_within_its_intervals_and_says_where_it_is_worth_something() -> None:
    rows = decision.curve(HITS, SAID, ALONE, resamples=200)
    assert all(row["low"] <= row["net_benefit"] <= row["high"] for row in rows)
    assert any(row["low"] < row["high"] for row in rows)
    better = {row["threshold"] for row in rows if row["net_benefit"] > max(0, row["treat_all"]) + 1e-9}
    ranges = decision.worthwhile(rows)
    assert better == {row["threshold"] for row in rows if any(a <= row["threshold"] <= b for a, b in ranges)}
    worth = [0.1, 0.1, 0.0, -0.1, 0.2]
    sure = dict(zip(range(5), (-0.1, 0.02, -0.1, -0.2, -0.1), strict=True))
    rows = [
        {"threshold": k / 10, "net_benefit": value, "treat_all": -1.0, "gain_low": sure[k]}
        for k, value in enumerate(worth)
    ]
    assert decision.worthwhile(rows, surely=True) == [(0.1, 0.1)]
    assert decision.worthwhile(rows) == [(0.0, 0.1), (0.4, 0.4)]
    assert decision.worthwhile(rows[2:4]) == []


def test_the_band_of_a_roc_curve_holds_the_curve_and_is_what_a_loop_over_draws_gives() -> None:
    random = np.random.default_rng(0)
    hits = random.random(80) < 0.4
    scores = np.round(hits * 0.3 + random.random(80), 1)  # with ties
    groups = [f"g{i // 2}" for i in range(80)]
    rates, low, high = intervals.roc_band(hits, scores, groups, resamples=100, seed=3)
    curves = []
    for block in intervals.draw_weights(groups, resamples=100, seed=3):
        for row in block.astype(int):
            false, true, _ = metrics.roc_curve(np.repeat(hits, row), np.repeat(scores, row))
            curves.append(np.interp(rates, false, true))
    expected = np.quantile(np.array(curves), [0.025, 0.975], axis=0)
    assert np.array([low, high]) == pytest.approx(expected)
    false, true, _ = metrics.roc_curve(hits, scores)
    inside = np.interp(rates, false, true)
    assert ((low <= inside + 1e-9) & (inside <= high + 1e-9)).mean() > 0.95
    assert (high - low).max() > 0.1


@pytest.mark.parametrize("pairs", [2, 6, 40])
def test_a_perfect_auc_has_an_interval_that_knows_how_few_it_rests_on(pairs: int) -> None:
    hits = np.arange(2 * pairs) < pairs
    groups = [f"g{i}" for i in range(2 * pairs)]
    point = {"low": 1.0, "high": 1.0}
    assert intervals.of_auc(1.0, point, hits, groups) == {"low": pytest.approx(0.025 ** (1 / pairs)), "high": 1.0}
    assert intervals.of_auc(0.0, point, hits, groups) == {"low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / pairs))}
    assert intervals.of_auc(0.9, {"low": 0.8, "high": 1.0}, hits, groups) == {"low": 0.8, "high": 1.0}
    one_patient_each = ["a" if hit else "b" for hit in hits]
    assert intervals.of_auc(1.0, point, hits, one_patient_each)["low"] == pytest.approx(0.025)
    assert intervals.of_auc(0.9, {"low": 0.8, "high": 1.0}, hits, one_patient_each) == {"low": 0.0, "high": 1.0}


def test_the_interval_of_a_perfect_auc_holds_its_promise() -> None:
    """Normal scores a distance apart: where an order is perfect by chance, the true AUC is still in the interval."""
    random = np.random.default_rng(0)
    hits, groups = np.arange(10) < 5, [f"g{i}" for i in range(10)]
    distance = 1.35  # an AUC of 0.83
    truth, missed = 0.83, 0
    for _ in range(2000):
        scores = random.standard_normal(10) + distance * hits
        if scores[hits].min() > scores[~hits].max():
            missed += not intervals.of_auc(1.0, {"low": 1.0, "high": 1.0}, hits, groups)["low"] <= truth
    assert missed / 2000 <= 0.025


def ends_of(task: Any, labels: Any, said: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [str(k) for k in range(np.asarray(said).shape[1])]
    found = scores_with_intervals(task, np.asarray(labels), [f"g{i}" for i in range(len(labels))], said, names)
    return found, found["intervals"]


def test_no_score_is_certain_because_nothing_was_wrong() -> None:
    labels = np.repeat([0, 1, 2], [4, 4, 8])
    found, ends = ends_of("ordinal", labels, np.eye(3)[labels])
    for score in ("acc", "balanced_acc", "f1", "ap", "kappa", "auc"):
        assert found[score] == pytest.approx(1), score
        assert ends[score]["low"] < 0.8, score
        assert ends[score]["high"] == 1, score
    lows = [0.025**0.25, 0.025**0.25, 0.025**0.125]  # Clopper and Pearson's, of 4 of 4 and of 8 of 8
    assert ends["balanced_acc"]["low"] == pytest.approx(np.mean(lows))
    assert ends["kappa"]["low"] == pytest.approx(2 * np.mean(lows) - 1)
    assert ends["class_ap"]["0"] == ends["class_auc"]["0"]
    many = ends_of("binary", np.repeat([0, 1], 200), np.eye(2)[np.repeat([0, 1], 200)])[1]
    assert min(many[score]["low"] for score in ("balanced_acc", "f1", "ap")) > 0.98


def test_no_score_is_certain_because_one_class_was_always_called() -> None:
    labels = np.repeat([0, 1, 2], [4, 4, 8])
    found, ends = ends_of("ordinal", labels, np.tile([0.2, 0.3, 0.5], (16, 1)))
    assert (found["kappa"], found["balanced_acc"]) == (0, pytest.approx(1 / 3))
    assert ends["kappa"]["low"] < -0.3 < 0.3 < ends["kappa"]["high"]
    assert ends["balanced_acc"]["low"] < 0.25 < 0.5 < ends["balanced_acc"]["high"]


def test_a_score_of_which_draws_differ_keeps_their_interval() -> None:
    random = np.random.default_rng(0)
    labels, said = np.repeat([0, 1], 20), random.random((40, 2))
    found, ends = ends_of("binary", labels, said / said.sum(1, keepdims=True))
    assert 0 < found["f1"] < 1
    wide = [ends["sensitivity"][name]["high"] - ends["sensitivity"][name]["low"] for name in "01"]
    assert ends["balanced_acc"]["high"] - ends["balanced_acc"]["low"] < np.mean(wide)


def test_subgroups_by_hand() -> None:
    labels, said = HITS.astype(np.int64), np.stack([1 - SAID, SAID], axis=1)
    sexes = ["f", "f", "m", "m", "f", "f", "m", "m", "m", ""]
    found = by_subgroup("binary", labels, said, ALONE, {"sex": sexes}, positive=1, threshold=0.5, resamples=100)["sex"]
    assert list(found) == ["f", "m", "not given"]
    women, men, unknown = found.values()
    assert (women["n"], women["positives"], women["groups"]) == (4, 2, 4)
    assert women["sensitivity"]["value"] == 1.0
    assert women["sensitivity"]["n"] == 2
    assert women["specificity"]["value"] == 0.5
    assert women["acc"]["value"] == 3 / 4
    assert women["auc"]["value"] == 1.0
    assert women["auc"]["low"] == pytest.approx(0.025**0.5)  # a point, were it drawn
    assert men["sensitivity"]["value"] == 0.5
    assert men["auc"]["value"] == pytest.approx((3 + 1.5) / 6)  # .6 beats three, .2 beats one and ties with one
    assert unknown["auc"] is None
    assert unknown["sensitivity"] is None
    assert sum(part["n"] for part in found.values()) == 10
    flipped = by_subgroup("binary", labels, said, ALONE, {"sex": sexes}, positive=0, threshold=None, resamples=9)["sex"]
    assert flipped["m"]["sensitivity"]["value"] == men["specificity"]["value"] == 1.0


def test_bands_stand_in_the_order_of_their_numbers() -> None:
    labels, said = HITS.astype(np.int64), np.stack([1 - SAID, SAID], axis=1)
    bands = ["60 and over", "9 to under 60", "under 9", "", "under 9", "9 to under 60", "", "", "", ""]
    found = by_subgroup("binary", labels, said, ALONE, {"age": bands}, positive=1, threshold=0.5, resamples=9)
    assert list(found["age"]) == ["under 9", "9 to under 60", "60 and over", "not given"]


def test_without_a_positive_class_subgroups_have_a_mean_auc_and_accuracy() -> None:
    labels = np.arange(30) % 3
    random = np.random.default_rng(0)
    said = random.dirichlet(np.ones(3), 30)
    groups = [str(i) for i in range(30)]
    half = ["a"] * 15 + ["b"] * 15
    found = by_subgroup("multiclass", labels, said, groups, {"site": half}, positive=None, threshold=None, resamples=50)
    assert found["site"]["a"].keys() == {"n", "groups", "acc", "auc"}
    expected = metrics.score("multiclass", labels[:15], said[:15], "abc")["auc"]
    assert found["site"]["a"]["auc"]["value"] == pytest.approx(expected)


def test_a_positive_class_that_is_none_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"scene: data\.positive is 'c', and there is no such class; name one of 'a', 'b'"
    ):
        dataclasses.replace(make_dataset(), positive="c")
    with pytest.raises(DataError, match="did you mean 'melanoma'"):
        dataclasses.replace(make_dataset(), class_names=("naevus", "melanoma"), positive="melanom")


@pytest.mark.parametrize(
    ("task", "classes", "named", "wanted"),
    [("binary", 2, None, 1), ("binary", 2, "a", 0), ("multiclass", 3, None, None), ("multiclass", 3, "b", 1)],
)
def test_which_class_is_looked_for(task, classes, named, wanted) -> None:
    dataset = dataclasses.replace(make_dataset((24, 24, 24), classes=classes, task=task), positive=named)
    assert dataset.positive_class == wanted


def test_swapping_the_positive_class_swaps_what_is_said_of_it_and_nothing_else(tmp_path) -> None:
    dataset = make_dataset()
    kinds = {"site": ("north", "south")}
    samples = [dataclasses.replace(s, subgroups=(kinds["site"][i % 3 == 0],)) for i, s in enumerate(dataset.samples)]
    dataset = dataclasses.replace(dataset, samples=tuple(samples), subgroup_names=("site",))
    train(dataset, None, tmp_path / "run", model=PLAIN, options=dataclasses.replace(QUICK, epochs=1))
    last = evaluate(tmp_path / "run", dataset, None, resamples=50)
    rows = (tmp_path / "run/predictions.csv").read_text()
    first = evaluate(tmp_path / "run", dataclasses.replace(dataset, positive="a"), None, resamples=50)
    assert (last["positive"], first["positive"]) == ("b", "a")
    assert (tmp_path / "run/predictions.csv").read_text() == rows
    assert read_predictions(tmp_path / "run").positive == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == first
    assert first["ap"] == first["class_ap"]["a"]
    assert last["ap"] == last["class_ap"]["b"]
    moved = ("positive", "ap", "subgroups")
    assert {k: v for k, v in first.items() if k not in (*moved, "intervals")} == {
        k: v for k, v in last.items() if k not in (*moved, "intervals")
    }
    point = last["operating_points"]["youden"]
    for name in ("a", "b"):
        counts = point[name]["counts"]
        assert sum(counts.values()) == 12
        assert point[name]["sensitivity"]["n"] == counts["tp"] + counts["fn"] == 6
    at_half = ((f["sensitivity"]["b"], f["specificity"]["b"]) for f in (last, first))
    assert all(pair == (first["specificity"]["a"], first["sensitivity"]["a"]) for pair in at_half)
    for value in last["subgroups"]["site"].values():
        assert value["auc"]["low"] <= value["auc"]["value"] <= value["auc"]["high"]
    assert {k: v["n"] for k, v in last["subgroups"]["site"].items()} == {"north": 8, "south": 4}
    with (tmp_path / "run/predictions.csv").open() as file:
        named = [row["subgroup_site"] for row in csv.DictReader(file)]
    assert (named.count("north"), named.count("south")) == (8, 4)
    with (tmp_path / "run/decision_curve.csv").open() as file:
        curve = [row for row in csv.DictReader(file) if row["class"] == "b"]
    assert [float(row["threshold"]) for row in curve] == pytest.approx(decision.THRESHOLDS)
    assert float(curve[49]["treat_all"]) == pytest.approx(0.5 - 0.5)  # at even odds, half of them positive


def test_the_gain_of_a_model_is_sure_where_it_sees_and_never_where_it_guesses() -> None:
    random = np.random.default_rng(0)
    hits = random.random(300) < 0.3
    groups = [str(i) for i in range(300)]
    seeing = np.clip(0.3 + 0.5 * (hits - 0.3) + 0.1 * random.standard_normal(300), 0.01, 0.99)
    assert decision.worthwhile(decision.curve(hits, seeing, groups, resamples=300), surely=True)
    sure = [
        decision.worthwhile(
            decision.curve(hits, np.random.default_rng(k).random(300), groups, resamples=200), surely=True
        )
        for k in range(3)
    ]
    assert sum(map(len, sure)) == 0
