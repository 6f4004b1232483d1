"""Workers of a cluster on their nodes: what they take, what they see there, and what each node has done."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache import StoreError
from pipeline.cluster import Need
from pipeline.config.schema import Config
from pipeline.errors import PipelineError


def need_of(config: Config) -> Need:
    """What a worker takes of a node, as configured."""
    asked = config.resources.ray
    gpus = 0.0 if config.resources.device == "cpu" else asked.gpus
    return Need(gpus, asked.cpus, asked.min, asked.max)


@contextmanager
def on_this_node(needed: str) -> Iterator[None]:
    """Errors inside name the node.

    Args:
        needed: What every node has to see.
    """
    try:
        yield
    except (PipelineError, StoreError) as error:
        error.add_note(
            f"on the node {socket.gethostname()!r}, in the folder {str(Path.cwd())!r}: every node has to see {needed} "
            f"at the same path"
        )
        raise
