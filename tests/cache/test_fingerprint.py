"""Equality and differences of fingerprints."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cache

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
)
names = st.text(max_size=3)
values = st.recursive(leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(names, t, max_size=3), max_leaves=6)
trees = st.dictionaries(names, values, max_size=4)


@given(trees)
def test_a_fingerprint_equals_itself_in_any_order_of_keys(tree: dict[str, Any]) -> None:
    one, other = cache.Fingerprint(tree), cache.Fingerprint(dict(reversed(tree.items())))
    assert one.digest() == other.digest()
    assert one == other
    assert hash(one) == hash(other)
    assert one.differences(other) == ()


@given(trees, trees)
def test_different_digests_mean_named_differences(left: dict[str, Any], right: dict[str, Any]) -> None:
    one, other = cache.Fingerprint(left), cache.Fingerprint(right)
    if one.digest() == other.digest():
        assert one.differences(other) == ()


def test_differences_are_leaves_with_both_values() -> None:
    ours = cache.Fingerprint({"encoder": "a", "taps": {"neck": {"pool": 4}}, "only": 1, "mean": (1.0, 2.0)})
    theirs = cache.Fingerprint({"encoder": "b", "taps": {"neck": {"pool": 2}}, "mean": [1.0, 2.0]})
    assert ours.differences(theirs) == (
        cache.Difference("encoder", "a", "b"),
        cache.Difference("only", 1, "(absent)"),
        cache.Difference("taps.neck.pool", 4, 2),
    )


def test_truth_and_one_are_different() -> None:
    assert cache.Fingerprint({"a": True}).differences(cache.Fingerprint({"a": 1}))


def test_a_later_change_of_the_argument_does_not_reach_it() -> None:
    fields = {"taps": {"neck": 1}}
    fingerprint = cache.Fingerprint(fields)
    fields["taps"]["neck"] = 2
    assert fingerprint.fields == {"taps": {"neck": 1}}


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": b"bytes"}, {1: "key"}, {"a": {2: 3}}, {"a": {1, 2}}])
def test_what_is_no_json_is_refused(bad: Any) -> None:
    with pytest.raises(cache.StoreError, match="cannot be written as JSON"):
        cache.Fingerprint(bad)
