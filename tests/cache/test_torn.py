"""Stops at any moment: by exception at every step, and real processes killed for real."""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache
from cache import durable
from cache.formats.zarr_layout import shard_blocks
from cache.reading.reader import open_files
from cache.writing import writer
from tests.cache import making, run_store
from tests.cache.making import FORMATS, ROWS_PER_SHARD, assert_holds, begin, build, files, rows, write
from tests.cache.run_store import Heard, Maker, finish, start


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
        patch.setattr("cache.writing.writer.swap", counted(writer.swap))
        yield made


def make(path: Path, wanted: Sequence[cache.Row], written: set[int]) -> None:
    """Make a store; `written` gets the indices of its rows, shard by shard."""
    with begin(path, wanted) as writer:
        for plan in writer.pending:
            write(writer, plan, wanted)
            written.update(plan.rows)
        writer.commit()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("before", [None, range(5)])
def test_every_stop_resumes_to_the_same_bytes(
    suffix: str, before: range | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped at every second change of the file system, each time on a fresh copy.

    What it had written by then is not encoded again.
    """
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
    for call in range(1, made[0] + 1, 2):
        path = prepared(f"stop-{call}")
        old = cache.info(path).version if before is not None else None
        written: set[int] = set()
        with stopped_at(call, monkeypatch), pytest.raises(Stop):
            make(path, wanted, written)
        if path.exists():
            assert cache.info(path).version in {old, version}
            assert cache.verify(path) == ()
        store, encoded = build(path, wanted)
        assert files(path) == expected, f"stopped at change {call}"
        assert written.isdisjoint(encoded), f"stopped at change {call}"
        assert_holds(store, wanted)
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("older", ["sound", "without a root"])
def test_what_is_left_after_the_swap_is_not_taken_for_the_new_version(
    older: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between the swap and the clearing up; then somebody deletes the store, if it can be told."""
    path = tmp_path / "store.zarr"
    build(path, rows(range(8)))
    if older == "without a root":
        (path / "zarr.json").unlink()

    def swap_and_stop(*paths: Path) -> None:
        durable.swap(*paths)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("cache.writing.writer.swap", swap_and_stop)
        with pytest.raises(Stop):
            build(path, rows(range(100, 108)), replace=True)
    if older == "sound":
        shutil.rmtree(path)
    store, _ = build(path, rows(range(100, 108)))
    assert cache.verify(path) == ()
    assert_holds(store, rows(range(100, 108)))


def test_a_commit_that_makes_the_same_root_again_is_not_taken_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store under the name has a sound root and a damaged index; its replacement is stopped before the swap."""
    path = tmp_path / "store.zarr"
    build(path, wanted := rows(range(16)))
    (path / "index/slot/zarr.json").write_text("{}")

    def stop(*paths: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("cache.writing.writer.swap", stop)
        with pytest.raises(Stop):
            build(path, wanted, replace=True)
    store, encoded = build(path, wanted, replace=True)
    assert encoded == []
    assert_holds(store, wanted)
    assert cache.verify(path) == ()


KILLS = max(10, int(os.environ.get("STORE_KILLS", "60"))) // 2
"""Half of a format's in a new store, half in an update; at least one in each step."""
STEPS = ("opening", "between", "encoding", "writing", "commit")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("before", [range(0), range(20)])
def test_killed_processes_resume_to_the_same_bytes(suffix: str, before: range, tmp_path: Path) -> None:
    """SIGKILL at random moments, also in an update; no more than the shard in hand is encoded again.

    A kill counts if it ends a process at work. A store that gets finished is compared, and another one begun.
    """
    numbers, moments = range(6, 46), random.Random(f"{suffix} {before}")
    to_encode = {i for i, number in enumerate(numbers) if number not in before}

    def prepared(name: str) -> Path:
        path = tmp_path / name / f"store.{suffix}"
        path.parent.mkdir()
        if before:
            build(path, rows(before))
        return path

    whole = Maker(prepared("whole"), numbers)
    assert whole.end() is None
    assert follow(whole.heard, to_encode, set()) == (set(), set())
    takes, hits = durations(whole.heard), Counter[str]()
    for store in range(2 * KILLS):  # on a busy machine some come when the work is done
        path, left = prepared(f"killed-{store}"), (to_encode, set[int]())
        ended: str | None = "start"
        while ended:
            maker = Maker(path, numbers)
            if hits.total() < KILLS:
                shoot(maker, hits, takes, moments)
            ended = maker.end()
            left = follow(maker.heard, *left)
            hits.update([ended] if ended else [])
        assert files(path) == files(tmp_path / "whole" / path.name)
        assert cache.verify(path) == ()
        assert list(path.parent.iterdir()) == [path]
        if hits.total() == KILLS:
            break
    assert hits.total() == KILLS
    assert all(hits[step] for step in STEPS), hits


def shoot(maker: Maker, hits: Counter[str], takes: dict[str, float], moments: random.Random) -> None:
    """Kill a process at a random moment of a random step, which is rather one that was hit seldom.

    One that never gets to that step, because it has less left to do, is spared.
    """
    (step,) = moments.choices(STEPS, [2.0 ** -hits[step] for step in STEPS])
    if maker.hears(step, 1 if step in ("opening", "commit") else moments.randint(1, 3)):
        time.sleep(moments.uniform(0, takes[step]))
        maker.kill()


def durations(heard: list[Heard]) -> dict[str, float]:
    """Seconds that each step takes: the median of all times that it was taken."""
    taken: dict[str, list[float]] = {}
    for (step, _, begun), (_, _, ended) in pairwise(heard):
        taken.setdefault(step, []).append(ended - begun)
    return {step: statistics.median(seconds) for step, seconds in taken.items()}


def follow(heard: list[Heard], missing: set[int], in_hand: set[int]) -> tuple[set[int], set[int]]:
    """Check what a process encodes against what those before it left; returns what it leaves itself.

    Args:
        heard: What it told.
        missing: Rows that nobody has told to be written.
        in_hand: Those that the last one was encoding or writing: it may have finished them and told nobody.

    Returns:
        `missing` and `in_hand` for the next one.
    """
    for step, about, _ in heard:
        if step == "between":
            assert about in (missing, missing - in_hand), "all that is not written is to be encoded, and no more"
            missing, in_hand = about, set()
        elif step == "encoding":
            assert about <= missing
            assert len(about) <= ROWS_PER_SHARD
            in_hand = about
        elif step == "commit":
            assert not missing
    return missing, in_hand


@pytest.mark.parametrize("suffix", FORMATS)
def test_processes_share_one_store_and_a_dead_ones_shard_is_taken_over(suffix: str, tmp_path: Path) -> None:
    numbers = range(80)
    for attempt in range(5):  # on a busy machine a helper may come when all is done
        folder = tmp_path / str(attempt)
        folder.mkdir()
        path, logs = folder / f"store.{suffix}", [folder / f"log-{i}" for i in range(3)]
        helpers = [start(run_store.make, path, numbers, 0.02, log, True) for log in logs[1:]]
        leader = start(run_store.make, path, numbers, 0.02, logs[0])
        while helpers[0].is_alive() and not (logs[1].exists() and logs[1].read_text()):
            time.sleep(0.002)
        if helpers[0].is_alive():
            break
        assert [finish(process) for process in (leader, *helpers)] == [0, 0, 0]
    helpers[0].kill()
    assert finish(helpers[1]) == 0
    assert finish(leader) == 0
    encoded = [log.read_text().splitlines() for log in logs]
    assert all(encoded), "each process has done something"
    assert 80 <= sum(map(len, encoded)) <= 80 + ROWS_PER_SHARD
    whole, _ = build(tmp_path / f"whole.{suffix}", rows(numbers))
    assert files(path) == files(whole.path)


def join(path: Path, wanted: Sequence[cache.Row], **settings: Any) -> cache.StoreWorker:
    return cache.join_store(path, rows=wanted, **{"fingerprint": making.FINGERPRINT, "taps": making.TAPS, **settings})


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_helper_in_the_midst_of_a_shard_loses_nothing_when_the_leader_resumes(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted = tmp_path / f"store.{suffix}", rows(range(12))
    interrupted(path, wanted, 1)
    helper, leaders = join(path, wanted), list[cache.StoreWriter]()

    def half_written(*args: Any) -> Iterator[memoryview]:
        first, *rest = shard_blocks(*args)
        yield first
        if not leaders:
            leaders.append(begin(path, wanted))
        yield from rest

    with monkeypatch.context() as patch:
        patch.setattr("cache.writing.shards.shard_blocks", half_written)
        (plan, *_) = helper.pending
        write(helper, plan, wanted)
    with leaders[0] as leader:
        encoded = [plan.number for plan in leader.claims() if not write(leader, plan, wanted)]
        leader.commit()
    assert encoded == [2]
    whole, _ = build(tmp_path / f"whole.{suffix}", wanted)
    assert files(path) == files(whole.path)


def test_joining_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(cache.StoreError, match="no process has begun"):
        join(tmp_path / "store.zarr", rows([0]), wait_seconds=0)


def test_a_helper_that_waits_looks_at_the_store_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted, looks = tmp_path / "store.zarr", rows(range(9)), list[Path]()
    build(path, wanted[:8])

    def counted(path: Path) -> Any:
        looks.append(path)
        return open_files(path)

    monkeypatch.setattr("cache.writing.join.open_files", counted)
    with pytest.raises(cache.StoreError, match="no process has begun"):
        join(path, wanted, wait_seconds=0.7)
    assert looks == [path]
    with ThreadPoolExecutor() as pool:
        helper = pool.submit(join, path, wanted)
        while len(looks) < 2:
            time.sleep(0.01)
        with begin(path, wanted) as leader:
            assert helper.result(timeout=60).pending == leader.pending


def test_a_helper_takes_no_rows_from_a_store_that_is_to_be_replaced(tmp_path: Path) -> None:
    path, wanted = tmp_path / "store.zarr", rows(range(10))
    other = cache.Fingerprint({"encoder": "another"})
    build(path, wanted[:6])
    with begin(path, wanted, fingerprint=other, replace=True) as leader:
        assert sum(len(plan.rows) for plan in leader.pending) == 10
        assert join(path, wanted, fingerprint=other).pending == leader.pending


def test_a_helper_that_comes_late_is_done_also_where_a_sample_was_set_aside(tmp_path: Path) -> None:
    path, wanted = tmp_path / "store.zarr", rows(range(8))
    with begin(path, wanted) as leader:
        for plan in leader.pending:
            write(leader, plan, wanted, set_aside={i: "bad" for i in plan.rows if i == 2})
        leader.commit()
    assert join(path, wanted).pending == ()
    with pytest.raises(cache.StoreError, match="no process has begun"):
        join(path, rows(range(9)), wait_seconds=0.1)
    with begin(path, wanted) as leader:
        assert [plan.rows for plan in leader.pending] == [(2,)]
        assert join(path, wanted).pending == leader.pending


def test_work_of_another_fingerprint_is_waited_out_unless_somebody_leads_it(tmp_path: Path) -> None:
    path, wanted = tmp_path / "store.zarr", rows(range(8))
    other = cache.Fingerprint({"encoder": "another"})
    interrupted(path, wanted, 1)
    with pytest.raises(cache.StoreError, match="no process has begun"):
        join(path, wanted, fingerprint=other, wait_seconds=0.1)
    with begin(path, wanted), pytest.raises(cache.FingerprintMismatchError, match="the leader's own arguments"):
        join(path, wanted, fingerprint=other)
    with begin(path, wanted, fingerprint=other, replace=True) as leader:
        assert join(path, wanted, fingerprint=other).pending == leader.pending


def test_only_one_of_many_processes_holds_the_lock(tmp_path: Path) -> None:
    """Six processes count under the lock alone; one count would be lost if two ever held it."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    running = [start(run_store.hold_in_turn, tmp_path / "store.zarr", counter, 15) for _ in range(6)]
    assert [finish(process) for process in running] == [0] * 6
    assert counter.read_text() == "90"


def test_a_second_writer_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    path, log = tmp_path / "store.zarr", tmp_path / "log"
    process = start(run_store.make, path, range(8), 0.5, log)
    while not log.exists():
        time.sleep(0.002)
    with pytest.raises(cache.StoreLockedError, match=rf"process {process.pid} since \d+ s"):
        begin(path, rows(range(8)))
    process.kill()
    process.join()
    store, _ = build(path, rows(range(8)))
    assert_holds(store, rows(range(8)))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("limit", [0, 100, 350, 1000, 20_000])
def test_a_limit_on_file_sizes_is_said_and_work_continues_after_it(suffix: str, limit: int, tmp_path: Path) -> None:
    path, log = tmp_path / f"store.{suffix}", tmp_path / "log"
    finish(start(run_store.make_within, path, range(40), limit, log))
    if limit > 1000 and suffix == "zarr":
        assert not log.exists()
    else:
        assert "NoSpaceError" in log.read_text()
        assert "run the same command again" in log.read_text()
        assert not path.exists()
    store, _ = build(path, rows(range(40)))
    assert_holds(store, rows(range(40)))
    assert list(tmp_path.glob("store*")) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_said_and_work_continues_after_it(suffix: str, tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        path = disk / f"store.{suffix}"
        (disk / "ballast").write_bytes(bytes(24 * 1024))
        finish(start(run_store.report, path, range(100), log))
        assert "NoSpaceError" in log.read_text()
        assert not path.exists()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        (disk / "ballast").unlink()
        store, encoded = build(path, rows(range(100)))
        assert_holds(store, rows(range(100)))
        assert len(encoded) < 100, "what was finished before is kept"
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_nothing_gets_its_name_before_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files before their rename, folders after it, everything below the store before the store's own rename."""
    unsynced: set[Path] = set()
    named: list[Path] = []
    rename = Path.rename

    def fsync(handle: int) -> None:
        unsynced.discard(Path(f"/proc/self/fd/{handle}").resolve())

    def replace(source: Path, target: Path) -> Path:
        assert source not in unsynced, f"{source} is renamed before its content is synced"
        if target.name.startswith("shard-"):
            early = [path for path in unsynced if path.parent.name == "store"]
            assert not early, f"{target} says that a shard is finished before {early} are synced"
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


def test_a_store_that_is_swapped_is_never_mixed_with_its_next_version(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    old, _ = build(path, rows(range(8)))
    old.read([0])
    build(path, rows(range(100, 108)))
    np.testing.assert_array_equal(old.read([1])["neck"][0], making.feature(1)["neck"])
    with pytest.raises(cache.StoreError, match="replaced by another version"):
        old.read([5], verify=False)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_store_lets_go_of_its_files(suffix: str, tmp_path: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    path = tmp_path / f"store.{suffix}"
    build(path, rows(range(40)))[0].read([0])  # the first of a process opens what is kept for all
    gc.collect()
    before = open_files()
    gc.disable()
    try:
        store = cache.open_store(path)
        store.read(range(40))
        assert open_files() > before
        del store
        assert open_files() == before, "without the help of the garbage collector"
    finally:
        gc.enable()


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


def interrupted(path: Path, wanted: Sequence[cache.Row], shards: int) -> set[bytes]:
    """Leave a run that has finished so many shards; the digests of what it encoded."""
    written: set[bytes] = set()
    with begin(path, wanted) as writer:
        for plan in writer.pending[:shards]:
            write(writer, plan, wanted)
            written |= {wanted[i].digest for i in plan.rows}
    return written


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_stop_of_a_run_with_other_rows_costs_what_was_finished_before(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two interrupted runs, then one of other rows, stopped at every change of the file system until it encodes."""
    numbers = [range(12), range(1, 14), range(2, 15)]

    def prepared(name: str) -> tuple[Path, set[bytes]]:
        path = tmp_path / name / f"store.{suffix}"
        path.parent.mkdir()
        return path, set().union(*(interrupted(path, rows(part), 2) for part in numbers[:2]))

    wanted = rows(numbers[2])
    whole, _ = prepared("whole")
    with stopped_at(0, monkeypatch) as made:
        writer = begin(whole, wanted)
    writer.close()
    build(whole, wanted)
    for call in range(1, made[0] + 1):
        path, written = prepared(f"stop-{call}")
        with stopped_at(call, monkeypatch), pytest.raises(Stop):
            begin(path, wanted)
        store, encoded = build(path, wanted)
        assert written.isdisjoint(wanted[i].digest for i in encoded), f"stopped at change {call}"
        assert files(path) == files(whole), f"stopped at change {call}"
        assert_holds(store, wanted)
        assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_fills_up_while_a_run_is_planned_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted = tmp_path / "store.zarr", rows(range(21))
    interrupted(path, wanted[:20], 4)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(cache.NoSpaceError, match="what is finished is kept"):
            begin(path, wanted)
    with begin(path, wanted) as writer:
        assert writer.reused == 16


@pytest.mark.parametrize("replace", [False, True])
def test_finished_work_of_another_fingerprint_is_no_source_and_goes_only_by_request(
    replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before it was stopped before it had a plan, so that only retired work is there."""
    path, wanted = tmp_path / "store.zarr", rows(range(9))
    interrupted(path, wanted[:8], 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            begin(path, wanted)
    other = {"fingerprint": cache.Fingerprint({"encoder": "another"}), "replace": replace}
    if replace:
        with begin(path, wanted, **other) as writer:
            assert writer.reused == 0
    else:
        with pytest.raises(cache.FingerprintMismatchError, match="encoder is"):
            begin(path, wanted, **other)
        with begin(path, wanted) as writer:
            assert writer.reused == 8


@pytest.mark.parametrize("what", ["shard", "record"])
def test_a_torn_shard_of_a_run_with_other_rows_is_encoded_again(what: str, tmp_path: Path) -> None:
    path, wanted = tmp_path / "store.zarr", rows(range(13))
    interrupted(path, wanted[:12], 3)
    torn = tmp_path / "store.zarr.partial" / {"shard": "store/neck/c.1.0.0.0", "record": "work/shard-1.npz"}[what]
    os.truncate(torn, torn.stat().st_size - 1)
    store, encoded = build(path, wanted)
    assert encoded == [4, 5, 6, 7, 12]
    assert_holds(store, wanted)
    assert cache.verify(path) == ()
