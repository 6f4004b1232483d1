"""Parts of a training set: nested, class by class, groups whole, and only names decide."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.splits import few_shots, stratified_part
from pipeline.errors import DataError

FRACTIONS = (0.01, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0)
SHOTS = (1, 2, 4, 8, 16)
NAMES = ("benign", "malignant", "normal", "unclear")
Pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=80)


def part(pairs, fraction, seed=0):
    return stratified_part([k for k, _ in pairs], [f"p{g}" for _, g in pairs], fraction=fraction, seed=seed)


@given(Pairs, st.integers(0, 5))
def test_parts_are_nested_keep_groups_whole_and_lose_no_class(pairs, seed):
    drawn = [part(pairs, fraction, seed) for fraction in FRACTIONS]
    for smaller, larger in itertools.pairwise(drawn):
        assert all(b for a, b in zip(smaller, larger, strict=True) if a)
    assert all(drawn[-1])
    for chosen in drawn:
        whole = {}
        for (_, group), taken in zip(pairs, chosen, strict=True):
            assert whole.setdefault(group, taken) == taken
    of_one_class = [(k, 100 * k + g) for k, g in pairs]
    kept = {k for (k, _), taken in zip(of_one_class, part(of_one_class, 0.01, seed), strict=True) if taken}
    assert kept == {k for k, _ in pairs}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.sampled_from(FRACTIONS))
def test_without_groups_a_class_has_its_share_to_the_nearest_sample(labels, fraction):
    chosen = stratified_part(labels, [str(i) for i in range(len(labels))], fraction=fraction, seed=0)
    found = Counter(label for label, taken in zip(labels, chosen, strict=True) if taken)
    for label, total in Counter(labels).items():
        assert found[label] == 1 or abs(found[label] - fraction * total) <= 0.5


def test_patients_of_one_to_three_images_come_close_to_the_share():
    rng = random.Random(0)
    labels, groups = [], []
    for patient in range(300):
        images = rng.randint(1, 3)
        labels += [patient % 3] * images
        groups += [f"p{patient}"] * images
    for fraction in FRACTIONS:
        chosen = stratified_part(labels, groups, fraction=fraction, seed=1)
        found = Counter(label for label, taken in zip(labels, chosen, strict=True) if taken)
        for label, total in Counter(labels).items():
            assert abs(found[label] - fraction * total) <= 2.5


@given(Pairs, st.randoms())
def test_the_order_of_the_samples_plays_no_part(pairs, order):
    chosen = {pair for pair, taken in zip(pairs, part(pairs, 0.4), strict=True) if taken}
    shuffled = pairs.copy()
    order.shuffle(shuffled)
    assert {pair for pair, taken in zip(shuffled, part(shuffled, 0.4), strict=True) if taken} == chosen


def test_another_seed_draws_another_part_of_the_same_size():
    pairs = [(i % 2, i) for i in range(100)]
    first, second = part(pairs, 0.3, seed=0), part(pairs, 0.3, seed=1)
    assert first != second
    assert sum(first) == sum(second) == 30


def test_rare_findings_are_drawn_for_themselves():
    labels = [(1, 0)] * 90 + [(1, 1)] * 10
    chosen = stratified_part(labels, [str(i) for i in range(100)], fraction=0.1, seed=3)
    assert sum(chosen[:90]) == 9
    assert sum(chosen[90:]) == 1


@pytest.mark.parametrize("fraction", [0, -0.5, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(fraction):
    with pytest.raises(DataError, match="it must be above 0 and at most 1"):
        stratified_part([0], ["a"], fraction=fraction, seed=0)


def shots_of(pairs, shots, seed=0, classes=4):
    labels, groups = [k for k, _ in pairs], [f"p{g}" for _, g in pairs]
    return few_shots(labels, groups, NAMES[:classes], shots=shots, seed=seed)


@given(Pairs, st.integers(0, 5))
def test_few_shots_are_nested_and_keep_groups_whole(pairs, seed):
    pairs = pairs + [(k, 100 + 20 * k + i) for k in range(4) for i in range(16)]
    drawn = [shots_of(pairs, shots, seed) for shots in SHOTS]
    for smaller, larger in itertools.pairwise(drawn):
        assert all(b for a, b in zip(smaller, larger, strict=True) if a)
    for chosen in drawn:
        whole = {}
        for (_, group), taken in zip(pairs, chosen, strict=True):
            assert whole.setdefault(group, taken) == taken


@pytest.mark.parametrize("shots", SHOTS)
def test_without_groups_every_class_has_exactly_so_many_however_rare_it_is(shots):
    pairs = [(k, 1000 * k + i) for k, size in enumerate((300, 100, 40, 16)) for i in range(size)]
    chosen = shots_of(pairs, shots)
    assert Counter(k for (k, _), taken in zip(pairs, chosen, strict=True) if taken) == dict.fromkeys(range(4), shots)
    assert shots_of(pairs, shots, seed=1) != chosen


def test_patients_of_one_to_three_images_come_within_half_a_patient():
    rng = random.Random(0)
    pairs = [(patient % 3, patient) for patient in range(300) for _ in range(rng.randint(1, 3))]
    for shots in SHOTS:
        for seed in range(5):
            chosen = shots_of(pairs, shots, seed, classes=3)
            found = Counter(k for (k, _), taken in zip(pairs, chosen, strict=True) if taken)
            assert all(abs(found[k] - shots) <= (1.5 if shots > 1 else 2) and found[k] for k in range(3))


def test_few_shots_are_the_first_of_a_share_of_the_same_seed():
    pairs = [(i % 2, i) for i in range(100)]
    few, many = shots_of(pairs, 4, classes=2), part(pairs, 0.1)
    assert sum(few) == 8
    assert all(b for a, b in zip(few, many, strict=True) if a)


@given(Pairs, st.randoms())
def test_few_shots_do_not_depend_on_the_order_of_the_samples(pairs, order):
    pairs = pairs + [(k, 100 + k) for k in range(4)]
    chosen = {pair for pair, taken in zip(pairs, shots_of(pairs, 1), strict=True) if taken}
    shuffled = pairs.copy()
    order.shuffle(shuffled)
    assert {pair for pair, taken in zip(shuffled, shots_of(shuffled, 1), strict=True) if taken} == chosen


def test_every_label_has_its_shots_and_so_have_samples_without_any():
    labels = [(0, 0)] * 50 + [(1, 0)] * 30 + [(1, 1)] * 10 + [(0, 1)] * 10
    chosen = few_shots(labels, [str(i) for i in range(100)], ("a", "b"), shots=8, seed=2)
    taken = [label for label, is_taken in zip(labels, chosen, strict=True) if is_taken]
    assert taken.count((0, 0)) == 8
    assert 8 <= sum(label[0] for label in taken) <= 16
    assert 8 <= sum(label[1] for label in taken) <= 16


def test_more_shots_than_there_are_of_a_class_are_refused_with_the_classes():
    pairs = [(0, i) for i in range(20)] + [(1, 100 + i) for i in range(3)]
    said = r"shots is 4, and of some classes there are fewer images to train on: 'malignant' has 3; choose at most 3"
    with pytest.raises(DataError, match=said):
        shots_of(pairs, 4, classes=2)
