"""`pipeline extract` killed for real, at moments that nobody chose."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cache
from tests import warm

from .conftest import complaint, copy_of, environment, start_pipeline, succeed

KILLS = 10
SEVERAL_SHARDS = ("--set", "encoder.pool=1", "--set", "store.dtype=float32", "--set", "store.shard_mib=1")


def digests(store: Path) -> dict[str, str]:
    """sha256 by name of every file of a store."""
    files = [store] if store.is_file() else sorted(p for p in store.rglob("*") if p.is_file())
    return {str(p.relative_to(store.parent)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def start_warm(folder: Path, *arguments: str) -> warm.Child:
    return start_pipeline(folder, "extract", "-c", "tiny.yaml", *SEVERAL_SHARDS, *arguments)


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "extract", "-c", "tiny.yaml", *SEVERAL_SHARDS]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def await_plan(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has planned its store, and so is about to encode."""
    while True:
        assert process.poll() is None, "the run ended before it could be stopped"
        try:
            if not cache.info(folder / "features/demo.zarr").complete:
                return
        except cache.StoreError:
            time.sleep(0.01)


def remove(store: Path) -> None:
    if store.is_dir():
        shutil.rmtree(store)
    else:
        store.unlink()


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_sigkill_at_random_moments_changes_no_byte(work: Path, suffix: str) -> None:
    name = f"features/demo.{suffix}"
    to_store = ("--set", f"store.path={name}")
    store = work / name
    began = time.perf_counter()
    process = start_warm(work, *to_store)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    seconds = time.perf_counter() - began
    wanted = digests(store)
    remove(store)

    random.seed(suffix)
    killed = finished = 0
    while killed < KILLS // 2 or not finished:
        process = start_warm(work, *to_store)
        if killed < KILLS // 2:
            time.sleep(random.uniform(0.1, 1.0) * seconds)
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
            continue
        assert process.returncode == 0, errors
        assert digests(store) == wanted
        assert not store.with_name(store.name + ".partial").exists()
        finished += 1
        remove(store)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_is_obeyed_at_once_and_says_how_to_go_on(work: Path, how: signal.Signals) -> None:
    process = start(work)
    await_plan(work, process)
    asked = time.perf_counter()
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.perf_counter() - asked < 3
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    report = succeed(work, "extract", "-c", "tiny.yaml", *SEVERAL_SHARDS)
    assert report["rows"] == 48


def test_a_second_writer_is_refused_and_a_dead_ones_lock_is_free(work: Path) -> None:
    process = start(work)
    await_plan(work, process)
    process.send_signal(signal.SIGSTOP)  # a writer that takes its time
    said = complaint(work, "extract", "-c", "tiny.yaml", *SEVERAL_SHARDS, status=1)
    assert str(process.pid) in said
    process.kill()
    process.communicate()
    assert succeed(work, "extract", "-c", "tiny.yaml", *SEVERAL_SHARDS)["rows"] == 48


def test_the_partial_store_tells_how_far_it_is(work: Path, tmp_path: Path) -> None:
    folder = copy_of(work, tmp_path / "far")
    process = start(folder)
    await_plan(folder, process)
    process.kill()
    process.communicate()
    assert succeed(folder, "store", "info", "features/demo.zarr")["complete"] is False
