"""Stores that earlier versions wrote are read for ever; the newest is written in the same bytes as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cache
from tests.cache.golden import make_golden
from tests.cache.making import FINGERPRINT, FORMATS, assert_holds, feature, files, write

VERSIONS = range(1, cache.FORMAT_VERSION + 1)
STORES = sorted(path for path in make_golden.HERE.iterdir() if path.suffix in {".zarr", ".h5"})


def version_of(path: Path) -> int:
    return int(path.stem.removeprefix("version-"))


def test_there_is_one_of_each_format_for_each_version() -> None:
    expected = {f"version-{n}.{suffix}" for n in VERSIONS for suffix in FORMATS}
    assert {path.name for path in STORES} == expected
    assert sum(map(len, (content for path in STORES for content in files(path).values()))) < 500_000


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
def test_a_golden_store_reads_as_it_was_written(path: Path) -> None:
    store = cache.open_store(path, expect=FINGERPRINT)
    assert_holds(store, make_golden.WANTED[:-1], make_golden.TAPS[version_of(path)])
    assert cache.info(path).format_version == version_of(path)
    assert store.set_aside == {"image-21.png": "the feature is not finite"}
    assert store.labels == make_golden.LABELS.select(range(7))
    rounding = {"whole": 0.00421, "brain": 0.00149} if version_of(path) > 3 else {}
    assert store.provenance == make_golden.STORY | ({"rounding_error": rounding} if rounding else {})
    assert cache.info(path).rounding == rounding
    assert cache.verify(path) == ()
    assert cache.info(path).rows == 7


@pytest.mark.parametrize("version", make_golden.WRITTEN)
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_newest_versions_are_still_written_in_the_same_bytes(suffix: str, version: int, tmp_path: Path) -> None:
    """HDF5's own bytes may change with its library; the numbers and the description may not."""
    make_golden.main(tmp_path)
    golden = make_golden.HERE / f"version-{version}.{suffix}"
    written = tmp_path / golden.name
    assert cache.info(written).version == cache.info(golden).version
    if suffix == "zarr":
        assert files(written) == files(golden)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(path: Path) -> Path:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
        return tmp_path / path.name

    return copy


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
def test_a_golden_store_can_be_continued_with_all_of_its_rows(path: Path, copied: Callable[[Path], Path]) -> None:
    copy, taps = copied(path), make_golden.TAPS[version_of(path)]
    inodes = {file.name: file.stat().st_ino for file in copy.glob("neck/c.*")}
    with cache.create_store(copy, fingerprint=FINGERPRINT, taps=taps, rows=make_golden.WANTED[:5]) as writer:
        assert (writer.pending, writer.reused) == ((), 5)
        assert_holds(writer.commit(), make_golden.WANTED[:5], taps)
    assert cache.info(copy).format_version == max(version_of(path), make_golden.WRITTEN[0])
    assert cache.verify(copy) == ()
    assert path.suffix == ".h5" or {f.name: f.stat().st_ino for f in copy.glob("neck/c.*")}.items() & inodes.items()


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
def test_a_repaired_store_keeps_its_version_and_its_bytes(path: Path, copied: Callable[[Path], Path]) -> None:
    """HDF5's own bytes may change with its library."""
    copy, taps = copied(path), make_golden.TAPS[version_of(path)]
    needle = feature(3, taps)["neck"].tobytes()
    (hit,) = (file for file in ([copy] if copy.is_file() else copy.glob("neck/c.*")) if needle in file.read_bytes())
    hit.write_bytes(hit.read_bytes().replace(needle, bytes(len(needle))))
    assert cache.verify(copy)
    with cache.repair_store(copy) as writer:
        for plan in writer.pending:
            write(writer, plan, writer.rows, taps)
        writer.commit().close()
    assert cache.info(copy).version == cache.info(path).version
    assert cache.verify(copy) == ()
    if copy.is_dir():
        assert files(copy) == files(path)


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
def test_a_golden_store_is_converted_to_the_newest_version(path: Path, tmp_path: Path) -> None:
    new = cache.convert_store(path, tmp_path / "new.zarr")
    assert new.labels == make_golden.LABELS.select(range(7))
    assert new.set_aside == {"image-21.png": "the feature is not finite"}
    assert_holds(new, make_golden.WANTED[:-1], make_golden.TAPS[version_of(path)])
    assert cache.info(new.path).format_version == max(version_of(path), make_golden.WRITTEN[0])
    assert cache.verify(new.path) == ()
