"""Intervals and comparisons against loops over resamples, DeLong's formula and known truths."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import records
from pipeline.errors import RunError
from pipeline.evaluate.compare import compare, delong_test, read_predictions
from pipeline.evaluate.evaluate import scores_with_intervals
from pipeline.evaluate.intervals import draw_weights, interval, named_intervals, resample
from pipeline.evaluate.metrics import Scorer
from pipeline.model.classifier import ModelOptions
from pipeline.study.table import paired_interval
from pipeline.train import trained_model

NAMES = ("a", "b")


def binary_case(n=80, strength=1.0, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    scores = 1 / (1 + np.exp(-(labels * strength + random.normal(size=n))))
    return labels, np.stack([1 - scores, scores], axis=1)


def test_weights_are_counts_of_whole_groups():
    groups = ["x", "y", "x", "z", "y", "x"]
    drawn = np.concatenate(list(draw_weights(groups, resamples=500, seed=1)))
    assert drawn.shape == (500, 6)
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 0] == drawn[:, 5]).all()
    assert (drawn[:, 1] == drawn[:, 4]).all()
    per_group = drawn[:, [0, 1, 3]]
    assert (per_group.sum(axis=1) == 3).all()
    assert per_group.mean(axis=0) == pytest.approx([1, 1, 1], abs=0.1)
    assert np.array_equal(drawn, np.concatenate(list(draw_weights(groups, resamples=500, seed=1))))
    assert not np.array_equal(drawn, np.concatenate(list(draw_weights(groups, resamples=500, seed=2))))


def test_the_bootstrap_equals_a_loop_that_repeats_rows():
    labels, p = binary_case(30)
    groups = [f"g{i // 3}" for i in range(30)]
    fast = resample(Scorer("binary", labels, p), groups, resamples=40, seed=5)
    for row, weights in enumerate(np.concatenate(list(draw_weights(groups, resamples=40, seed=5)))):
        again = np.repeat(np.arange(30), weights.astype(int))
        slow = Scorer("binary", labels[again], p[again])(np.ones((1, len(again))))
        for name, value in slow.items():
            np.testing.assert_allclose(fast[name][row], value[0], atol=1e-5, err_msg=name)


def test_delong_knows_nothing_of_a_kind_that_is_one_patient():
    labels = np.array([1, 1, 1, *[0] * 30])
    random = np.random.default_rng(0)
    first, second = random.random(33), random.random(33)
    first[:3], second[:3] = 0.95, 0.1
    said = [np.stack([1 - scores, scores], axis=1) for scores in (first, second)]
    apart, together = [f"g{i}" for i in range(33)], [f"g{max(i, 2)}" for i in range(33)]
    known = delong_test("binary", labels, *said, apart, NAMES)["auc"]
    assert known["p"] < 0.001
    unknown = {"difference": known["difference"], "low": -1.0, "high": 1.0, "p": 1.0}
    assert delong_test("binary", labels, *said, together, NAMES) == {
        "auc": unknown, "a": {**unknown, "difference": pytest.approx(known["difference"])}, "b": unknown
    }  # fmt: skip
    assert delong_test("binary", labels[2:], *(p[2:] for p in said), apart[2:], NAMES)["auc"]["p"] == 1


@pytest.mark.filterwarnings("error")
def test_draws_that_hardly_ever_have_every_class_tell_nothing():
    labels = np.arange(12)  # every class has one patient: such a draw is the test set itself
    p = np.random.default_rng(0).dirichlet(np.ones(12), 12)
    groups, names = [f"g{i}" for i in labels], [f"c{i}" for i in labels]
    found = scores_with_intervals("multiclass", labels, groups, p, names, resamples=200)
    for score in ("auc", "ap", "balanced_acc", "f1"):
        assert found["intervals"][score] == {"low": 0.0, "high": 1.0}
    drawn = np.full((1000, 2), np.nan)
    drawn[:20, 0] = drawn[:100, 1] = 0.5
    np.testing.assert_array_equal(interval(drawn, ends=(-1.0, 1.0)), [[-1.0, 0.5], [1.0, 0.5]])
    assert paired_interval(np.array([0.1, 0.2]), drawn, groups=12, largest=2.0) == (-2.0, 2.0)


def test_where_the_interval_of_a_difference_says_nothing_its_p_says_nothing_either(tmp_path):
    labels, names = np.array([*range(7), *[7] * 40]), tuple("abcdefgh")  # seven classes of one patient each
    right = np.full((47, 8), 0.05)
    right[np.arange(47), labels] = 0.65
    folders = [
        write_run(tmp_path / name, labels, p, names=names, task="multiclass")
        for name, p in (("wrong", np.roll(right, 1, axis=1)), ("right", right))
    ]
    scores = compare(*folders)["scores"]
    for score in ("auc", "ap", "balanced_acc", "f1"):
        assert (scores[score]["low"], scores[score]["high"], scores[score]["p"]) == (-1, 1, 1)
    assert scores["acc"]["p"] < 0.01


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(100):
        labels, p = binary_case(120, seed=seed)
        draws = resample(Scorer("binary", labels, p), [str(i) for i in range(120)], resamples=200, seed=seed)
        low, high = interval(draws["auc"])
        held += low <= 0.76025 <= high  # of two normals one apart: Phi(1 / sqrt(2))
    assert 88 <= held <= 100


def test_samples_of_one_patient_widen_the_interval():
    labels, p = binary_case(40)
    labels, p = np.tile(labels, 5), np.tile(p, (5, 1))  # five copies of each
    widths = []
    for groups in ([f"{i % 40}" for i in range(200)], [f"{i}" for i in range(200)]):
        low, high = interval(resample(Scorer("binary", labels, p), groups, resamples=500)["auc"])
        widths.append(high - low)
    assert widths[0] > 1.8 * widths[1]  # sqrt(5) in the limit


def test_draws_without_a_class_are_left_out():
    low, high = interval(np.array([0.1, np.nan, 0.3]), level=1.0)
    assert (low, high) == (0.1, 0.3)
    named = named_intervals({"auc": np.array([0.5, 0.5]), "class_auc": np.array([[0.1, 0.2]] * 3)}, NAMES)
    assert named == {
        "auc": {"low": 0.5, "high": 0.5},
        "class_auc": {"a": {"low": 0.1, "high": 0.1}, "b": {"low": 0.2, "high": 0.2}},
    }


def test_two_thousand_resamples_of_ten_thousand_predictions_take_seconds():
    labels, p = binary_case(10_000)
    groups = [str(i // 2) for i in range(10_000)]
    start = time.process_time()
    resample(Scorer("binary", labels, p), groups, resamples=2000)
    assert time.process_time() - start < 10  # 5 s of two cores


def delong_by_the_book(labels, first, second):
    """Variance of the difference of two AUCs from the covariance of the structural components, pair by pair."""
    hits, misses = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    v10, v01 = [], []
    for scores in (first, second):
        wins = np.array(
            [[(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for j in misses] for i in hits], float
        )
        v10.append(wins.mean(axis=1))
        v01.append(wins.mean(axis=0))
    s10, s01 = np.cov(np.stack(v10)), np.cov(np.stack(v01))
    contrast = np.array([-1, 1])
    variance = contrast @ (s10 / len(hits) + s01 / len(misses)) @ contrast
    return np.mean(v10[1]) - np.mean(v10[0]), variance


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_delong_agrees_with_the_pairwise_formula(seed, ties):
    labels, first = binary_case(40, seed=seed)
    _, second = binary_case(40, strength=2.0, seed=seed + 1)
    if ties:
        first, second = np.round(first, 1), np.round(second, 1)
    ours = delong_test("binary", labels, first, second, [str(i) for i in range(40)], NAMES)
    difference, variance = delong_by_the_book(labels, first[:, 1], second[:, 1])
    for name in ("auc", "b"):
        assert ours[name]["difference"] == pytest.approx(difference, abs=1e-12)
        assert ours[name]["high"] - ours[name]["low"] == pytest.approx(2 * 1.959963984540054 * math.sqrt(variance))
        assert ours[name]["p"] == pytest.approx(math.erfc(abs(difference) / math.sqrt(2 * variance)), abs=1e-12)


def test_two_classes_have_the_auc_of_the_last_which_is_the_one_shown(tmp_path):
    labels, first = binary_case(40)
    random = np.random.default_rng(3)
    first, second = (np.stack([random.random(40), p[:, 1]], axis=1) for p in (first, binary_case(40, seed=1)[1]))
    shown = compare(write_run(tmp_path / "a", labels, first), write_run(tmp_path / "b", labels, second), resamples=10)
    assert shown["delong"]["auc"]["difference"] == pytest.approx(shown["scores"]["auc"]["difference"], abs=1e-12)
    groups = [str(i) for i in range(40)]
    binary = delong_test("binary", labels, first, second, groups, NAMES)
    assert binary["auc"] == binary["b"] != binary["a"]
    several = delong_test("multiclass", labels, first, second, groups, NAMES)
    assert several["auc"]["difference"] == pytest.approx((several["a"]["difference"] + several["b"]["difference"]) / 2)


def test_neither_test_knows_anything_of_a_kind_that_is_one_patient(tmp_path):
    labels = np.array([1, *[0] * 30])
    random = np.random.default_rng(0)
    first, second = (np.append(place, random.random(30)) for place in (0.95, 0.1))
    folders = [
        write_run(tmp_path / name, labels, np.stack([1 - scores, scores], axis=1))
        for name, scores in (("a", first), ("b", second))
    ]
    shown = compare(*folders, resamples=100)
    for auc in (shown["scores"]["auc"], shown["delong"]["auc"]):
        assert auc["difference"] < -0.5
        assert (auc["low"], auc["high"], auc["p"]) == (-1, 1, 1)
    of_each = shown["scores"]["class_auc"]
    assert [set(of_each[key].values()) for key in ("low", "high", "p")] == [{-1.0}, {1.0}, {1.0}]


def test_delong_counts_patients_and_not_samples():
    labels, first = binary_case(40)
    _, second = binary_case(40, strength=2.0, seed=1)
    once = delong_test("binary", labels, first, second, [str(i) for i in range(40)], NAMES)
    copies = [np.tile(labels, 4), np.tile(first, (4, 1)), np.tile(second, (4, 1))]
    again = delong_test("binary", *copies, [str(i % 40) for i in range(160)], NAMES)
    naive = delong_test("binary", *copies, [str(i) for i in range(160)], NAMES)
    widths = [test["auc"]["high"] - test["auc"]["low"] for test in (once, again, naive)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert widths[2] == pytest.approx(widths[0] / 2, rel=0.05)


def test_a_classifier_does_not_differ_from_itself():
    labels, p = binary_case(20)
    same = delong_test("binary", labels, p, p, [str(i) for i in range(20)], NAMES)
    assert same["auc"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def write_run(folder, labels, p, *, ids=None, groups=None, names=NAMES, task="binary", pixels=None):
    folder.mkdir()
    description = trained_model.Description(ModelOptions(gates=()), task, "softmax", names, {}, None, {}, {})
    trained_model.save_description(folder, description)
    rows = []
    for i in range(len(p)):
        row = {
            "id": ids[i] if ids else f"s{i:03d}",
            "group": groups[i] if groups else f"g{i:03d}",
            "label": "-" if task == "multilabel" else names[labels[i]],
            **{f"p_{name}": p[i, k] for k, name in enumerate(names)},
        }
        if task == "multilabel":
            row |= {f"y_{name}": labels[i][k] for k, name in enumerate(names)}
        if pixels is not None:
            row["pixels_sha256"] = pixels[i]
        rows.append(row)
    records.write_csv(folder / "predictions.csv", rows)
    return folder


def test_a_better_run_is_found_better_and_an_equal_one_is_not(tmp_path):
    labels, weak = binary_case(200, strength=0.5)
    _, strong = binary_case(200, strength=3.0, seed=1)
    _, equal = binary_case(200, strength=0.5, seed=2)
    folders = [write_run(tmp_path / n, labels, p) for n, p in (("weak", weak), ("strong", strong), ("equal", equal))]
    better = compare(folders[0], folders[1], resamples=400)
    auc = better["scores"]["auc"]
    assert auc["difference"] == pytest.approx(auc["second"] - auc["first"])
    assert auc["low"] > 0
    assert auc["p"] == pytest.approx(2 / 401)
    assert better["delong"]["auc"]["p"] < 1e-4
    assert better["delong"]["auc"]["difference"] == pytest.approx(auc["difference"])
    assert better["scores"]["sensitivity"]["difference"].keys() == set(NAMES)
    same = compare(folders[0], folders[2], resamples=400)
    assert same["scores"]["auc"]["low"] < 0 < same["scores"]["auc"]["high"]
    assert same["scores"]["auc"]["p"] > 0.05
    assert (same["n"], same["groups"], same["resamples"]) == (200, 200, 400)


def test_the_order_of_the_samples_does_not_matter(tmp_path):
    labels, p = binary_case(40)
    ids = [f"s{i:03d}" for i in range(40)]
    first = write_run(tmp_path / "a", labels, p, ids=ids, groups=ids)
    second = write_run(tmp_path / "b", labels[::-1], p[::-1], ids=ids[::-1], groups=ids[::-1])
    assert compare(first, second, resamples=10)["scores"]["auc"]["difference"] == 0


def test_other_pixels_are_other_samples_and_unknown_ones_are_not(tmp_path):
    labels, p = binary_case(40)
    pixels = [f"{i:064x}" for i in range(40)]
    known, written_before = (
        write_run(tmp_path / name, labels, p, pixels=given) for name, given in (("a", pixels), ("b", None))
    )
    assert read_predictions(known).pixels == tuple(pixels)
    assert read_predictions(written_before).pixels == ("",) * 40
    compare(known, written_before, resamples=10)
    same = write_run(tmp_path / "c", labels, p, pixels=pixels)
    compare(known, same, resamples=10)
    other = write_run(tmp_path / "d", labels, p, pixels=["f" * 64, "e" * 64, *pixels[2:]])
    with pytest.raises(
        RunError, match=r"on other samples \(2 of 40 images have other pixels\): evaluate both on the same"
    ):
        compare(known, other)


def test_the_same_settings_are_said_only_where_the_pixels_are_known(tmp_path):
    labels, p = binary_case(40)
    pixels = [f"{i:064x}" for i in range(40)]
    settings = {"data": {"samples_sha256": "1"}, "features": None, "model": {"gates": []}, "train": {"lr": 1e-3}}

    def written(name, pixels, **changes):
        folder = write_run(tmp_path / name, labels, p, pixels=pixels)
        record = dataclasses.replace(
            trained_model.load_description(folder), provenance={"settings": settings | changes}
        )
        trained_model.save_description(folder, record)
        return folder

    known, again, before = written("known", pixels), written("again", pixels), written("before", None)
    assert compare(known, again, resamples=10)["other_settings"] == []
    assert compare(known, before, resamples=10)["other_settings"] is None
    slower = written("slower", None, train={"lr": 1e-4})
    assert compare(known, slower, resamples=10)["other_settings"] == [
        {"setting": "train.lr", "first": 1e-3, "second": 1e-4}
    ]
    data = [{"samples_sha256": "1", "pixels_sha256": digest} for digest in ("2", "3", None)]
    two, three, plain = (written(f"of {d['pixels_sha256']}", pixels, data=d) for d in data)
    assert compare(two, plain, resamples=10)["other_settings"] == []  # a run without a store looks at no pixels
    assert compare(two, three, resamples=10)["other_settings"] == [
        {"setting": "data.pixels_sha256", "first": "2", "second": "3"}
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [f"t{i:03d}" for i in range(40)]}, r"scored on other samples \(80 samples are in one of them only"),
        ({"groups": ["g"] * 40}, "their labels or groups differ"),
        ({"names": ("a", "c")}, r"tells \['a', 'b'\] apart and .* \['a', 'c'\]: compare runs on the same classes"),
    ],
)
def test_runs_on_other_samples_are_refused(tmp_path, changes, message):
    labels, p = binary_case(40)
    first = write_run(tmp_path / "a", labels, p)
    second = write_run(tmp_path / "b", labels, p, **changes)
    with pytest.raises(RunError, match=message):
        compare(first, second)


def test_a_run_that_was_not_evaluated_is_refused(tmp_path):
    labels, p = binary_case(40)
    folder = write_run(tmp_path / "a", labels, p)
    (folder / "predictions.csv").unlink()
    with pytest.raises(RunError, match=r"no predictions at .*predictions.csv': run `pipeline evaluate`"):
        compare(folder, folder)


def test_several_labels_are_read_back_whatever_their_names(tmp_path):
    names = ("a|b", "c", "d")
    labels = np.random.default_rng(0).integers(0, 2, (30, 3))
    p = np.random.default_rng(1).random((30, 3))
    read = read_predictions(write_run(tmp_path / "a", labels.tolist(), p, names=names, task="multilabel"))
    assert np.array_equal(read.labels, labels)
    assert np.array_equal(read.probabilities, p)
