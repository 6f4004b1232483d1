"""Repair: exactly the damaged rows are encoded again, and the result has the original bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cache
from tests.cache.making import FORMATS, NUMBER_OF, ROWS_PER_SHARD, build, files, rows, write
from tests.cache.test_damage import (
    WANTED,
    damage_row,
    delete,
    duplicate_shard,
    extend,
    flip,
    overwrite,
    restore,
    stray_shard,
    swap_shards,
    truncate,
)


def repair(path: Path) -> set[int]:
    """Repair a store; returns the numbers of the images that were encoded for it."""
    encoded: set[int] = set()
    with cache.repair_store(path) as writer:
        for plan in writer.pending:
            encoded |= {NUMBER_OF[writer.rows[i].digest] for i in plan.rows}
            write(writer, plan, writer.rows)
        writer.commit()
    return encoded


@pytest.mark.parametrize("suffix", FORMATS)
def test_exactly_the_damaged_rows_are_encoded_again(suffix: str, tmp_path: Path) -> None:
    path = build(tmp_path / f"store.{suffix}", WANTED)[0].path
    sound = files(path)
    damage_row(path, 2)
    damage_row(path, 9, "block:31")
    assert repair(path) == {2, 9}
    assert files(path) == sound
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_damage_is_repaired_to_the_original_bytes(suffix: str, tmp_path: Path) -> None:
    path = build(tmp_path / f"store.{suffix}", WANTED)[0].path
    sound = files(path)
    dice = random.Random(suffix)
    kinds = [flip, flip, overwrite]
    if suffix == "zarr":
        kinds += [flip, truncate, extend, delete, swap_shards, duplicate_shard, stray_shard]
    for number in range(60):
        what = kinds[number % len(kinds)](path, dice)
        damaged = {i for found in cache.verify(path) for i in found.slots}
        encoded = repair(path)
        assert encoded <= damaged, what
        assert files(path) == sound, what
        restore(path, sound)


def test_damaged_metadata_cost_no_encoding(tmp_path: Path) -> None:
    path = build(tmp_path / "store.zarr", WANTED)[0].path
    sound = files(path)
    for name in ("zarr.json", "neck/zarr.json", "index/slot/c.0", "index/crc32c/neck/c.0", "index/spare/c.0"):
        for damage in (b"", sound[name][:-9], sound[name].replace(b"1", b"2")):
            (path / name).write_bytes(damage)
            assert repair(path) == set()
            assert files(path) == sound


def test_what_cannot_be_repaired_says_what_is_left_to_do(tmp_path: Path) -> None:
    path = build(tmp_path / "store.zarr", WANTED)[0].path
    (path / "zarr.json").unlink()
    (path / "index" / "spare" / "c.0").unlink()
    with pytest.raises(cache.FormatError, match="extract the store again"):
        cache.repair_store(path)
    with pytest.raises(cache.StoreNotFoundError):
        cache.repair_store(tmp_path / "other.zarr")


def test_a_sound_store_needs_no_repair(tmp_path: Path) -> None:
    path = build(tmp_path / "store.zarr", WANTED)[0].path
    inode = path.stat().st_ino
    assert repair(path) == set()
    assert path.stat().st_ino == inode


def test_repair_shares_the_sound_shards_and_keeps_dead_rows(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    build(path, rows(range(5 * ROWS_PER_SHARD)))
    build(path, rows(range(1, 5 * ROWS_PER_SHARD)))
    sound, inode = files(path), (path / "neck" / "c.0.0.0.0").stat().st_ino
    damage_row(path, 13)
    assert repair(path) == {13}
    assert files(path) == sound
    assert (path / "neck" / "c.0.0.0.0").stat().st_ino == inode


def test_a_damaged_dead_row_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    build(path, rows(range(8)))
    build(path, rows(range(1, 8)))
    damage_row(path, 0)
    assert cache.verify(path)[0].ids == ()
    assert repair(path) == set()
    assert cache.verify(path) == ()
    assert cache.open_store(path).ids == tuple(row.id for row in rows(range(1, 8)))


def test_rows_set_aside_survive_a_repair(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    wanted = rows(range(6))
    with cache.create_store(
        path,
        fingerprint=cache.Fingerprint({"encoder": "fake"}),
        taps={"neck": cache.TapSpec(4, 3, 3, "float16")},
        rows=wanted,
    ) as writer:
        write(writer, writer.pending[0], wanted, {"neck": cache.TapSpec(4, 3, 3, "float16")}, set_aside={3: "bad"})
        writer.commit()
    sound = files(path)
    (path / "neck" / "zarr.json").unlink()
    assert repair(path) == set()
    assert files(path) == sound
