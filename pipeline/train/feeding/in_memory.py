"""Decoded images and features in memory, shared by the feeds of many runs: each is loaded once, when first asked for.

A row is filled when a feed first needs it, so a run on a tenth of the training set decodes a tenth. The price is that
memory is set aside for the whole split at once; on a CPU the system hands it out only as it is filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache import Store
from pipeline.data import Dataset, Split
from pipeline.process import sharing_machine

Ints = npt.NDArray[np.int64]


class Held:
    """Rows of one kind in memory, of which those that were asked for are there.

    Args:
        rows: How many there can be.
        shape: Of one row.
        dtype: Of its numbers.
        device: Where they are.
        channels_last: Lay rows (C, h, w) out with their channels together.

    Attributes:
        row_bytes: Size of one row.
        digests: (rows, 32) uint8, sha256 of what each row was made from, where that is known.
    """

    def __init__(
        self,
        rows: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        channels_last: bool = False,
    ) -> None:
        self.row_bytes = math.prod(shape) * dtype.itemsize
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._shape, self._dtype, self._device = (rows, *shape), dtype, device
        self.digests = np.zeros((rows, 32), np.uint8)
        self._there = np.zeros(rows, bool)

    @cached_property
    def values(self) -> Tensor:
        """(rows, *shape), memory for which is set aside when first asked for; rows that were put are meaningful."""
        return torch.empty(self._shape, dtype=self._dtype, device=self._device, memory_format=self._layout)

    def lacking(self, rows: Ints) -> Ints:
        """Tell which of some rows are not there yet, in their order."""
        return rows[~self._there[rows]]

    def put(self, rows: Ints, values: Tensor, digests: Iterable[bytes] = ()) -> None:
        """Put rows (n, *shape)."""
        self.values[torch.from_numpy(rows).to(self._device)] = values.to(self._device)
        for row, digest in zip(rows, digests, strict=False):
            self.digests[row] = np.frombuffer(digest, np.uint8)
        self._there[rows] = True


class Holdings:
    """What feeds of the same data sets and stores hold together; one for itself alone has one of its own."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Held] = {}
        self._of: list[object] = []  # what the keys name by id, kept so that no other object takes that id

    def images(self, dataset: Dataset, split: Split, image_px: int, device: torch.device) -> Held:
        """Images of a split, resized: (samples of the split, 3, image_px, image_px) uint8."""
        rows, shape = len(dataset.indices(split)), (3, image_px, image_px)
        key = (id(dataset), split, image_px, device)
        return self._get(key, dataset, lambda: Held(rows, shape, torch.uint8, device))

    def features(self, dataset: Dataset, split: Split, store: Store, tap: str, device: torch.device) -> Held:
        """An array of the store for a split: (samples of the split, C, h, w), channels together as SLCA reads them."""
        spec, rows = store.arrays[tap], len(dataset.indices(split))
        shape, dtype = (spec.channels, spec.height, spec.width), getattr(torch, spec.dtype)
        key = (id(dataset), split, id(store), tap, device)
        return self._get(key, (dataset, store), lambda: Held(rows, shape, dtype, device, channels_last=True))

    def _get(self, key: tuple[object, ...], of: object, make: Callable[[], Held]) -> Held:
        if key not in self._held:
            self._held[key] = make()
            self._of.append(of)
        return self._held[key]


def free_host_bytes() -> int:
    """Say how much memory this process may take: its part of what the machine has free, or a container if that is less.

    Processes that share a machine, as those of `torchrun` and the workers of a cluster, take equal parts.
    """
    free: list[int | None] = [
        int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")
    ]
    free += [
        _left_in("memory.max", "memory.current"),
        _left_in("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ]
    known = [count for count in free if count is not None]
    return min(known, default=4 * 2**30) // sharing_machine()


def _left_in(limit: str, used: str, folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container has left, bytes; None where it has no limit. Files that it has read can be let go again."""
    most, taken = (_lines(folder / name)[:1] for name in (limit, used))
    if not (most and most[0].isdigit()):
        return None
    stat = dict(line.split() for line in _lines((folder / used).with_name("memory.stat")) if line)
    files = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, int(most[0]) - max(0, int(taken[0] if taken else 0) - files))


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().split("\n")
    except OSError:
        return []
