"""What a process that computes says to its C library, to OpenMP and to Python, before torch is loaded."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 256 * 2**20
_beside = 1


def set_up() -> None:
    """Set this process up, as a command or as a worker of a cluster; before torch is imported."""
    # Threads that wait for work sleep instead of spinning: on a shared machine spinning takes the cores from whoever
    # works. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_freed_memory()
    # torch makes a million objects when it is imported; to look for garbage after every 700 takes a sixth of the start.
    gc.set_threshold(10_000)


def keep_freed_memory() -> None:
    """Keep what this process frees for its next tensors, where the C library lets us; larger ones than 256 MiB go back.

    glibc gives blocks above 32 MiB back to the system, so each tensor of that size is mapped anew and cleared page by
    page: a tenth of a training step on a CPU, and a seventh of ViT-B's time at 1024 px in float32.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def share_machine(processes: int) -> None:
    """Say that so many processes of a job have room on this machine, so that each takes its part of the memory."""
    global _beside
    _beside = max(1, processes)


def sharing_machine() -> int:
    """How many processes of a job share this machine: as `torchrun` or `share_machine` says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _beside))
