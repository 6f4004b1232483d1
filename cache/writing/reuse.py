"""Where finished features can be taken from: a store, or the finished shards of an interrupted run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache.description import TapSpec
from cache.errors import StoreError
from cache.formats.mapped import RowFiles, ZarrRows, row_bytes
from cache.formats.zarr_folder import OpenedStore
from cache.index import UInt8


@dataclass(frozen=True)
class Source:
    """Finished features by slot.

    Attributes:
        taps: Shapes and types.
        shard_rows: Slots in a shard, if shards can be shared.
        digest: (slots, 32) uint8 SHA-256 of the source pixels.
        extent: (slots, 2) float32, (0, 0) at empty slots.
        checksums: (slots,) uint32 by tap.
        set_aside: Reason by digest, for pixels known to give no feature.
        rows: The bytes.
    """

    taps: Mapping[str, TapSpec]
    shard_rows: int
    digest: UInt8
    extent: npt.NDArray[np.float32]
    checksums: Mapping[str, npt.NDArray[np.uint32]]
    set_aside: Mapping[bytes, str]
    rows: RowFiles

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """(slots,) which slots hold a row."""
        return self.extent[:, 0] > 0

    @property
    def in_shards(self) -> bool:
        """Whether its shard files can be shared."""
        return isinstance(self.rows, ZarrRows)

    def row(self, tap: str, slot: int) -> UInt8 | None:
        """Raw bytes of a row, (row_bytes,) uint8, or None if they are damaged."""
        try:
            data = row_bytes(self.rows, self.taps[tap], tap, slot)
        except (StoreError, FileNotFoundError):
            return None
        return data if crc32c(data.data) == self.checksums[tap][slot] else None


def store_source(opened: OpenedStore) -> Source | None:
    """A finished store as a source; None if it does not tell the digests of its pixels."""
    digest = opened.index.digest
    if digest is None:
        return None
    return Source(
        taps=opened.description.taps,
        shard_rows=opened.description.shard_rows,
        digest=digest,
        extent=opened.index.extent,
        checksums={tap: opened.index.checksums(tap) for tap in opened.description.taps},
        set_aside={},  # what failed once is tried again
        rows=opened.rows,
    )
