"""Nothing is silently wrong: every kind of damage is found by `verify`, and none is read as data."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import cache
from tests.cache.making import FORMATS, TAPS, build, extent, feature, files, row, rows

DAMAGES = 300
COUNT = 14
WANTED = [row(n % 11, f"image-{n}.png") for n in range(COUNT)]
"""Fourteen samples, three of them with the pixels of another."""


def flip(path: Path, dice: random.Random) -> str:
    file = _any_file(path, dice)
    content = bytearray(file.read_bytes())
    at = dice.randrange(len(content))
    content[at] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return f"flip in byte {at} of {file.name} in {file.parent.name}"


def truncate(path: Path, dice: random.Random) -> str:
    file = _any_file(path, dice)
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(len(content))])
    return f"truncation of {file}"


def extend(path: Path, dice: random.Random) -> str:
    file = _any_file(path, dice)
    file.write_bytes(file.read_bytes() + bytes(dice.randrange(1, 9)))
    return f"extension of {file}"


def overwrite(path: Path, dice: random.Random) -> str:
    """One stretch of a file in the place of another, as a lost or misdirected write leaves it."""
    file = _any_file(path, dice)
    content = bytearray(file.read_bytes())
    size = dice.randrange(1, 60)
    source, target = (dice.randrange(max(1, len(content) - size)) for _ in range(2))
    before = bytes(content)
    content[target : target + size] = content[source : source + size]
    if content == before:
        return flip(path, dice)
    file.write_bytes(content[: len(before)])
    return f"{size} bytes from {source} to {target} of {file}"


def delete(path: Path, dice: random.Random) -> str:
    file = _any_file(path, dice)
    file.unlink()
    return f"deletion of {file}"


def swap_shards(path: Path, dice: random.Random) -> str:
    one, other = _two_shards(path, dice)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"swap of {one} and {other}"


def duplicate_shard(path: Path, dice: random.Random) -> str:
    one, other = _two_shards(path, dice)
    other.write_bytes(one.read_bytes())
    return f"{other} is a copy of {one}"


def stray_shard(path: Path, dice: random.Random) -> str:
    one, _ = _two_shards(path, dice)
    stray = one.with_name(f"c.{dice.randrange(50, 60)}.0.0.0")
    stray.write_bytes(one.read_bytes())
    return f"{stray} is a copy of {one}"


def _any_file(path: Path, dice: random.Random) -> Path:
    return path if path.is_file() else dice.choice(sorted(file for file in path.rglob("*") if file.is_file()))


def _two_shards(path: Path, dice: random.Random) -> list[Path]:
    return dice.sample(sorted((path / dice.choice(list(TAPS))).glob("c.*")), 2)


ANYWHERE: list[Callable[[Path, random.Random], str]] = [flip, flip, flip, truncate, extend, overwrite, delete]
IN_FOLDERS = [swap_shards, duplicate_shard, stray_shard]


def read_or_refuse(path: Path) -> None:
    """Reading gives what was written or an error; never anything else."""
    try:
        store = cache.open_store(path)
        ids, extents = store.ids, store.extents
    except cache.StoreError:
        return
    assert ids == tuple(row.id for row in WANTED)
    for i in range(COUNT):
        assert tuple(extents[i]) == pytest.approx(extent(i % 11))
        for name in TAPS:
            try:
                read = store.read([i], taps=[name])[name][0]
            except cache.StoreError:
                continue
            assert read.tobytes() == feature(i % 11)[name].tobytes()


def restore(path: Path, sound: dict[str, bytes]) -> None:
    """Give a damaged store its files back."""
    found = files(path) if path.exists() else {}
    for name in found.keys() - sound.keys():
        (path / name).unlink()
    for name, content in sound.items():
        if found.get(name) != content:
            (path if name == "." else path / name).write_bytes(content)


@pytest.mark.parametrize("suffix", FORMATS)
def test_random_damage_is_found_and_never_read_as_data(suffix: str, tmp_path: Path) -> None:
    path = build(tmp_path / f"store.{suffix}", WANTED)[0].path
    sound = files(path)
    dice = random.Random(suffix)
    kinds = ANYWHERE + (IN_FOLDERS if suffix == "zarr" else [])
    for number in range(DAMAGES):
        what = kinds[number % len(kinds)](path, dice)
        if path.exists():
            assert cache.verify(path), f"verify does not find the {what}"
            read_or_refuse(path)
        restore(path, sound)
    assert cache.verify(path) == ()


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_bit_of_a_small_store_counts(suffix: str, tmp_path: Path) -> None:
    """One flip in every few bytes of every file, so that no region of the format is unguarded."""
    path = build(tmp_path / f"store.{suffix}", rows(range(3)))[0].path
    for name, content in files(path).items():
        file = path if name == "." else path / name
        for at in range(0, len(content), 1 + len(content) // 40):
            file.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
            assert cache.verify(path), f"byte {at} of {name}"
        file.write_bytes(content)
    assert cache.verify(path) == ()


@pytest.mark.parametrize("suffix", FORMATS)
def test_damage_names_the_samples_and_spares_the_others(suffix: str, tmp_path: Path) -> None:
    path = build(tmp_path / f"store.{suffix}", WANTED)[0].path
    damage_row(path, 2)
    store = cache.open_store(path)
    with pytest.raises(cache.DamagedRowError) as caught:
        store.read([5, 2, 3, 13])
    assert caught.value.ids == ("image-2.png", "image-13.png"), "both have the pixels of image 2"
    assert store.read([5, 3])["neck"][0].tobytes() == feature(5)["neck"].tobytes()
    (found,) = cache.verify(path)
    assert (found.tap, found.slots, found.ids) == ("neck", (2,), ("image-2.png", "image-13.png"))


def damage_row(path: Path, number: int, tap: str = "neck") -> None:
    """Flip one bit in the stored feature of an image, wherever it lies."""
    needle = feature(number)[tap].tobytes()
    hits = 0
    for name, content in files(path).items():
        at = content.find(needle)
        if at >= 0:
            hits += 1
            file = path if name == "." else path / name
            file.write_bytes(content[: at + 3] + bytes([content[at + 3] ^ 4]) + content[at + 4 :])
    assert hits == 1


def test_a_file_cut_short_while_it_is_mapped_is_an_error_and_no_crash(tmp_path: Path) -> None:
    for suffix in FORMATS:
        store, _ = build(tmp_path / f"store.{suffix}", rows(range(3)))
        store.read([0])
        file = store.path if suffix == "h5" else store.path / "neck" / "c.0.0.0.0"
        with file.open("r+b") as handle:
            handle.truncate(10)
        with pytest.raises(cache.StoreError, match=r"image-1|truncated"):
            store.read([1])
