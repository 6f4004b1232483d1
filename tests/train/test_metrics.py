"""Scores against scikit-learn, MedMNIST's conventions and figures computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.metrics import binary_auc, check_labels, macro_auc, one_hot, roc_curve, score


def random_case(seed, n=60, classes=4, ties=True):
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    p = random.dirichlet(np.ones(classes), n)
    return labels, np.round(p, 1) if ties else p


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans(), classes=st.integers(2, 5))
def test_scores_agree_with_scikit_learn(seed, ties, classes):
    labels, p = random_case(seed, classes=classes, ties=ties)
    names = tuple("abcde"[:classes])
    ours = score("multiclass", labels, p, names)
    hits = one_hot("multiclass", labels, classes)
    each = [sklearn.metrics.roc_auc_score(hits[:, k], p[:, k]) for k in range(classes)]
    assert ours["auc"] == pytest.approx(np.mean(each), abs=1e-12)
    assert list(ours["class_auc"].values()) == pytest.approx(each, abs=1e-12)
    predicted = p.argmax(axis=1)
    assert ours["acc"] == sklearn.metrics.accuracy_score(labels, predicted)
    assert ours["balanced_acc"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert ours["confusion"] == sklearn.metrics.confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    for k, name in enumerate(names):
        table = sklearn.metrics.confusion_matrix(labels == k, predicted == k, labels=[False, True])
        assert ours["sensitivity"][name] == pytest.approx(table[1, 1] / table[1].sum())
        assert ours["specificity"][name] == pytest.approx(table[0, 0] / table[0].sum())


def test_auc_is_the_chance_that_a_hit_outscores_a_miss():
    # hits score 3 and 1, misses 2, 1, 0: of six pairs, hits win 3 + 1, tie once
    assert binary_auc(np.array([1, 1, 0, 0, 0], bool), np.array([3.0, 1, 2, 1, 0])) == pytest.approx(4.5 / 6)


def test_two_classes_have_one_auc():
    labels, p = random_case(3, classes=2, ties=False)
    assert macro_auc("binary", labels, p) == pytest.approx(sklearn.metrics.roc_auc_score(labels, p[:, 1]), abs=1e-12)


def test_several_labels_are_scored_each_for_itself():
    random = np.random.default_rng(0)
    labels, p = random.integers(0, 2, (40, 3)), random.random((40, 3))
    ours = score("multilabel", labels, p, ("a", "b", "c"))
    assert ours["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, p, average="macro"), abs=1e-12)
    assert ours["acc"] == pytest.approx(((p >= 0.5) == labels).mean())
    assert "confusion" not in ours


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_roc_curve_has_every_point_and_the_area(seed):
    labels, p = random_case(seed, classes=2)
    x, y, thresholds = roc_curve(labels == 1, p[:, 1])
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(binary_auc(labels == 1, p[:, 1]))
    for at in range(1, len(x)):
        called = p[:, 1] >= thresholds[at]
        assert y[at] == pytest.approx(called[labels == 1].mean())
        assert x[at] == pytest.approx(called[labels == 0].mean())


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
