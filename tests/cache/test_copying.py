"""Rows out of mapped files: the same gathered and one by one, and no harm from files that change under the maps."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

import cache
from cache.formats import mapped
from cache.formats.mapped import Int64, MappedFile, Places
from cache.reading import copying
from cache.reading.copying import SHORT_BYTES, copy_rows
from tests.cache.making import FINGERPRINT, ROWS_PER_SHARD, assert_holds, build, feature, rows

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZES = (1, 64, 1000, SHORT_BYTES, SHORT_BYTES + 1, 3 * SHORT_BYTES)
"""Bytes of a row, on both sides of the bound up to which rows are gathered."""


@dataclass
class Pile:
    """Files of rows with a gap of three bytes between them, slot after slot: what a store is to `copy_rows`."""

    folder: Path
    size: int
    per_file: int
    maps: dict[int, MappedFile] = field(default_factory=dict)

    def fill(self, count: int) -> Pile:
        """Write files for so many rows of noise."""
        for number in range(-(-count // self.per_file)):
            stride = self.size + 3
            noise = np.random.default_rng(number).integers(0, 256, self.per_file * stride, np.uint8)
            self.path(number).write_bytes(noise.tobytes())
        return self

    def path(self, number: int) -> Path:
        return self.folder / f"{number}.rows"

    def row(self, slot: int) -> bytes:
        """The slow reference: a row as the file system gives it."""
        number, within = divmod(slot, self.per_file)
        start = within * (self.size + 3)
        return self.path(number).read_bytes()[start : start + self.size]

    def fetch(self, taps: Sequence[str], slots: Int64) -> None:
        """Nothing to do."""

    def forget(self, tap: str, slots: Int64) -> None:
        """Nothing to do."""

    def places(self, tap: str, slots: Int64) -> Places:
        files, within = np.divmod(slots, self.per_file)
        return Places(files, within * (self.size + 3))

    def file(self, tap: str, number: int) -> MappedFile:
        if number not in self.maps:
            self.maps[number] = MappedFile(self.path(number))
        return self.maps[number]

    def copy(self, slots: list[int], expected: list[int] | None = None) -> tuple[np.ndarray[tuple[int, int]], set[int]]:
        target = np.zeros((len(slots), self.size), np.uint8)
        sums = None if expected is None else np.array(expected, np.uint32)
        return target, copy_rows(self, "tap", self.size, np.array(slots, np.int64), target, sums)


@settings(max_examples=150, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    per_file=st.integers(1, 5),
    wanted=st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=40),
    verify=st.booleans(),
)
def test_copies_are_the_bytes_of_the_file_and_every_wrong_checksum_is_told(
    size: int, per_file: int, wanted: list[tuple[int, bool]], verify: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pile = Pile(tmp_path_factory.mktemp("pile"), size, per_file).fill(12)
    slots = [slot for slot, _ in wanted]
    references = [pile.row(slot) for slot in slots]
    sums = [crc32c(row) ^ wrong for row, (_, wrong) in zip(references, wanted, strict=True)]
    target, damaged = pile.copy(slots, sums if verify else None)
    assert [row.tobytes() for row in target] == references
    assert damaged == ({i for i, (_, wrong) in enumerate(wanted) if wrong} if verify else set())


def test_more_rows_than_are_gathered_at_a_time(tmp_path: Path) -> None:
    pile = Pile(tmp_path, SHORT_BYTES // 2, 40).fill(80)
    slots = np.random.default_rng(0).integers(0, 80, 3 * copying._GATHERED_BYTES // pile.size + 1).tolist()
    target, damaged = pile.copy(slots, [crc32c(pile.row(slot)) for slot in slots])
    assert damaged == set()
    assert [row.tobytes() for row in target] == [pile.row(slot) for slot in slots]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("size", [64, 3 * SHORT_BYTES])
@pytest.mark.parametrize("kept", [0, 1, PAGE, -1], ids=["nothing", "a byte", "a page", "all but a byte"])
def test_a_file_cut_short_behind_its_map_is_damage_and_no_crash(
    kept: int, size: int, verify: bool, tmp_path: Path
) -> None:
    per_file = 4 * PAGE // size + 2
    pile = Pile(tmp_path, size, per_file).fill(2 * per_file)
    slots = list(range(2 * per_file))
    references = [pile.row(slot) for slot in slots]
    sums = [crc32c(row) for row in references] if verify else None
    assert pile.copy(slots, sums)[1] == set()
    whole = pile.path(1).stat().st_size
    os.truncate(pile.path(1), kept % whole)
    target, damaged = pile.copy(slots, sums)
    assert damaged <= set(range(per_file, 2 * per_file))
    assert all(target[i].tobytes() == references[i] for i in slots if i not in damaged), "no lost row passes for one"


@pytest.mark.parametrize("size", [64, 3 * SHORT_BYTES])
def test_a_place_outside_of_its_file_is_damage(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pile = Pile(tmp_path, size, 3).fill(9)
    os.truncate(pile.path(2), size)
    target, damaged = pile.copy([8, 0, 6])
    assert damaged == {0}
    assert [row.tobytes() for row in target[1:]] == [pile.row(0), pile.row(6)]
    monkeypatch.setattr(pile, "places", lambda tap, slots: Places(slots // 3, slots % 3 - 1))
    assert pile.copy([0, 4])[1] == {0}


@pytest.mark.parametrize("size", [64, 3 * SHORT_BYTES])
def test_a_missing_file_is_damage(size: int, tmp_path: Path) -> None:
    pile = Pile(tmp_path, size, 3).fill(9)
    pile.path(1).unlink()
    target, damaged = pile.copy([8, 0, 3, 6])
    assert damaged == {2}
    assert [row.tobytes() for row in target[[0, 1, 3]]] == [pile.row(8), pile.row(0), pile.row(6)]


def test_a_stolen_descriptor_writes_into_nobodys_file(tmp_path: Path) -> None:
    pile = Pile(tmp_path, 64, 5).fill(10)
    pile.copy([0], [crc32c(pile.row(0))])
    handle, _ = copying._sink()
    precious = tmp_path / "precious"
    precious.write_bytes(b"a result")
    other = os.open(precious, os.O_RDWR)
    os.dup2(other, handle)
    try:
        target, damaged = pile.copy([7, 2], [crc32c(pile.row(7)), crc32c(pile.row(2))])
    finally:
        os.close(handle)
        os.close(other)
        copying._sink.cache_clear()
    assert precious.read_bytes() == b"a result"
    assert damaged == set()
    assert [row.tobytes() for row in target] == [pile.row(7), pile.row(2)]


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """A resource limit of this process."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.parametrize("missing", ["pwritev", "memfd_create"])
def test_systems_that_lack_a_call_read(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, missing)
    copying._sink.cache_clear()
    store, _ = build(tmp_path / "store.zarr", wanted := rows(range(9)))
    assert_holds(store, wanted)
    copying._sink.cache_clear()


