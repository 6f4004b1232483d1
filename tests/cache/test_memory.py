"""Memory: two shards while a store is written, the buffer alone while it is read, one batch while it is inspected."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache
from cache import TapSpec
from tests.cache import run_store
from tests.cache.making import FORMATS, begin, rows

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted in /proc")

MIB = 2**20
SHARD_MIB = 8
ODDS_MIB = 4
"""What is allowed beyond what is bounded: Python's own objects, the index of a small store, an HDF5 file's metadata
(measured: less than 1 MiB), and that the kernel counts pages of each core by the hundred."""


def anonymous() -> float:
    """MiB of this process that are no file's; mapped files are left out, as the kernel may drop them at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def growth(work: Callable[[], object]) -> float:
    """MiB by which the memory of this process rises while it does some work, at the height."""
    heights, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            heights.append(anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.01)
    before = anonymous()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(heights) - before


def measured(job: Callable[..., None], *arguments: Any) -> float:
    """What a job tells, in a process of its own that has freed nothing yet."""
    ear, mouth = run_store.processes.Pipe(duplex=False)
    process = run_store.start(job, mouth, *arguments)
    mouth.close()
    assert run_store.finish(process) == 0
    return float(ear.recv())


def fill(path: Path, tap: TapSpec, mib: int) -> None:
    """Write a store of so many MiB out of one buffer of a shard; no row is like another."""
    wanted = rows(range(mib * MIB // tap.row_bytes))
    with begin(path, wanted, taps={"neck": tap}, shard_mib=SHARD_MIB) as writer:
        features = np.ones((len(writer.pending[0].rows), *tap.shape), tap.dtype)
        for plan in writer.pending:
            part = features[: len(plan.rows)]
            part[:, 0, 0, :2] = np.array(plan.rows)[:, None] // (1, 2048) % 2048
            writer.write(plan, {"neck": part}, np.ones((len(part), 2), np.float32))
        writer.commit()


def writes(tell: Connection, path: Path) -> None:
    run_store.unsynced()
    tell.send(growth(lambda: fill(path, TapSpec(64, 64, 64, "float16"), 24 * SHARD_MIB)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_writing_takes_two_shards(suffix: str, tmp_path: Path) -> None:
    """The features that are given, one shard here, are part of it."""
    grown = measured(writes, tmp_path / f"store.{suffix}")
    assert SHARD_MIB <= grown <= 2 * SHARD_MIB + ODDS_MIB


def reads(tell: Connection, path: Path, mib: int) -> None:
    store = cache.open_store(path)
    tap = store.taps["neck"]
    buffer = np.ones((mib * MIB // tap.row_bytes, *tap.shape), tap.dtype)
    wanted = np.random.default_rng(0).integers(0, len(store), len(buffer))
    store.read([0], out={"neck": buffer[:1]})
    tell.send(growth(lambda: store.read(wanted, out={"neck": buffer})))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("tap", [TapSpec(64, 128, 128, "float16"), TapSpec(32, 4, 4, "float16")])
def test_reading_takes_the_buffer_alone(suffix: str, tap: TapSpec, tmp_path: Path) -> None:
    """256 MiB in rows of 2 MiB, and in rows of 1 KiB: slot and checksum of a row are 12 bytes."""
    path = tmp_path / f"store.{suffix}"
    fill(path, tap, 32)
    mib = 256
    assert measured(reads, path, mib) <= ODDS_MIB + 12 * mib / tap.row_bytes


def inspects(tell: Connection, path: Path) -> None:
    tell.send(growth(lambda: cache.inspect_store(path)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_inspecting_takes_one_batch_however_many_there_are(suffix: str, dtype: str, tmp_path: Path) -> None:
    """Eight times the rows take but what is known of a row: id, place, norm, flags and group, less than 512 bytes."""
    tap = TapSpec(8, 32, {"float32": 32, "float16": 64, "uint8": 128}[dtype], dtype)
    small, large = (tmp_path / f"{mib}.{suffix}" for mib in (32, 256))
    fill(small, tap, 32)
    fill(large, tap, 256)
    more = 512 * (256 - 32) / tap.row_bytes
    few = measured(inspects, small)
    assert few <= 64 + ODDS_MIB
    assert measured(inspects, large) <= few + more + ODDS_MIB
