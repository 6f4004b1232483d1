"""Updates: what is stored is never encoded again, and what did not change keeps its bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cache
from tests.cache.making import (
    FORMATS,
    NUMBER_OF,
    ROWS_PER_SHARD,
    SHARD_MIB,
    TAPS,
    assert_holds,
    begin,
    build,
    feature,
    files,
    row,
    rows,
    write,
)


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"store.{request.param}"


def shards(path: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of every shard file."""
    found = (file for tap in TAPS for file in sorted((path / tap).glob("c.*")))
    return {f"{file.parent.name}/{file.name}": (file.stat().st_ino, file.read_bytes()) for file in found}


def names(numbers: Sequence[int], encoded: Sequence[int], wanted: Sequence[cache.Row]) -> bool:
    """Whether exactly the images of these numbers were encoded, each once."""
    return sorted(NUMBER_OF[wanted[i].digest] for i in encoded) == sorted(numbers)


def test_changed_added_removed_and_renamed_images(path: Path) -> None:
    """2 changed, 3 added, 4 removed, 5 renamed of 60: the 2 + 3 are encoded."""
    build(path, rows(range(60)))
    kept = [row(n) for n in range(60) if n not in {10, 30, 31, 50} | {5, 40}]
    renamed = [row(NUMBER_OF[r.digest], f"new-{i}.png") if i < 5 else r for i, r in enumerate(kept)]
    wanted = [*renamed, row(100, "image-5.png"), row(101, "image-40.png"), *rows(range(200, 203))]
    store, encoded = build(path, wanted)
    assert names([100, 101, 200, 201, 202], encoded, wanted)
    assert_holds(store, wanted)
    assert cache.verify(path) == ()


