"""The rows that a scan asks for, made when they are looked at: the digests are held once, as the scan's array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import cache
from pipeline.data import Image
from pipeline.data.scan import Scan


class Rows(Sequence[cache.Row]):
    """The readable samples of a scan, as rows of a store."""

    def __init__(self, seen: Scan) -> None:
        """Look at a scan."""
        self._seen = seen
        self._at = seen.rows

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, row: int) -> cache.Row: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[cache.Row]: ...
    def __getitem__(self, row: int | slice) -> cache.Row | Sequence[cache.Row]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        index = self._at[row]
        return cache.Row(self._seen.dataset.samples[index].id, self._seen.digests[index].tobytes())

    def __iter__(self) -> Iterator[cache.Row]:
        samples, digests = self._seen.dataset.samples, self._seen.digests
        for index in self._at.tolist():
            yield cache.Row(samples[index].id, digests[index].tobytes())

    @property
    def ids(self) -> Sequence[str]:
        """Name of each row."""
        samples = self._seen.dataset.samples
        return [samples[index].id for index in self._at.tolist()]

    def image(self, row: int) -> Image:
        """Decoded image of a row; see `Scan.image`."""
        return self._seen.image(int(self._at[row]))
