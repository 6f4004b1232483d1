"""Workers of a cluster on their nodes: what they take, what they see there, and what each node has done."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
def on_this_node(home: Path, needed: str) -> Iterator[None]:
    """Begin in the folder that the driver's relative paths start from; errors inside name the node.

    Args:
        home: That folder; a node without it goes on where it is, and says what it lacks.
        needed: What every node has to see.
    """
    with suppress(OSError):
        os.chdir(home)
    try:
        yield
    except (PipelineError, StoreError) as error:
        error.add_note(
            f"on the node {socket.gethostname()!r}, in the folder {str(Path.cwd())!r}: every node has to see {needed} "
            f"at the same path"
        )
        raise