def test_shards_without_a_changed_row_keep_bytes_and_inode(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    build(path, rows(range(22)))
    before = shards(path)
    store, _ = build(path, [row(100 if n == 9 else n) for n in range(22)])
    after = shards(path)
    assert before.items() <= after.items(), "one dead row of four is not enough to move a shard"
    assert len(after) == len(before) + len(TAPS)
    assert_holds(store, [row(100 if n == 9 else n) for n in range(22)])


def test_a_shard_with_more_than_a_quarter_dead_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    build(path, rows(range(16)))
    before = shards(path)
    wanted = [row(n) for n in range(16) if n not in {4, 6}]
    store, encoded = build(path, wanted)
    after = shards(path)
    assert encoded == [], "the live rows of a shard are moved, not encoded"
    assert {name for name in after if after[name] != before.get(name)} == {f"{tap}/c.1.0.0.0" for tap in TAPS}
    assert len(after) == len(before)
    assert_holds(store, wanted)
    assert cache.verify(path) == ()


def test_a_dead_row_is_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    build(path, rows(range(8)))
    build(path, rows(range(1, 8)))
    store, encoded = build(path, rows(range(8)))
    assert encoded == []
    assert_holds(store, rows(range(8)))


def test_identical_images_are_stored_and_encoded_once(path: Path) -> None:
    wanted = [row(0, "a"), row(1, "b"), row(0, "c"), row(0, "d"), row(2, "e")]
    store, encoded = build(path, wanted)
    assert encoded == [0, 1, 4]
    assert_holds(store, wanted)
    assert cache.info(path).slots == 3


def test_new_order_and_names_encode_nothing_and_share_every_shard(path: Path) -> None:
    build(path, rows(range(12)))
    before = shards(path) if path.suffix == ".zarr" else {}
    wanted = [row(n, f"renamed-{n}") for n in reversed(range(12))]
    store, encoded = build(path, wanted)
    assert encoded == []
    assert_holds(store, wanted)
    assert path.suffix != ".zarr" or shards(path) == before


def test_the_same_rows_again_change_nothing(path: Path) -> None:
    build(path, rows(range(9)))
    before = path.stat().st_ino, files(path)
    with begin(path, rows(range(9)), provenance={"another": "story"}) as writer:
        assert (writer.pending, writer.reused) == ((), 9)
        writer.commit()
    assert (path.stat().st_ino, files(path)) == before


@pytest.mark.parametrize("old", FORMATS)
def test_rows_are_reused_from_another_store(path: Path, old: str) -> None:
    other = path.parent / f"older.{old}"
    build(other, rows(range(20)))
    with begin(path, rows(range(5, 30)), reuse=[other]) as writer:
        assert writer.reused == 15
        for plan in writer.pending:
            write(writer, plan, rows(range(5, 30)))
        store = writer.commit()
    assert_holds(store, rows(range(5, 30)))
    assert_holds(cache.open_store(other), rows(range(20)))


def test_a_store_of_another_fingerprint_is_not_reused(path: Path) -> None:
    other = path.parent / "older.zarr"
    build(other, rows(range(4)), fingerprint=cache.Fingerprint({"encoder": "another"}))
    with pytest.raises(cache.FingerprintMismatchError, match=r"older\.zarr.*cannot be reused"):
        begin(path, rows(range(4)), reuse=[other])


def test_damaged_rows_are_not_moved_into_the_next_version(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    build(path, rows(range(8)))
    shard = path / "neck" / "c.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    wanted = rows([0, 1, 4, 5, 6, 7])
    store, encoded = build(path, wanted)
    assert encoded == [0], "row 0 is damaged and encoded again, row 1 is moved"
    assert_holds(store, wanted)


def test_read_only_hard_links_are_never_changed(path: Path) -> None:
    """The way DVC leaves a store: its cache and the store are the same, protected inodes."""
    build(path, rows(range(10)))
    cached = path.parent / "dvc-cache"
    cached.mkdir()
    inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for number, file in enumerate(inside):
        os.link(file, cached / str(number))
        file.chmod(0o444)
    before = files(cached)
    wanted = [*rows(range(4, 10)), *rows(range(20, 27))]
    store, _ = build(path, wanted)
    assert_holds(store, wanted)
    assert files(cached) == before


def test_without_hard_links_shards_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.zarr"
    build(path, rows(range(8)))

    def across(*args: object, **kwargs: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    store, encoded = build(path, rows(range(9)))
    assert encoded == [8]
    assert_holds(store, rows(range(9)))


def test_many_small_additions_do_not_end_in_many_small_files(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    for count in range(1, 41):
        store, encoded = build(path, rows(range(count)))
        assert len(encoded) == 1
    assert len(shards(path)) / len(TAPS) <= 40 / ROWS_PER_SHARD + 8
    assert_holds(store, rows(range(40)))


@settings(max_examples=25, deadline=None)
@given(versions=st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=26), min_size=2, max_size=5))
def test_any_history_reads_as_a_store_made_from_scratch(versions: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.zarr"
        known: set[int] = set()
        for numbers in versions:
            wanted = [row(number, f"{i}") for i, number in enumerate(numbers)]
            store, encoded = build(path, wanted)
            assert names(sorted(set(numbers) - known), encoded, wanted)
            assert_holds(store, wanted)
            known = {NUMBER_OF[digest] for digest in _stored_digests(path)}
            assert set(numbers) <= known
            _assert_dense(path)
        assert cache.verify(path) == ()


def _stored_digests(path: Path) -> set[bytes]:
    """Digests of all present slots, dead ones too, read with plain zarr."""
    index = zarr.open_group(path, mode="r")["index"]
    present = np.asarray(index["extent"][:])[:, 0] > 0
    return {digest.tobytes() for digest in np.asarray(index["digest"][:])[present]}


def _assert_dense(path: Path) -> None:
    """No shard has more than a quarter of dead rows."""
    index = zarr.open_group(path, mode="r")["index"]
    present = np.asarray(index["extent"][:])[:, 0] > 0
    live = np.isin(np.arange(len(present)), np.asarray(index["slot"][:]))
    for start in range(0, len(present), ROWS_PER_SHARD):
        stored = int(present[start : start + ROWS_PER_SHARD].sum())
        assert int(live[start : start + ROWS_PER_SHARD].sum()) >= 0.75 * stored


def test_dvc_push_sends_only_new_shards(tmp_path: Path) -> None:
    """Ten images are added to a thousand; the remote receives the new shard files and the index."""

    def dvc(*arguments: str) -> None:
        command = [sys.executable, "-m", "dvc", *arguments, "-q"]
        subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})

    def remote() -> dict[Path, int]:
        return {file: file.stat().st_size for file in (tmp_path / "remote").rglob("*") if file.is_file()}

    taps = {"neck": cache.TapSpec(64, 8, 8, "float16")}
    mib = 50 * taps["neck"].row_bytes / 2**20
    path = tmp_path / "store.zarr"
    build(path, rows(range(1000)), taps=taps, shard_mib=mib)
    dvc("init", "--no-scm")
    dvc("config", "cache.type", "hardlink,copy")
    dvc("remote", "add", "-d", "local", str(tmp_path / "remote"))
    dvc("add", "store.zarr")
    dvc("push")
    before = remote()
    store, encoded = build(path, rows(range(1010)), taps=taps, shard_mib=mib)
    assert len(encoded) == 10
    np.testing.assert_array_equal(store.read([1009])["neck"][0], feature(1009, taps)["neck"])
    dvc("add", "store.zarr")
    dvc("push")
    sent = {file: size for file, size in remote().items() if file not in before}
    shard_bytes = 10 * taps["neck"].row_bytes
    index = [path / "zarr.json", path / "id/c.0", *(path / "index").rglob("c.*")]
    index_bytes = sum(file.stat().st_size for file in index)
    assert sum(sent.values()) < shard_bytes + index_bytes + 20_000
    assert sum(sent.values()) < 0.06 * sum(before.values())
    assert mib > SHARD_MIB


def foreign_group(path: Path) -> None:
    zarr.open_group(path, mode="w", zarr_format=2).create_array("ct", data=np.arange(9))


def foreign_group_of_version_3(path: Path) -> None:
    zarr.open_group(path, mode="w", zarr_format=3).create_array("ct", data=np.arange(9))


def foreign_file(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["ct"] = np.arange(9)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    ("suffix", "put"),
    [("zarr", foreign_group), ("zarr", foreign_group_of_version_3), ("zarr", foreign_file), ("h5", foreign_file)],
)
def test_what_is_no_store_is_never_swapped_out(
    suffix: str, put: Callable[[Path], None], replace: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"store.{suffix}"
    put(path)
    before = files(path)
    with pytest.raises(cache.StoreError, match=r"feature store|is a file, which"):
        build(path, rows(range(4)), replace=replace)
    assert files(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_folder_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "store.zarr").mkdir()
    assert_holds(build(tmp_path / "store.zarr", wanted := rows(range(4)))[0], wanted)


@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_a_store_with_a_damaged_root_keeps_its_features(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    build(path, wanted := rows(range(10)))
    root = path / "zarr.json"
    content = root.read_bytes()
    root.unlink() if damage == "lost" else root.write_bytes(content.replace(b"fake", b"take"))
    with pytest.raises(cache.FormatError, match=r"store repair|fetch or extract it again|fetch it again"):
        build(path, wanted)
    store, encoded = build(path, wanted, replace=True)
    assert encoded == []
    assert_holds(store, wanted)
    assert cache.verify(path) == ()


@pytest.mark.parametrize("what", ["truncated", "deleted", "record"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_torn_shard_of_unfinished_work_is_encoded_again(suffix: str, what: str, tmp_path: Path) -> None:
    path, wanted = tmp_path / f"store.{suffix}", rows(range(12))
    with begin(path, wanted) as writer:
        for plan in writer.pending[:2]:
            write(writer, plan, wanted)
    partial = path.with_name(path.name + ".partial")
    shard, record = partial / "store/neck/c.1.0.0.0", partial / "work/shard-1.npz"
    if what == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    elif what == "deleted":
        shard.unlink()
    else:
        record.write_bytes(b"PK\x03\x04 and no more")
    store, encoded = build(path, wanted)
    assert encoded == list(range(4, 12))
    assert_holds(store, wanted)
    assert cache.verify(path) == ()


def test_a_shard_has_no_more_rows_than_asked_and_an_update_keeps_what_the_store_has(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    with begin(path, rows(range(7)), shard_mib=1, shard_rows=3) as writer:
        assert [len(plan.rows) for plan in writer.pending] == [3, 3, 1]
    build(path, rows(range(7)), shard_mib=1, shard_rows=3)
    with begin(path, rows(range(14)), shard_mib=1) as writer:
        assert {len(plan.rows) for plan in writer.pending} == {3, 1}
    with begin(tmp_path / "large.zarr", rows(range(7)), shard_mib=1) as writer:
        assert [len(plan.rows) for plan in writer.pending] == [7]


@pytest.mark.parametrize("place", ["empty", "dead"])
def test_a_torn_shard_that_was_kept_with_an_unused_place_is_made_again(place: str, tmp_path: Path) -> None:
    """An update is interrupted, a shard that it shares is damaged, and the same command runs again."""
    path, before = tmp_path / "store.zarr", rows(range(8))
    partial = path.with_name("store.zarr.partial")
    if place == "empty":
        with begin(path, before) as writer:
            for plan in writer.pending:
                write(writer, plan, before, set_aside={i: "bad" for i in plan.rows if i == 1})
        wanted, torn = rows(range(9)), partial / "work/shard-0.npz"
    else:
        build(path, before)
        wanted, torn = rows(range(1, 9)), partial / "store/neck/c.0.0.0.0"
    begin(path, wanted).close()
    os.truncate(torn, torn.stat().st_size - 1)
    store, encoded = build(path, wanted)
    assert names([8] if place == "empty" else [1, 2, 3, 8], encoded, wanted)
    assert_holds(store, [row for row in wanted if row.id not in store.set_aside])
    assert cache.verify(path) == ()
