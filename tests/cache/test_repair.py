"""Repair: exactly the damaged rows are encoded again, and the result has the original bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cache
from tests.cache.making import FORMATS, NUMBER_OF, ROWS_PER_SHARD, TAPS, begin, build, feature, files, rows, write
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
from tests.cache.test_torn import Stop, stopped_at


def repair(path: Path, shards: int | None = None, encoded: set[int] | None = None) -> set[int]:
    """Repair a store; returns the numbers of the images that were encoded for it.

    Args:
        path: The store.
        shards: Leave it without a commit after so many.
        encoded: Gets the numbers too, shard by shard.
    """
    encoded = set() if encoded is None else encoded
    with cache.repair_store(path) as writer:
        for plan in writer.pending[:shards]:
            write(writer, plan, writer.rows)
            encoded |= {NUMBER_OF[writer.rows[i].digest] for i in plan.rows}
        if shards is None:
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


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_store_that_is_not_there_is_called_missing_and_nothing_is_left(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / f"store.{suffix}"
    missing = r"there is no store at \S+; check the path"
    with pytest.raises(cache.StoreNotFoundError, match=missing):
        cache.repair_store(path)
    assert not path.parent.exists()
    build(path, WANTED)
    damage_row(path, 2)
    repair(path, shards=1)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(cache.StoreNotFoundError, match=missing):
        cache.repair_store(path)
    assert not list(path.parent.iterdir())
    begin(path, WANTED).close()
    with pytest.raises(cache.StoreNotFoundError, match="one was begun"):
        cache.repair_store(path)


def damaged(path: Path) -> dict[str, bytes]:
    """Make a store of five shards and damage the first, second and fourth; returns its sound files."""
    build(path, rows(range(5 * ROWS_PER_SHARD)))
    sound = files(path)
    for number in (0, 5, 6, 14):
        damage_row(path, number)
    return sound


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_interrupted_repair_encodes_only_what_is_missing(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"store.{suffix}"
    sound = damaged(path)
    assert repair(path, shards=1) == {0}
    assert repair(path, shards=1) == {5, 6}
    with cache.repair_store(path) as writer:
        assert [plan.number for plan in writer.pending] == [3]
    assert repair(path) == {14}
    assert files(path) == sound
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_stop_of_a_repair_loses_nothing(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped at every third change of the file system, and what it had written is not encoded again."""
    path, copy = tmp_path / "work" / f"store.{suffix}", tmp_path / "copy"
    sound = damaged(path)
    shutil.copytree(path.parent, copy)
    with stopped_at(0, monkeypatch) as made:
        repair(path)
    for call in range(1, made[0] + 1, 3):
        shutil.rmtree(path.parent)
        shutil.copytree(copy, path.parent)
        written: set[int] = set()
        with stopped_at(call, monkeypatch), pytest.raises(Stop):
            repair(path, encoded=written)
        assert written.isdisjoint(repair(path)), f"stopped at change {call}"
        assert files(path) == sound, f"stopped at change {call}"
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("number", [1, 9, 15, 18])
def test_further_damage_after_an_interrupted_repair_is_repaired_too(suffix: str, number: int, tmp_path: Path) -> None:
    """In a shard that is written again already, one that was sound and is shared, one that is still to be written."""
    path = tmp_path / f"store.{suffix}"
    sound = damaged(path)
    repair(path, shards=2)
    damage_row(path, number)
    encoded = repair(path)
    assert encoded <= {0, 5, 6, 14, number}
    assert files(path) == sound
    assert cache.verify(path) == ()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_damage_behind_a_row_of_a_shared_shard_is_not_taken_over(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"store.{suffix}"
    sound = damaged(path)
    repair(path, shards=2)
    file = path / "neck" / "c.2.0.0.0" if suffix == "zarr" else path
    content = bytearray(file.read_bytes())
    content[content.find(feature(9)["neck"].tobytes()) + TAPS["neck"].row_bytes] ^= 1
    file.write_bytes(content)
    repair(path)
    assert files(path) == sound


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_repair_is_not_continued_in_another_version(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"store.{suffix}"
    damaged(path)
    repair(path, shards=2)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    build(path, wanted := rows(reversed(range(5 * ROWS_PER_SHARD))))
    sound = files(path)
    damage_row(path, 0)
    assert repair(path) == {0}
    assert files(path) == sound
    assert cache.open_store(path).ids == tuple(row.id for row in wanted)


SPOILS: list[Callable[[bytes], bytes]] = [
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: content[:9] + bytes(byte ^ 16 for byte in content[9:]),
]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["work/plan.json", "work/plan.npz", "work/shard-1.npz", "store/neck/c.1.0.0.0"])
def test_an_interrupted_repair_that_is_damaged_itself_starts_over(suffix: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"store.{suffix}"
    sound = damaged(path)
    hurt = files(path)
    for spoil in SPOILS:
        repair(path, shards=2)
        file = path.with_name(path.name + ".partial") / "repair" / name
        file.write_bytes(spoil(file.read_bytes()))
        assert repair(path) == {0, 5, 6, 14}
        assert files(path) == sound
        assert list(tmp_path.iterdir()) == [path]
        restore(path, hurt)


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
