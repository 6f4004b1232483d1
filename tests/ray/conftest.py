"""A small Ray cluster on this machine that its tests share, and a look at what they leave behind."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import prepared, work
from tests.ray.studied import alone, extracted

__all__ = ["alone", "extracted", "prepared", "work"]

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # read when ray is imported
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112  Ray's own name; other programs on this machine may fill its memory
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  on a busy machine the tests would wait for their workers
_SUBREAPER = 36  # of prctl: orphans of our children become ours, so that they can be found
_STORE_BYTES = 80 * 2**20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("ray"))


class Nodes:
    """Nodes of a cluster, each with a processor, that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=self._options(num_cpus=0))
        self.address: str = self._cluster.address
        self.standing = [self.add() for _ in range(3)]

    def add(self, **options: Any) -> Any:
        """Start a node."""
        return self._cluster.add_node(**self._options(**{"num_cpus": 1, **options}))

    def kill(self, node: Any) -> None:
        """Kill a raylet and all that it has, without a word to anybody."""
        self._cluster.remove_node(node, allow_graceful=False)

    def restore(self) -> None:
        """Have three nodes again."""
        alive = [node for node in self.standing if node in self._cluster.worker_nodes]
        self.standing = [*alive, *(self.add() for _ in range(3 - len(alive)))]

    def shutdown(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()

    @staticmethod
    def _options(**options: Any) -> dict[str, Any]:
        return {"object_store_memory": _STORE_BYTES, "include_dashboard": False, **options}


@pytest.fixture(scope="session")
def shared_nodes() -> Iterator[Nodes]:
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    nodes = Nodes()
    yield nodes
    nodes.shutdown()
    left = what_is_left(of_nodes=True)
    assert not left, f"processes of Ray are left behind: {left}"


@pytest.fixture
def nodes(shared_nodes: Nodes) -> Nodes:
    """Three nodes and a head without a processor; a test may kill and add some."""
    shared_nodes.restore()
    return shared_nodes


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test leaves no worker of ours on the shared cluster, and nothing at all of a cluster of its own."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    yield
    left = what_is_left()
    assert not left, f"processes of Ray are left behind: {left}"


def what_is_left(*, of_nodes: bool = False) -> dict[int, str]:
    """Workers of ours and local clusters, and the shared nodes if asked for, that live on for seconds; then killed."""
    ours = ("/tmp/ray-", *(("raylet", "gcs_server") if of_nodes else ()))
    give_up = time.monotonic() + 10
    while True:
        left = {process: said for process, said in of_ray().items() if any(name in said for name in ours)}
        left |= workers()
        if not left or time.monotonic() > give_up:
            break
        time.sleep(0.1)
    for process in left:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return left


def workers() -> dict[int, str]:
    """Workers of a pool, by process: what Ray has named after an actor or its task."""
    own = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "SPILL", "RESTORE", "DELETE")
    titles = {process: said.partition("ray::")[2] for process, said in of_ray().items() if said.startswith("ray::")}
    return {process: title for process, title in titles.items() if not title.startswith(own)}


def of_ray() -> dict[int, str]:
    """Command lines of this process's descendants that are Ray's, by process."""
    found = {}
    for process in descendants(os.getpid()):
        with suppress(OSError):
            said = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "ray::" in said or "/ray/" in said:
                found[process] = said[:300]
    return found


def descendants(process: int) -> list[int]:
    """Children of a process, and theirs."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found
