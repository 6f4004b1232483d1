"""A small Ray cluster on this machine that its tests share, and a look at what they leave behind."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import time
import warnings
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
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # with it, the fork of Ray's server for a client hangs now and then
_SUBREAPER = 36  # of prctl: orphans of our children become ours, so that they can be found
_STORE_BYTES = 80 * 2**20
_MISSED_SOON = {  # a raylet that was killed refuses at once; by default Ray asks it for a quarter of a minute
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 250,
    "health_check_timeout_ms": 30_000,  # on a busy machine one that lives takes seconds
    "health_check_failure_threshold": 3,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("ray"))


class Nodes:
    """Nodes of a cluster, each with a processor, that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        client, agent = free_ports(2)
        ports = {"ray_client_server_port": client, "runtime_env_agent_port": agent}
        head = self._options(num_cpus=0, _system_config=_MISSED_SOON, **ports)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of logs that Ray opens for a client's server
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self.client_address = f"ray://127.0.0.1:{client}"
        self.standing = [self.add() for _ in range(3)]

    def add(self, **options: Any) -> Any:
        """Start a node."""
        return self._cluster.add_node(**self._options(**{"num_cpus": 1, **options}))

    def at_work(self) -> Any:
        """A node that has a worker."""
        return next(node for node in self.standing if workers(node.all_processes["raylet"][0].process.pid))

    def dismiss(self, node: Any) -> None:
        """Stop a node; the others are told."""
        self._cluster.remove_node(node)

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
    ours = ("/tmp/slca-ray-", *(("raylet", "gcs_server") if of_nodes else ()))
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


def workers(below: int | None = None) -> dict[int, str]:
    """Workers of a pool below a process or this one, by process: what Ray has named after an actor or its task."""
    own = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "SPILL", "RESTORE", "DELETE")
    named = {process: said.partition("ray::")[2] for process, said in of_ray(below).items() if said.startswith("ray::")}
    return {process: title for process, title in named.items() if not title.startswith(own)}


def of_ray(below: int | None = None) -> dict[int, str]:
    """Command lines of the descendants of a process or this one that are Ray's, by process."""
    found = {}
    for process in descendants(below or os.getpid()):
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


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, and that the system gives to nobody who asks for any."""
    found: list[int] = []
    for port in random.sample(range(25_000, 32_000), 100):
        with suppress(OSError), socket.create_server(("", port)):
            found.append(port)
        if len(found) == count:
            break
    return found
