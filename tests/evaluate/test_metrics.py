"""Scores against scikit-learn, MedMNIST's conventions and figures computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from medmnist.evaluator import getACC, getAUC

from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.intervals import proportion
from pipeline.evaluate.intervals import reliability as reliability_with_intervals
from pipeline.evaluate.metrics import (
    BINS,
    Scorer,
    check_labels,
    one_hot,
    precision_recall,
    predictions,
    reliability,
    roc_curve,
    score,
)
from pipeline.evaluate.operating import POINTS, PointScorer, choose_threshold, read_point

CASES = {"seed": st.integers(0, 10_000), "ties": st.booleans(), "classes": st.integers(2, 5)}


def random_case(seed, n=60, classes=4, ties=True):
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    p = random.dirichlet(np.ones(classes), n)
    return labels, np.round(p, 1) if ties else p


@settings(max_examples=50, deadline=None)
@given(**CASES)
def test_scores_agree_with_scikit_learn(seed, ties, classes):
    labels, p = random_case(seed, classes=classes, ties=ties)
    names = tuple("abcde"[:classes])
    ours = score("ordinal", labels, p, names)
    hits = one_hot("ordinal", labels, classes)
    predicted = p.argmax(axis=1)
    for k, name in enumerate(names):
        assert ours["class_auc"][name] == pytest.approx(reference.roc_auc_score(hits[:, k], p[:, k]), abs=1e-12)
        expected = reference.average_precision_score(hits[:, k], p[:, k])
        assert ours["class_ap"][name] == pytest.approx(expected, abs=1e-12)
        table = reference.confusion_matrix(labels == k, predicted == k, labels=[False, True])
        assert ours["sensitivity"][name] == pytest.approx(table[1, 1] / table[1].sum(), abs=1e-12)
        assert ours["specificity"][name] == pytest.approx(table[0, 0] / table[0].sum(), abs=1e-12)
    assert ours["auc"] == pytest.approx(np.mean(list(ours["class_auc"].values())), abs=1e-12)
    assert ours["ap"] == pytest.approx(np.mean(list(ours["class_ap"].values())), abs=1e-12)
    assert ours["acc"] == reference.accuracy_score(labels, predicted)
    assert ours["balanced_acc"] == pytest.approx(reference.balanced_accuracy_score(labels, predicted), abs=1e-12)
    f1 = reference.f1_score(labels, predicted, average="macro", labels=range(classes), zero_division=0)
    assert ours["f1"] == pytest.approx(f1, abs=1e-12)
    kappa = reference.cohen_kappa_score(labels, predicted, weights="quadratic", labels=range(classes))
    assert ours["kappa"] == pytest.approx(kappa, abs=1e-12)
    assert ours["brier"] == pytest.approx(((p - hits) ** 2).sum(axis=1).mean(), abs=1e-12)
    assert ours["confusion"] == reference.confusion_matrix(labels, predicted, labels=range(classes)).tolist()


MEDMNIST = {
    "binary": "binary-class",
    "multiclass": "multi-class",
    "ordinal": "ordinal-regression",
    "multilabel": "multi-label, binary-class",
}


def hard_case(seed, task, kind, n=60):
    """Labels and probabilities that are sure to the last bit (`float32`: beyond it), tie, or lie at exactly a half."""
    random = np.random.default_rng(seed)
    classes = 2 if task == "binary" else 4
    if task == "multilabel":
        labels = np.concatenate([np.eye(4, dtype=int), 1 - np.eye(4, dtype=int), random.integers(0, 2, (n - 8, 4))])
    else:
        labels = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    logits = random.normal(0, 2, (n, classes)) + one_hot(task, labels, classes)
    logits *= 10 if kind in ("sure", "float32") else 1
    p = 1 / (1 + np.exp(-logits)) if task == "multilabel" else np.exp(logits - logits.max(axis=1, keepdims=True))
    p = p if task == "multilabel" else p / p.sum(axis=1, keepdims=True)
    if kind == "halves":
        p[::2] = 0.5 if classes == 2 or task == "multilabel" else [0.5, 0.5, 0, 0]
    return labels, {"float32": p.astype(np.float32).astype(np.float64), "ties": np.round(p, 1)}.get(kind, p)


@pytest.mark.parametrize("kind", ["plain", "sure", "float32", "ties", "halves"])
@pytest.mark.parametrize("task", MEDMNIST)
def test_auc_and_accuracy_are_those_of_medmnist_and_of_scikit_learn(task, kind):
    for seed in range(10):
        labels, p = hard_case(seed, task, kind)
        ours = score(task, labels, p, tuple("abcd"[: p.shape[1]]))
        assert ours["auc"] == pytest.approx(getAUC(labels, p, MEDMNIST[task]), abs=1e-12)
        assert ours["acc"] == pytest.approx(getACC(labels, p, MEDMNIST[task]), abs=1e-12)
        hits = one_hot(task, labels, p.shape[1])
        ranked = (hits[:, -1], p[:, -1]) if task == "binary" else (hits, p)
        assert ours["auc"] == pytest.approx(reference.roc_auc_score(*ranked, average="macro"), abs=1e-12)
        assert ours["ap"] == pytest.approx(reference.average_precision_score(*ranked, average="macro"), abs=1e-12)


def test_the_ties_of_a_first_class_that_is_all_but_sure_do_not_count():
    labels, p = np.array([0, 1, 0, 1]), np.array([1e-9, 3e-9, 2e-9, 4e-9])
    said = np.stack([np.float32(1 - p), p], axis=1)
    ours = score("binary", labels, said, ("no", "yes"))
    assert ours["class_auc"] == {"no": 0.5, "yes": 1.0}
    assert (ours["auc"], ours["ap"]) == (1.0, 1.0)
    drawn = Scorer("binary", labels, said)(np.array([[1.0, 2, 3, 4]]))
    assert (drawn["auc"].item(), drawn["ap"].item()) == (1.0, 1.0)


def test_exactly_a_half_is_a_no():
    p = np.array([[0.5, 0.5], [0.4, 0.6], [0.5, np.nextafter(0.5, 1)]])
    assert predictions("binary", p).tolist() == [0, 1, 1]
    assert predictions("multilabel", p).tolist() == [[0, 0], [0, 1], [0, 1]]
    assert predictions("ordinal", p[:, ::-1]).tolist() == [0, 0, 0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), task=st.sampled_from(["binary", "multiclass", "ordinal", "multilabel"]))
def test_weighing_samples_is_repeating_them(seed, task):
    random = np.random.default_rng(seed)
    classes = 2 if task == "binary" else 3
    labels, p = random_case(seed, n=30, classes=classes)
    if task == "multilabel":
        labels = np.concatenate([np.zeros((2, 3), int), np.ones((2, 3), int), random.integers(0, 2, (26, 3))])
    counts = random.integers(0, 4, 30)
    counts[:4] += 1  # of each class at least one
    weighed = Scorer(task, labels, p)(counts[None].astype(float))
    again = np.repeat(np.arange(30), counts)
    repeated = Scorer(task, labels[again], p[again])(np.ones((1, len(again))))
    assert weighed.keys() == repeated.keys()
    for name, value in weighed.items():
        np.testing.assert_allclose(value, repeated[name], atol=1e-12, err_msg=name)


def test_a_class_that_a_weighting_leaves_empty_is_not_defined():
    labels, p = np.array([0, 0, 1, 2]), np.eye(3)[[0, 1, 1, 2]]
    scores = Scorer("multiclass", labels, p)(np.array([[1.0, 1, 1, 0], [1, 1, 1, 1]]))
    assert np.isnan(scores["class_auc"][0, 2])
    for name in ("auc", "ap", "balanced_acc", "f1"):
        assert np.isnan(scores[name][0]), name
    assert np.isfinite(scores["class_auc"][0, :2]).all()
    for name in ("auc", "ap", "balanced_acc", "f1"):
        assert np.isfinite(scores[name][1]), name


def test_auc_is_the_chance_that_a_hit_outscores_a_miss():
    # hits score 3 and 1, misses 2, 1, 0: of six pairs, hits win 3 + 1, tie once
    p = np.array([3.0, 1, 2, 1, 0])
    ours = score("binary", np.array([1, 1, 0, 0, 0]), np.stack([-p, p], axis=1), ("miss", "hit"))
    assert ours["class_auc"] == {"miss": pytest.approx(4.5 / 6), "hit": pytest.approx(4.5 / 6)}
    assert ours["auc"] == pytest.approx(4.5 / 6)


def test_two_classes_are_scored_as_scikit_learn_scores_a_binary_task():
    labels, p = random_case(3, classes=2, ties=False)
    ours = score("binary", labels, p, ("a", "b"))
    assert ours["auc"] == pytest.approx(reference.roc_auc_score(labels, p[:, 1]), abs=1e-12)
    assert ours["brier"] == pytest.approx(reference.brier_score_loss(labels, p[:, 1]), abs=1e-12)
    assert "kappa" not in ours


def test_several_labels_are_scored_each_for_itself():
    random = np.random.default_rng(0)
    labels, p = random.integers(0, 2, (40, 3)), random.random((40, 3))
    ours = score("multilabel", labels, p, ("a", "b", "c"))
    assert ours["auc"] == pytest.approx(reference.roc_auc_score(labels, p, average="macro"), abs=1e-12)
    assert ours["acc"] == pytest.approx(((p > 0.5) == labels).mean())
    assert ours["f1"] == pytest.approx(reference.f1_score(labels, p > 0.5, average="macro"))
    assert ours["brier"] == pytest.approx(((p - labels) ** 2).mean())
    assert "confusion" not in ours


def test_calibration_is_the_gap_between_confidence_and_truth_by_hand():
    # steps of 1/15: .9 twice (once right), .6 once (right), and a sure one (right)
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.0, 1.0]])
    labels = np.array([0, 0, 0, 1])
    assert BINS == 15
    assert score("binary", labels, p, ("a", "b"))["ece"] == pytest.approx((2 * 0.4 + 0.4 + 0) / 4)
    assert reliability("binary", labels, p) == [
        {"confidence": pytest.approx(0.6), "accuracy": 1.0, "count": 1},
        {"confidence": pytest.approx(0.9), "accuracy": 0.5, "count": 2},
        {"confidence": 1.0, "accuracy": 1.0, "count": 1},
    ]


def test_a_class_that_is_never_called_has_an_f1_of_zero():
    labels, p = np.array([0, 0, 1, 2]), np.eye(3)[[0, 0, 1, 1]]
    expected = reference.f1_score(labels, p.argmax(axis=1), average="macro", zero_division=0)
    assert score("multiclass", labels, p, ("a", "b", "c"))["f1"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", MEDMNIST)
def test_each_step_of_confidence_has_the_interval_of_its_own_decisions(task):
    labels, p = hard_case(1, task, "plain")
    groups = [f"g{i // 3}" for i in range(60)]
    rows = reliability_with_intervals(task, labels, p, groups)
    assert [{key: row[key] for key in ("confidence", "accuracy", "count")} for row in rows] == reliability(
        task, labels, p
    )
    right, made = (np.zeros((60, BINS + 1)) for _ in range(2))
    for i in range(60):  # one decision after the other
        one_by_one = reliability(task, labels[i : i + 1], p[i : i + 1])
        for row in one_by_one:
            step = int(np.ceil(row["confidence"] * BINS))
            made[i, step] += row["count"]
            right[i, step] += row["accuracy"] * row["count"]
    for row in rows:
        step = int(np.ceil(row["confidence"] * BINS))
        assert (row["low"], row["high"]) == pytest.approx(proportion(right[:, step], made[:, step], groups))
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["low"] < row["high"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_curves_have_every_point_and_their_areas(seed):
    labels, p = random_case(seed, classes=2)
    hits, scores = labels == 1, p[:, 1]
    x, y, thresholds = roc_curve(hits, scores)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(reference.roc_auc_score(hits, scores))
    for at in range(1, len(x)):
        called = scores >= thresholds[at]
        assert y[at] == pytest.approx(called[hits].mean())
        assert x[at] == pytest.approx(called[~hits].mean())
    recall, precision, thresholds = precision_recall(hits, scores)
    assert (np.diff(recall, prepend=0) * precision).sum() == pytest.approx(
        reference.average_precision_score(hits, scores)
    )
    for at, threshold in enumerate(thresholds):
        assert precision[at] == pytest.approx(hits[scores >= threshold].mean())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), wanted=st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_operating_points_reach_what_they_promise_at_the_least_cost(seed, wanted):
    labels, p = random_case(seed, classes=2)
    hits, scores = labels == 1, p[:, 1]

    def reached(threshold):
        called = scores >= threshold
        return called[hits].mean(), (~called)[~hits].mean()

    candidates = [*np.unique(scores), np.inf]
    at = choose_threshold(hits, scores, f"sensitivity={wanted}")
    assert reached(at)[0] >= wanted
    assert reached(at)[1] == max(reached(t)[1] for t in candidates if reached(t)[0] >= wanted)
    at = choose_threshold(hits, scores, f"specificity={wanted}")
    assert reached(at)[1] >= wanted
    assert reached(at)[0] == max(reached(t)[0] for t in candidates if reached(t)[1] >= wanted)
    at = choose_threshold(hits, scores, "youden")
    assert sum(reached(at)) == pytest.approx(max(sum(reached(t)) for t in candidates))
    both = PointScorer(hits[:, None], scores[:, None], [at])(np.ones((1, len(hits))))
    assert (both["sensitivity"].item(), both["specificity"].item()) == pytest.approx(reached(at))


def test_operating_points_are_read_as_they_are_written():
    assert [read_point(point) for point in (*POINTS, "sensitivity=1", "specificity=.5")] == [
        ("youden", 0),
        ("sensitivity", 0.95),
        ("specificity", 0.95),
        ("sensitivity", 1),
        ("specificity", 0.5),
    ]


@pytest.mark.parametrize(
    "point",
    [
        *("yuden", "youden=1", "", "sensitivity", "sensitivity=", "sensitivity=x", "specificity=95", "f1=0.9"),
        *("sensitivity=0.0", "sensitivity=1.5", "sensitivity=nan", "sensitivity=-0.9", "sensitivity= 0.9"),
    ],
)
def test_unknown_operating_points_are_refused(point):
    with pytest.raises(ConfigError, match=r"no operating point .*: write 'youden', 'sensitivity=0.95'"):
        choose_threshold(np.array([True, False]), np.array([0.2, 0.1]), point)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("binary", [], "Split 'val' has no samples"),
        ("binary", [1, 1], r"Split 'val' holds one class only \('b'\): AUC is not defined; put samples"),
        ("multiclass", [0, 1, 1], "Split 'val' holds no sample of 'c': AUC is not defined"),
        ("multilabel", [[1, 1], [0, 1]], "Split 'val' holds only samples of 'b'"),
    ],
)
def test_a_split_without_an_auc_is_refused(task, labels, message):
    names = ("a", "b", "c") if task == "multiclass" else ("a", "b")
    with pytest.raises(DataError, match=message):
        check_labels(task, np.array(labels, dtype=np.int64), names, "val")


def test_a_specificity_that_is_reached_exactly_counts_as_reached() -> None:
    """Seven false alarms of a hundred: 1 - .07 is less than .93 in floating point."""
    hits = np.array([0] * 100 + [1], bool)
    scores = np.arange(101) / 101
    called = scores >= choose_threshold(hits, scores, "specificity=0.93")
    assert called[:100].sum() == 7
