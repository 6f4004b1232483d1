"""Stops at any moment: by exception at every step, and real processes killed for real."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cache
from tests.cache.making import FORMATS, ROWS_PER_SHARD, assert_holds, begin, build, files, rows, write

ROOT = Path(__file__).parents[2]


class Stop(BaseException):
    """Stands for the end of the process."""


@contextmanager
def stopped_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Raise at the `call`-th change of the file system; yields the number of changes so far."""
    made = [0]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            made[0] += 1
            if made[0] == call:
                raise Stop
            return change(*args, **kwargs)

        return stand_in

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace"), (Path, "rename"), (Path, "unlink")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr("cache.writer.swap", counted(cache.writer.swap))
        yield made


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("before", [None, range(5)])
def test_every_stop_resumes_to_the_same_bytes(
    suffix: str, before: range | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped at one change of the file system after the other, each time on a fresh copy."""
    wanted = rows(range(1, 8))

    def prepared(name: str) -> Path:
        path = tmp_path / name / f"store.{suffix}"
        path.parent.mkdir()
        if before is not None:
            build(path, rows(before))
        return path

    whole = prepared("whole")
    with stopped_at(0, monkeypatch) as made:
        build(whole, wanted)
    expected, version = files(whole), cache.info(whole).version
    for call in range(1, made[0] + 1):
        path = prepared(f"stop-{call}")
        old = cache.info(path).version if before is not None else None
        with stopped_at(call, monkeypatch), pytest.raises(Stop):
            build(path, wanted)
        if path.exists():
            assert cache.info(path).version in {old, version}
            assert cache.verify(path) == ()
        store, _ = build(path, wanted)
        assert files(path) == expected, f"stopped at change {call}"
        assert_holds(store, wanted)
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_killed_process_resumes_to_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    """Ten random kills of one run; no more than the shard in hand is encoded again."""
    count, path = 40, tmp_path / f"store.{suffix}"
    moments = random.Random(7)
    command = [sys.executable, "-m", "tests.cache.run_store", str(path), str(count), "0.004"]
    encoded = kills = 0
    while True:
        kill = kills < 10
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            if kill:
                time.sleep(moments.uniform(0, 0.12))
                process.kill()
            lines = process.stdout.read()
        encoded += lines.count("encoded")
        if "done" in lines:
            break
        kills += 1
    assert kills >= 1
    assert encoded <= count + kills * ROWS_PER_SHARD
    whole, _ = build(tmp_path / f"whole.{suffix}", rows(range(count)))
    assert files(path) == files(whole.path)
    assert cache.verify(path) == ()


def test_nothing_gets_its_name_before_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files before their rename, folders after it, everything below the store before the store's own rename."""
    unsynced: set[Path] = set()
    named: list[Path] = []
    rename = Path.rename

    def fsync(handle: int) -> None:
        unsynced.discard(Path(f"/proc/self/fd/{handle}").resolve())

    def replace(source: Path, target: Path) -> Path:
        assert source not in unsynced, f"{source} is renamed before its content is synced"
        unsynced.add(target.parent)
        return rename(source, target)

    def commit(source: Path, target: Path) -> Path:
        named.append(target)
        below = [path for path in unsynced if path.is_relative_to(source)]
        assert not below, f"the store gets its name before {below} are synced"
        return replace(source, target)

    opened = Path.open

    def opening(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode or "+" in mode:
            unsynced.add(path)
        return opened(path, mode, *args, **kwargs)

    for name, stand_in in (("replace", replace), ("rename", commit), ("open", opening)):
        monkeypatch.setattr(Path, name, stand_in)
    monkeypatch.setattr(os, "fsync", fsync)
    build(tmp_path / "store.zarr", rows(range(6)))
    build(tmp_path / "store.h5", rows(range(6)))
    assert named == [tmp_path / "store.zarr"]
    assert tmp_path not in unsynced


def test_a_second_writer_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    command = [sys.executable, "-m", "tests.cache.run_store", str(path), "8", "60"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(cache.StoreLockedError, match=rf"process {process.pid} on .* since \d+ s"):
            begin(path, rows(range(8)))
        process.send_signal(signal.SIGKILL)
    store, _ = build(path, rows(range(8)))
    assert_holds(store, rows(range(8)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_other_rows_take_over_what_an_interrupted_run_finished(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"store.{suffix}"
    known: set[str] = set()
    for attempt in range(3):
        wanted = rows(range(attempt, 12 + attempt))
        with begin(path, wanted) as writer:
            write(writer, writer.pending[0], wanted)
            known |= {wanted[i].id for i in writer.pending[0].rows}
    wanted = rows(range(3, 15))
    store, encoded = build(path, wanted)
    assert_holds(store, wanted)
    assert {wanted[i].id for i in encoded} == {row.id for row in wanted} - known
    assert cache.verify(path) == ()
    assert list(tmp_path.iterdir()) == [path]
