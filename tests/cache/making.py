"""Small stores of known content: the feature of image number n is a function of n alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cache

TAPS = {"neck": cache.TapSpec(4, 3, 3, "float16"), "block:31": cache.TapSpec(2, 2, 3, "float32")}
FINGERPRINT = cache.Fingerprint({"encoder": "fake", "weights_sha256": "00", "taps": {"neck": {"pool": 1}}})
ROWS_PER_SHARD = 4
SHARD_MIB = ROWS_PER_SHARD * max(tap.row_bytes for tap in TAPS.values()) / 2**20
FORMATS = ("zarr", "h5")


def row(number: int, name: str | None = None) -> cache.Row:
    return cache.Row(name or f"image-{number}.png", hashlib.sha256(b"%d" % number).digest())


def rows(numbers: Iterable[int]) -> list[cache.Row]:
    return [row(number) for number in numbers]


def feature(number: int, taps: Mapping[str, cache.TapSpec] = TAPS) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(number)

    def draw(tap: cache.TapSpec) -> np.ndarray[Any, Any]:
        if tap.dtype == "uint8":
            return random.integers(0, 256, tap.shape, np.uint8)
        return random.standard_normal(tap.shape).astype(tap.numbers)

    return {name: draw(tap) for name, tap in taps.items()}


def extent(number: int) -> tuple[float, float]:
    return (1.0, 1 / (1 + number % 7))


def write(
    writer: cache.StoreWriter,
    plan: cache.ShardPlan,
    wanted: Sequence[cache.Row],
    taps: Mapping[str, cache.TapSpec] = TAPS,
    **kwargs: Any,
) -> None:
    """Encode the rows of one shard, each from the pixels that its digest names."""
    numbers = [NUMBER_OF[wanted[i].digest] for i in plan.rows]
    features = [feature(number, taps) for number in numbers]
    stacked = {name: np.stack([found[name] for found in features]) for name in taps}
    writer.write(plan, stacked, np.array([extent(number) for number in numbers], np.float32), **kwargs)


NUMBER_OF = {row(number).digest: number for number in range(5000)}


def begin(path: Path, wanted: Sequence[cache.Row], **kwargs: Any) -> cache.StoreWriter:
    settings = {"fingerprint": FINGERPRINT, "taps": TAPS, "shard_mib": SHARD_MIB, "provenance": {"made": "in a test"}}
    return cache.create_store(path, rows=wanted, **{**settings, **kwargs})


def build(path: Path, wanted: Sequence[cache.Row], **kwargs: Any) -> tuple[cache.Store, list[int]]:
    """A finished store, and the indices of the rows that were encoded for it."""
    encoded: list[int] = []
    with begin(path, wanted, **kwargs) as writer:
        for plan in writer.pending:
            encoded += plan.rows
            write(writer, plan, wanted, kwargs.get("taps", TAPS))
        return writer.commit(), encoded


def assert_holds(store: cache.Store, wanted: Sequence[cache.Row], taps: Mapping[str, cache.TapSpec] = TAPS) -> None:
    """The store reads as one made from scratch of these rows."""
    assert store.ids == tuple(row.id for row in wanted)
    assert store.digests.tolist() == [list(row.digest) for row in wanted]
    numbers = [NUMBER_OF[row.digest] for row in wanted]
    np.testing.assert_array_equal(store.extents, np.array([extent(number) for number in numbers], np.float32))
    read = store.read(range(len(wanted)))
    for i, number in enumerate(numbers):
        for name, value in feature(number, taps).items():
            assert read[name][i].tobytes() == cache.Roundings(taps[name].dtype).apply(value[None]).tobytes()


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store with its content."""
    if path.is_file():
        return {".": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
