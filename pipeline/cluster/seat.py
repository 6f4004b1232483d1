"""What runs in a worker's process: it arrives on a node, makes what it works with, and works."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any

from pipeline.process import set_up, share_machine

DISTRIBUTION = "slca-pipeline"
_LOOK_SECONDS = 0.5  # between two looks at whether its node's raylet is there


class Seat:
    """A worker in a process of its own, on some node."""

    def arrive(self) -> tuple[str, str]:
        """The node's id, and our version there: known before anything of the driver is read, which another may not."""
        import ray

        set_up()
        threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
        untyped: Any = ray
        here = untyped.get_runtime_context()
        node = next(node for node in untyped.nodes() if node["NodeID"] == here.get_node_id())
        share_machine(fitting(here.get_assigned_resources(), node["Resources"]))
        return here.get_node_id(), version_here()

    def begin(self, make: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        """Make the worker in the driver's folder, where the node has that."""
        with suppress(OSError):  # relative paths then lead nowhere, and what reads them says so
            os.chdir(folder)
        self._work = make()

    def answer(self) -> None:
        """Say that it lives."""

    def work(self, item: Any) -> tuple[Any, float]:
        """What the worker makes of an item, and the seconds that it took."""
        began = time.perf_counter()
        result = self._work(item)
        return result, time.perf_counter() - began


def _die_with_parent(parent: int) -> None:
    """End this process once its node's raylet is gone: at work, Ray's own look does not see that everywhere."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def fitting(asked: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """Workers that a node has room for, as far as nobody else is there.

    Args:
        asked: What each takes, by Ray's names (GPU, CPU).
        resources: What the node has.
    """
    rooms = [resources.get(kind, 0.0) / amount for kind, amount in asked.items() if amount]
    return math.floor(min(rooms) + 1e-6) if rooms else 1


def version_here() -> str:
    """The version of this package that is installed here; empty where only its source is there."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return ""
