"""Intervals of shares: they hold what they promise, from 5 samples to 500, at 0 and 1, and where patients repeat."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluate.intervals import proportion


def names(sizes):
    return [f"g{group}" for group, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("n", [5, 9, 20, 50, 156, 500])
def test_samples_on_their_own_are_covered_whatever_the_share(n):
    groups = names([1] * n)
    ends = np.array([proportion(np.arange(n) < hits, np.ones(n), groups) for hits in range(n + 1)])
    for share in np.linspace(0, 1, 101):
        covered = (ends[:, 0] <= share) & (share <= ends[:, 1])
        chance = stats.binom.pmf(np.arange(n + 1), n, share)
        assert chance[covered].sum() >= 0.95 - 1e-9, share


def test_they_are_clopper_and_pearsons():
    for hits, n in ((0, 9), (9, 9), (3, 7), (41, 90)):
        expected = stats.binomtest(hits, n).proportion_ci(method="exact")
        np.testing.assert_allclose(proportion(np.arange(n) < hits, np.ones(n), names([1] * n)), expected, atol=1e-9)


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.95], ids=lambda alike: f"{alike:.2f} alike")
@pytest.mark.parametrize(("patients", "images"), [(10, 3), (30, 2), (60, 4)])
def test_patients_with_several_images_are_covered(patients, images, alike):
    random = np.random.default_rng(0)
    groups = names([images] * patients)
    for share in (0.03, 0.2, 0.5, 0.8, 0.97):
        covered = 0
        for _ in range(400):
            own = random.random((patients, 1)) < share  # what a patient's images have in common
            each = np.where(random.random((patients, images)) < alike, own, random.random((patients, images)) < share)
            low, high = proportion(each.ravel(), np.ones(patients * images), groups)
            covered += low <= share <= high
        assert covered / 400 >= 0.93, share


def test_nine_of_nine_are_no_certainty():
    low, high = proportion(np.ones(9), np.ones(9), names([1] * 9))
    assert (round(low, 3), high) == (0.664, 1.0)
    alike, _ = proportion(np.ones(9), np.ones(9), names([3, 3, 3]))
    assert round(alike, 3) == 0.292  # as three of three


def test_no_decision_is_no_knowledge():
    assert proportion(np.zeros(4), np.zeros(4), names([1] * 4)) == (0.0, 1.0)
