"""The connection to a Ray cluster, and a cluster of this machine for one run; nothing of ours is left of either."""

from __future__ import annotations

import functools
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.folder import own_folder
from pipeline.errors import ClusterError, from_extra

LOCAL = "local"
"""The address of a cluster that is started on this machine for one run, and ends with it."""

_ANSWER_SECONDS = 10.0  # that a cluster has to let us in


@dataclass(frozen=True)
class Need:
    """What a worker needs of a node, and how many of them there may be.

    Attributes:
        gpus: A fraction shares one; None is one where some node has a GPU, else none.
        cpus: Processors; None is a fair share of a node beside each GPU, and one where no GPU is needed.
        min: Workers to ask for even while no node has room for them, so that a cluster that can grow does.
        max: Workers at most; None for as many as there is room for.
    """

    gpus: float | None = None
    cpus: float | None = None
    min: int = 1
    max: int | None = None


@contextmanager
def connected(address: str | None = None) -> Iterator[Cluster]:
    """Connect to a Ray cluster; nothing of ours is left there afterwards, whatever ends the block.

    Args:
        address: `auto` for the cluster that this machine belongs to, `ray://HOST:PORT`, `HOST:PORT`; None or `local`
            starts one on this machine, which dies with this process.

    Raises:
        ConfigError: The extra is not installed.
        ClusterError: There is no cluster at the address, or none could be started.
    """
    ray = _import_ray()
    local = address in (None, LOCAL)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    with ExitStack() as after:
        folder = str(after.enter_context(own_folder())) if local else ""
        after.callback(ray.shutdown)
        with _said_to_ray(), _signals_kept():
            try:
                if local:
                    with _environment(RAY_AUTH_TOKEN=_token()):  # else it leaves one in the home folder
                        ray.init(address=LOCAL, include_dashboard=False, _temp_dir=folder, **quiet)
                else:
                    _knock(address)
                    ray.init(address=address, **quiet)
            except Exception as error:  # some of ray's are bare ones
                raise ClusterError(_unreachable(address, local, error)) from error
        with _hushed(), ExitStack() as ending:
            yield Cluster(ray, local, ending)


class Cluster:
    """A Ray cluster that this process is connected to; made by `connected`."""

    def __init__(self, ray: Any, local: bool, ending: ExitStack) -> None:
        """Take over a connection, and what is to be done before it ends."""
        self.ray, self.local, self.ending = ray, local, ending
        self._names: dict[str, str] = {}

    def nodes(self) -> Sequence[Mapping[str, Any]]:
        """The nodes that live, as Ray describes them."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    def node_name(self, node_id: str) -> str:
        """What people call a node: its host, with the beginning of its id where several nodes are on one host."""
        if node_id not in self._names:
            nodes = self.ray.nodes()
            hosts = Counter(node["NodeManagerHostname"] for node in nodes)
            for node in nodes:
                host, number = node["NodeManagerHostname"], node["NodeID"]
                self._names.setdefault(number, host if hosts[host] == 1 else f"{host} ({number[:6]})")
        return self._names.get(node_id, node_id[:6])

    def settled(self, need: Need) -> Need:
        """A need with its defaults, as this cluster has them."""
        with_gpu = [node["Resources"] for node in self.nodes() if node["Resources"].get("GPU")]
        gpus = (1.0 if with_gpu else 0.0) if need.gpus is None else need.gpus
        cpus = need.cpus
        if cpus is None and gpus and with_gpu:
            fair = min(node.get("CPU", 0) / node["GPU"] for node in with_gpu) * gpus
            cpus = float(math.floor(fair)) if fair >= 1 else fair
        return Need(gpus, 1.0 if cpus is None else cpus, need.min, need.max)


def _unreachable(address: str | None, local: bool, error: Exception) -> str:
    """A message for a cluster that cannot be had."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[-1 if "Traceback" in str(error) else 0]  # a client's server sends its traceback
    if local:
        return f"no Ray cluster could be started on this machine: {reason}"
    return (
        f"there is no Ray cluster at {address!r} that lets us in: {reason.rstrip('.')}. Start one (`ray start "
        f"--head`), set RAY_AUTH_MODE=token if it asks for one, or leave the address out for one on this machine"
    )


def _knock(address: str | None) -> None:
    """Find out whether anybody listens at a host and port: Ray would wait there for minutes or for ever."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()


def _import_ray() -> Any:
    """Import ray without giving it a process's signals.

    Raises:
        ConfigError: It is not installed.
    """
    with _said_to_ray(), _signals_kept(), from_extra("Work on a cluster", "ray"):
        import ray
        import ray.exceptions
    return ray


def _said_to_ray() -> AbstractContextManager[None]:
    """Settings that Ray reads from the environment, where nobody has chosen others.

    It reports to nobody, leaves GPUs visible to workers that ask for none, and does not copy the folder of a driver
    that `uv run` has started to every node: data and stores lie there.
    """
    return _environment(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    )


@functools.cache
def _token() -> str:
    """What lets this process into its local clusters: one for all, because Ray reads it only once."""
    return secrets.token_hex(32)


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    """Set variables that are not set, for as long as the block lasts."""
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what nodes say of workers that die off the standard output, where Ray would print it in between reports.

    Ray has no setting for that, so its printer is taken out while the block lasts, as long as it has one of that name.
    """
    worker = sys.modules.get("ray._private.worker")
    printer = getattr(worker, "print_to_stdstream", None)
    if worker is None or printer is None:
        yield
        return
    vars(worker)["print_to_stdstream"] = lambda data, ignore_prefix=False: None
    try:
        yield
    finally:
        vars(worker)["print_to_stdstream"] = printer


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep this process's own answer to a request to stop, which Ray would replace by one of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
