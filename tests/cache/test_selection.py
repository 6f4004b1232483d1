"""`store[...]`: every kind of key against the same features read row by row, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache
from tests.cache.making import FORMATS, TAPS, build, feature, rows

COUNT = 11


@pytest.fixture(scope="module", params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> cache.Store:
    return build(tmp_path_factory.mktemp("selection") / f"store.{request.param}", rows(range(COUNT)))[0]


def name(number: int) -> str:
    return f"image-{number}.png"


MANY: list[tuple[Any, list[int]]] = [
    ([0, 5, 3], [0, 5, 3]),
    ([-1, 2, 2, -11], [10, 2, 2, 0]),
    ((4,), [4]),
    (range(2, 9, 3), [2, 5, 8]),
    (np.array([7, 1], np.uint8), [7, 1]),
    (slice(3), [0, 1, 2]),
    (slice(None, None, -4), [10, 6, 2]),
    (slice(8, 99), [8, 9, 10]),
    (np.arange(COUNT) % 5 == 1, [1, 6]),
    ([number == 4 for number in range(COUNT)], [4]),
    ([name(9), name(0)], [9, 0]),
    (np.array([name(2)]), [2]),
    ([], []),
    (np.zeros(COUNT, bool), []),
]


@pytest.mark.parametrize(("key", "numbers"), MANY, ids=lambda value: str(value)[:40])
def test_several_rows_are_stacked(store: cache.Store, key: Any, numbers: list[int]) -> None:
    found = store[key]
    assert list(found) == list(TAPS)
    for tap, spec in TAPS.items():
        assert found[tap].dtype == spec.dtype
        wanted = [feature(number)[tap] for number in numbers]
        np.testing.assert_array_equal(found[tap], np.stack(wanted) if wanted else np.empty((0, *spec.shape)))


@pytest.mark.parametrize(("key", "number"), [(3, 3), (-1, 10), (np.int32(6), 6), (name(7), 7), (np.str_(name(7)), 7)])
def test_one_row_has_no_axis_for_rows(store: cache.Store, key: Any, number: int) -> None:
    for tap, values in store[key].items():
        np.testing.assert_array_equal(values, feature(number)[tap])
        assert values.shape == TAPS[tap].shape


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (COUNT, "there is no row 11; the store has rows 0 to 10"),
        (-12, "no row -12"),
        ([0, 99], "no row 99"),
        ("image-77.png", "did you mean 'image-7.png'?"),
        (["image-1.png", "x"], "no sample 'x' in the store; `store.ids` lists"),
        (np.ones(3, bool), "11 booleans, or ids, and not by 3 booleans"),
        (True, "and not by bool True"),
        (1.5, "and not by float 1.5"),
        ([0.0], "float64 of shape"),
        ([[0, 1]], r"int64 of shape \(1, 2\)"),
        ([0, "image-1.png"], "no sample '0'"),
        (None, "NoneType None"),
        ((slice(2), "neck"), "not by tuple"),
    ],
    ids=str,
)
def test_what_names_no_row_is_refused(store: cache.Store, key: Any, said: str) -> None:
    with pytest.raises(cache.NoSuchRowError, match=said) as caught:
        store[key]
    assert isinstance(caught.value, IndexError)
    assert isinstance(caught.value, cache.StoreError)


def test_a_walk_over_a_store_ends_where_it_does(store: cache.Store) -> None:
    walked = list(store)  # by numbers until there is none, as Python does
    assert len(walked) == COUNT
    np.testing.assert_array_equal(walked[4]["neck"], feature(4)["neck"])


def test_a_store_knows_its_samples(store: cache.Store) -> None:
    assert name(3) in store
    assert "elsewhere.png" not in store
    assert name(3) in pickle.loads(pickle.dumps(store))


def test_damage_is_noticed_by_an_index_too(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", rows(range(COUNT)))
    store.close()
    shard = tmp_path / "store.zarr/neck/c.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(cache.DamagedRowError, match=r"image-0\.png"):
        store[0]
    assert store[1]["neck"].shape == TAPS["neck"].shape


def test_a_store_shows_what_it_holds(tmp_path: Path) -> None:
    labels = cache.Labels(("benign", "=evil\x1b[2J"), (0, 1, 0), ("train", "train", "test"))
    store, _ = build(tmp_path / "store.h5", rows(range(3)), labels=labels)
    assert repr(store).splitlines() == [
        f"Store({str(tmp_path / 'store.h5')!r}): 3 rows, 360 bytes uncompressed",
        "  encoder   'fake'",
        "  neck      (4, 3, 3) float16",
        "  block:31  (2, 2, 3) float32",
        "  ids       'image-0.png', 'image-1.png', ...",
        r"  labels    'benign', '=evil\x1b[2J'; train 2, test 1",
    ]


def test_a_store_that_is_gone_shows_that(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.h5", rows(range(3)))
    assert "labels    none travel with it" in repr(store)
    store.close()
    (tmp_path / "store.h5").unlink()
    assert "cannot be read: 'there is no store at" in repr(store)
