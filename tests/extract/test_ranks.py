"""Several processes on one store: the bytes of one process, also when one of them is killed half-way."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import cache
from tests import warm

from .run_rank import COUNT


def start(store: Path, rank: int, world: int, seconds: float, count: int = COUNT) -> warm.Child:
    return warm.start("tests.extract.run_rank", store, rank, world, seconds, count)


def finish(process: warm.Child) -> int:
    """How many images a process encoded."""
    return counts(process)[0]


def counts(process: warm.Child) -> tuple[int, int]:
    """How many images a process encoded and how many it read."""
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    encoded, read = map(int, said.split())
    return encoded, read


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("alone") / "s.zarr"
    assert finish(start(store, 0, 1, 0.0)) == COUNT
    return files(store)


def test_four_processes_make_the_bytes_of_one(tmp_path: Path, alone: dict[str, bytes]) -> None:
    store = tmp_path / "s.zarr"
    done = [counts(p) for p in [start(store, rank, 4, 0.3) for rank in range(4)]]
    encoded = [count for count, _ in done]
    assert sum(encoded) == COUNT
    assert done[0][1] == COUNT  # the leader looks at every image once,
    assert all(read == count for count, read in done[1:])  # the others at their own
    assert sum(count > 0 for count in encoded) > 1, encoded
    assert files(store) == alone


def test_an_update_too_is_looked_at_by_the_leader_alone(tmp_path: Path, alone: dict[str, bytes]) -> None:
    store = tmp_path / "s.zarr"
    assert finish(start(store, 0, 1, 0.0, COUNT // 2)) == COUNT // 2
    done = [counts(p) for p in [start(store, rank, 3, 0.3) for rank in range(3)]]
    assert sum(count for count, _ in done) == COUNT // 2
    assert done[0][1] == COUNT // 2
    assert all(read == count for count, read in done[1:])
    assert files(store) == alone


@pytest.mark.parametrize("victim", [2, 0], ids=["a helper dies", "the leader dies"])
def test_what_a_killed_process_leaves_is_done_by_the_others_or_the_next_run(
    tmp_path: Path, alone: dict[str, bytes], victim: int
) -> None:
    store = tmp_path / "s.zarr"
    processes = [start(store, rank, 4, 0.5) for rank in range(4)]
    shards = tmp_path / "s.zarr.partial"
    while not list(shards.rglob("c.*")):  # the first shard is there
        ended = [p for p in processes if p.poll() is not None]
        assert not ended, ended[0].communicate()
        time.sleep(0.02)
    processes[victim].kill()
    for rank, process in enumerate(processes):
        if rank == victim:
            process.communicate()
        else:
            finish(process)
    if victim == 0:
        assert not store.exists()
        assert finish(start(store, 0, 1, 0.0)) < COUNT
    assert files(store) == alone
    assert cache.verify(store) == ()
