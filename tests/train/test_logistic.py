"""scikit-learn's regression is the head that torch computes, for every kind of head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from pipeline.model.tasks import losses, probabilities
from pipeline.train.logistic import STRENGTHS, fit_path


def features_and_labels(count, size, classes, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = random.standard_normal((count, size))
    features[:, : min(classes, size)] += 0.8 * np.eye(classes)[labels][:, : min(classes, size)]
    return features, labels


def said_by(head, layer, features):
    weight, bias = (torch.from_numpy(part).float() for part in layer)
    return probabilities(head, F.linear(torch.from_numpy(features).float(), weight, bias).double()).numpy()


@pytest.mark.parametrize("size", [6, 90], ids=["few features", "more features than samples"])
@pytest.mark.parametrize("classes", [2, 4])
def test_classes_are_what_scikit_learn_says(size, classes):
    features, labels = features_and_labels(60, size, classes)
    for strength, layer in zip((0.01, 1.0), fit_path("softmax", features, labels, strengths=(0.01, 1.0)), strict=True):
        oracle = LogisticRegression(C=strength, max_iter=5000, tol=1e-9).fit(features, labels)
        said = said_by("softmax", layer, features)
        np.testing.assert_allclose(said, oracle.predict_proba(features), atol=2e-3)
        exact = F.linear(torch.from_numpy(features), *(torch.from_numpy(part) for part in layer)).softmax(1).numpy()
        np.testing.assert_allclose(said, exact, atol=1e-5)  # float32 in torch, float64 in scikit-learn


def test_each_label_is_a_regression_of_its_own():
    features, labels = features_and_labels(60, 5, 3)
    several = np.stack([labels == 0, labels != 1], axis=1).astype(np.int64)
    (layer,) = fit_path("sigmoid", features, several, strengths=(0.3,))
    said = said_by("sigmoid", layer, features)
    for k in range(2):
        oracle = LogisticRegression(C=0.3, tol=1e-9).fit(features, several[:, k])
        np.testing.assert_allclose(said[:, k], oracle.predict_proba(features)[:, 1], atol=2e-3)


def test_grades_are_steps_from_one_to_the_next():
    features, labels = features_and_labels(90, 5, 3)
    (layer,) = fit_path("continuation", features, labels, strengths=(0.3,))
    first = LogisticRegression(C=0.3, tol=1e-9).fit(features, labels > 0).predict_proba(features)[:, 1]
    reached = labels > 0
    second = LogisticRegression(C=0.3, tol=1e-9).fit(features[reached], labels[reached] > 1)
    further = second.predict_proba(features)[:, 1]
    expected = np.stack([1 - first, first * (1 - further), first * further], axis=1)
    np.testing.assert_allclose(said_by("continuation", layer, features), expected, atol=2e-3)


def test_the_fit_has_no_slope_left():
    features, labels = features_and_labels(40, 200, 3)
    (layer,) = fit_path("softmax", features, labels, strengths=(0.1,))
    weight, bias = (torch.from_numpy(part).requires_grad_() for part in layer)
    cost = losses("softmax", F.linear(torch.from_numpy(features), weight, bias), torch.from_numpy(labels)).sum()
    objective = 0.1 * cost + weight.square().sum() / 2
    slopes = torch.autograd.grad(objective, (weight, bias))
    assert max(slope.abs().max().item() for slope in slopes) < 0.02


def test_weighing_classes_moves_the_bias():
    features, labels = features_and_labels(60, 3, 2)
    rare = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:5]])
    (plain,) = fit_path("softmax", features[rare], labels[rare], strengths=(1.0,))
    (balanced,) = fit_path("softmax", features[rare], labels[rare], strengths=(1.0,), class_weights="balanced")
    oracle = LogisticRegression(C=1.0, class_weight="balanced", tol=1e-9).fit(features[rare], labels[rare])
    np.testing.assert_allclose(said_by("softmax", balanced, features), oracle.predict_proba(features), atol=2e-3)
    assert balanced[1][1] > plain[1][1] + 0.5


def test_strengths_go_from_strong_to_weak():
    assert list(STRENGTHS) == sorted(STRENGTHS)
    assert STRENGTHS[0] <= 1e-5
    assert STRENGTHS[-1] >= 10
