"""What stage one is to leave: the contents of the store and its rows, and whether a store holds just that already.

Imports no torch: that nothing has changed is told from file sizes and times in less time than importing it takes.
Anything but a plain yes (a changed file, an image that could not be read, an interrupted run, another fingerprint) is
left to `pipeline.extract.extract`, which finds out more and says it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

import cache
from pipeline import image_tap, mask_tap
from pipeline.data import Dataset, Image, Mask
from pipeline.data.scan import Digests, Scan
from pipeline.errors import DataError
from pipeline.overlap import ahead, threads
from pipeline.progress import Progress, silent


@dataclass(frozen=True)
class Contents:
    """What a store holds of each sample, and what that depends on.

    Attributes:
        encoder: What the encoder answers for: weights, preprocessing, precision, taps and pool.
        shapes: (C, h, w) of each of its taps.
        reading: How files become RGB where that is a choice (see `pipeline.data.reading_rules`).
        dtype: Type of the stored numbers; see `cache.TapSpec`.
        image_px: Side of the images stored beside the features; None for none.
    """

    encoder: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int, int]]
    reading: Mapping[str, Any]
    dtype: str = "float16"
    image_px: int | None = None

    @cached_property
    def fingerprint(self) -> cache.Fingerprint:
        """Everything that the stored numbers depend on, apart from the source pixels that each row names itself."""
        rest = {"reading": dict(self.reading), "dtype": self.dtype, **image_tap.describe(self.image_px)}
        return cache.Fingerprint({**self.encoder, **rest})

    @cached_property
    def taps(self) -> Mapping[str, cache.TapSpec]:
        """The arrays of the store, images among them."""
        features = {
            name: cache.TapSpec(*shape, cache.type_for(shape, mask_tap.dtype_of(name, self.dtype)))
            for name, shape in self.shapes.items()
        }
        return features | image_tap.specify(self.image_px)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, all taps together, with what lies beside packed ones."""
        return sum(array.row_bytes for array in cache.arrays_of(self.taps).values())


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

    def samples_of(self, rows: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...], Digests]:
        """Of some rows the indices of their samples, their names, and the digests uint8 (n, 32) of their images."""
        indices = self._at[np.asarray(rows, np.intp)]
        names = tuple(self._seen.dataset.samples[index].id for index in indices.tolist())
        return tuple(indices.tolist()), names, self._seen.digests[indices]

    @property
    def digests(self) -> Digests:
        """uint8 (n, 32), sha256 of the pixels of each row's image."""
        return self._seen.digests[self._at]

    @property
    def all_digests(self) -> Digests | None:
        """The digests where every sample of the data set has a row, else None."""
        return self._seen.digests if self._seen.readable.all() else None

    @property
    def data_set(self) -> str:
        """Name of the data set."""
        return self._seen.dataset.name

    @property
    def set_aside(self) -> Mapping[str, str]:
        """Reason by sample id, for the images that cannot be read and have no row."""
        return self._seen.set_aside

    def image(self, row: int) -> Image:
        """Decoded image of a row; see `Scan.image`."""
        return self._seen.image(int(self._at[row]))

    def mask(self, row: int) -> Mask:
        """Mask of a row's sample.

        Raises:
            DataError: It has none.
        """
        return mask_of(self._seen.dataset, int(self._at[row]))


def mask_of(dataset: Dataset, index: int) -> Mask:
    """Mask of a sample.

    Raises:
        DataError: It has none.
    """
    mask = dataset.mask(index)
    if mask is None:
        message = f"sample {dataset.samples[index].id!r} has no mask: give it one, or leave it out of the data set"
        raise DataError(message)
    return mask


def masks_sha256(
    mask: Callable[[int], Mask], ids: Sequence[str], *, workers: int = 2, progress: Progress = silent
) -> str:
    """Digest of the masks of all rows, read in order.

    Args:
        mask: Reads that of a row.
        ids: Name of each row.
        workers: Decoding threads.
        progress: Called after each mask.
    """
    digest = hashlib.sha256()
    with threads(workers, "mask") as pool:
        masks = ahead(mask, range(len(ids)), pool, depth=4 * workers)
        for number, (found, sample) in enumerate(zip(masks, ids, strict=True)):
            digest.update(f"{sample} {found.shape} ".encode() + np.packbits(found).tobytes())
            progress("mask", number + 1, len(ids))
    return digest.hexdigest()


def unchanged(
    dataset: Dataset,
    path: Path,
    wanted: Contents,
    digests: Digests | None,
    progress: Progress = silent,
) -> bool:
    """Say whether a store holds exactly this data set; False where that is not sure.

    Args:
        dataset: The samples, in the order that the rows must have.
        path: Of the store.
        wanted: What the store must hold.
        digests: uint8 (n, 32), sha256 of each sample's pixels; None where some are not known.
        progress: Told that there is nothing to encode.
    """
    if not path.exists() or path.with_name(path.name + ".partial").exists() or digests is None:
        return False
    try:
        with cache.open_store(path) as store:
            same = (
                dict(store.taps) == dict(wanted.taps)
                and not store.fingerprint.differences(wanted.fingerprint)
                and not store.set_aside
                and store.ids == tuple(sample.id for sample in dataset.samples)
                and bool((store.digests == digests).all())
            )
    except cache.StoreError:
        return False
    if same:
        progress("plan", 1, 1, encode=0, reuse=len(dataset.samples))
    return same


def refuse_another_data_set(path: Path, wanted: cache.Fingerprint, rows: Rows) -> None:
    """Refuse to swap out a sound store of which not one row would be kept."""
    try:
        store = cache.open_store(path)
    except cache.StoreError:
        return  # none there, or one that the writer has its own words for
    with store:
        if store.fingerprint.differences(wanted) or not len(store):
            return
        held = np.ascontiguousarray(store.digests).view(np.uint64)
        if not len(held):
            message = (
                f"{path} holds {len(store)} rows and tells no digests of their pixels, so all of them would go. Name "
                f"another store.path, or swap it out with --replace"
            )
            raise DataError(message)
        asked = rows.digests.view(np.uint64)
        if not np.isin(asked[:, 0], held[:, 0]).any():
            message = (
                f"{path} holds {len(store)} rows, and none of the {len(asked)} images of {rows.data_set!r} is "
                f"among them: it seems to be another data set's. Name another store.path, or swap it out with --replace"
            )
            raise DataError(message)
