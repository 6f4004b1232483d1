"""Whoever opens a store while it is swapped sees one version of it, whole."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cache
from cache.durable import remove, swap
from tests.cache.making import FORMATS, build, rows

SIZES = (3, 20)


@contextmanager
def swapped_all_the_time(path: Path) -> Iterator[list[int]]:
    """A store whose two versions take turns every few milliseconds; yields how often they have."""
    versions = [path.with_name(f"{size}.{path.suffix}") for size in SIZES]
    for version, size in zip(versions, SIZES, strict=True):
        build(path, rows(range(size)), replace=True)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, version)
    turns, over = [0], threading.Event()

    def take_turns() -> None:
        new, aside = path.with_name("new"), path.with_name("aside")
        while not over.is_set():
            (shutil.copytree if path.is_dir() else shutil.copyfile)(versions[turns[0] % 2], new)
            swap(new, path, aside)
            remove(new)
            turns[0] += 1
            time.sleep(0.001)

    other = threading.Thread(target=take_turns)
    other.start()
    try:
        yield turns
    finally:
        over.set()
        other.join()


@pytest.mark.parametrize("suffix", FORMATS)
def test_opening_sees_one_version(tmp_path: Path, suffix: str) -> None:
    path, seen, gone = tmp_path / f"s.{suffix}", set(), list[str]()
    with swapped_all_the_time(path) as turns:
        opened = 0
        while opened < 300 or turns[0] < 20:
            with cache.open_store(path) as store:  # never an error: there is a sound store at every moment
                opened += 1
                try:
                    seen.add(len(store.ids))
                    store.read([0, len(store.ids) - 1])
                except cache.StoreError as error:
                    gone.append(str(error))
    assert seen == set(SIZES)
    assert len(gone) < opened
    assert all("was replaced by another version since it was opened; open it again" in said for said in gone)


def test_damage_is_told_at_once_where_nothing_is_swapped(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    build(path, rows(range(3)))
    (path / "neck" / "zarr.json").write_text("{}")
    with pytest.raises(cache.FormatError, match="is not the metadata of this store"):
        cache.open_store(path)