def test_a_process_that_may_write_no_file_reads(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", wanted := rows(range(9)))
    copying._sink.cache_clear()
    with limited(resource.RLIMIT_FSIZE, 0):
        assert_holds(store, wanted)


def test_stores_that_hold_all_descriptors_let_go_of_them(tmp_path: Path) -> None:
    build(tmp_path / "store.zarr", wanted := rows(range(10 * ROWS_PER_SHARD)))
    stores = [cache.open_store(tmp_path / "store.zarr") for _ in range(4)]
    for store in stores:
        store.read([0])
    with limited(resource.RLIMIT_NOFILE, sum(1 for _ in Path("/proc/self/fd").iterdir()) + 16):
        for first in range(0, len(wanted), ROWS_PER_SHARD):
            for store in stores:
                assert store.read([first])["neck"][0].tobytes() == feature(first)["neck"].tobytes()


def test_no_descriptor_left_is_said_so(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", rows(range(9)))
    store.read([0])
    with (
        limited(resource.RLIMIT_NOFILE, 3),
        pytest.raises(cache.StoreError, match=r"c\.1\.0\.0\.0: too many open files; .* `ulimit -n`"),
    ):
        store.read([ROWS_PER_SHARD])


def test_a_batch_out_of_many_shards_holds_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MAX_MAPS", 4)
    monkeypatch.setattr(copying, "MAX_MAPS", 4)
    store, _ = build(tmp_path / "store.zarr", wanted := rows(range(40 * ROWS_PER_SHARD)))
    store.read([0])
    with limited(resource.RLIMIT_NOFILE, sum(1 for _ in Path("/proc/self/fd").iterdir()) + 16):
        assert_holds(store, wanted)
    assert cache.open_store(store.path).fingerprint == FINGERPRINT
