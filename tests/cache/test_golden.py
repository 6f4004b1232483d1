"""Stores that earlier versions wrote are read for ever, and this version writes the same bytes as it did."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import cache
from tests.cache.golden import make_golden
from tests.cache.making import FINGERPRINT, FORMATS, assert_holds, files

VERSIONS = range(1, cache.FORMAT_VERSION + 1)
STORES = sorted(path for path in make_golden.HERE.iterdir() if path.suffix in {".zarr", ".h5"})


def version_of(path: Path) -> int:
    return int(path.stem.removeprefix("version-"))


def test_there_is_one_of_each_format_for_each_version() -> None:
    expected = {f"version-{n}.{suffix}" for n in VERSIONS for suffix in FORMATS}
    assert {path.name for path in STORES} == expected
    assert sum(map(len, (content for path in STORES for content in files(path).values()))) < 250_000


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
def test_a_golden_store_reads_as_it_was_written(path: Path) -> None:
    store = cache.open_store(path, expect=FINGERPRINT)
    assert_holds(store, make_golden.WANTED[:-1], make_golden.TAPS[version_of(path)])
    assert cache.info(path).format_version == version_of(path)
    assert store.set_aside == {"image-21.png": "the feature is not finite"}
    assert store.labels == make_golden.LABELS.select(range(7))
    assert store.provenance == make_golden.STORY
    assert cache.verify(path) == ()
    assert cache.info(path).rows == 7


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_each_version_is_still_written_in_the_same_bytes(suffix: str, version: int, tmp_path: Path) -> None:
    """HDF5's own bytes may change with its library; the numbers and the description may not."""
    make_golden.main(tmp_path, version)
    golden = make_golden.HERE / f"version-{version}.{suffix}"
    written = tmp_path / golden.name
    assert cache.info(written).version == cache.info(golden).version
    if suffix == "zarr":
        assert files(written) == files(golden)


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
def test_a_golden_store_can_be_continued(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
    taps = make_golden.TAPS[version_of(path)]
    with cache.create_store(copy, fingerprint=FINGERPRINT, taps=taps, rows=make_golden.WANTED[:5]) as writer:
        assert (writer.pending, writer.reused) == ((), 5)
        assert_holds(writer.commit(), make_golden.WANTED[:5], taps)
