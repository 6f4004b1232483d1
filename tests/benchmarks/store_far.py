"""Reading a store that is not in memory: from a disk whose pages were dropped, beside plain sequential reading."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import cache

BLOCK_BYTES = 4 << 20
TURNS = 5


def drop(store: Path) -> None:
    """Make the system forget the pages of a store, which needs no root; maps of them must be closed."""
    for file in (file for file in store.rglob("*") if file.is_file()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def sequential(store: Path) -> float:
    """Seconds to read the files of all features from their first byte to their last, 4 MiB at a time."""
    block, start = bytearray(BLOCK_BYTES), time.perf_counter()
    for path in sorted(store.glob("neck*/c.*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - start


def epoch(store: Path, seed: int, batch: int) -> float:
    """Seconds to read every row once in batches of another order, checked, as float16."""
    opened = cache.open_store(store)
    tap, order = opened.taps["neck"], np.random.default_rng(seed).permutation(len(opened))
    buffer: dict[str, np.ndarray[Any, Any]] = {"neck": np.zeros((batch, *tap.shape), tap.numbers)}
    start = time.perf_counter()
    for first in range(0, len(order) - batch + 1, batch):
        opened.read(order[first : first + batch], out=buffer)
    return time.perf_counter() - start


def cold(stores: dict[str, Path], batch: int) -> dict[str, float]:
    """Time of plain sequential reading over that of a shuffled epoch, both from the disk, by store; medians of turns.

    A store larger than memory is read so in every epoch. One above 1 is read faster than its files from end to end.
    """
    spent: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in stores}
    for turn in range(TURNS):
        for name, path in stores.items():
            drop(path)
            spent[name][0].append(sequential(path))
            drop(path)
            spent[name][1].append(epoch(path, turn, batch))
    found = {}
    for name, (plain, shuffled) in spent.items():
        found[f"cold_{name}_of_sequential"] = statistics.median(plain) / statistics.median(shuffled)
        found[f"cold_{name}_rows_per_second"] = len(cache.open_store(stores[name])) / statistics.median(shuffled)
    return found
