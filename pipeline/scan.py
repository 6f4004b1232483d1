"""What is in the data set right now: a digest of every image's pixels, remembered by file size and time.

A digest costs a decode. It is remembered beside the store (`NAME.seen.npz`, private to this machine, never part of
the store) under the sample's stamp, so that an unchanged data set is recognised without reading a pixel.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data import Dataset, pixel_digest
from pipeline.errors import DataError
from pipeline.overlap import ahead, threads
from pipeline.progress import Progress, silent

KEEP_BYTES = 1 << 30  # decoded images kept between the scan and the encoder, so that small data sets are decoded once

Digests = npt.NDArray[np.uint8]


@dataclass
class Scan:
    """The readable samples of a data set and the digests of their pixels.

    Attributes:
        digests: uint8 (n, 32), sha256 of each sample's pixels; zeros where the image cannot be read.
        readable: bool (n,).
        set_aside: Reason by sample id, for the images that cannot be read.
    """

    dataset: Dataset
    digests: Digests
    readable: npt.NDArray[np.bool_]
    set_aside: dict[str, str] = field(default_factory=dict)
    _kept: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def rows(self) -> npt.NDArray[np.intp]:
        """Indices into `dataset.samples` of the images that can be read, in order."""
        return np.flatnonzero(self.readable)

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """Decoded image of a sample, uint8 (H, W, 3); one kept by the scan is handed over and forgotten.

        Raises:
            DataError: The image cannot be read any more, or its pixels are not those of the scan.
        """
        kept = self._kept.pop(index, None)
        if kept is not None:
            return kept
        image = self.dataset.read(index)
        if pixel_digest(image) != self.digests[index].tobytes():
            sample = self.dataset.samples[index].id
            message = f"sample {sample!r}: its image changed after the scan began; run the command again"
            raise DataError(message)
        return image


def scan(
    dataset: Dataset,
    memory: Path,
    *,
    recheck: bool = False,
    workers: int = 2,
    strict: bool = False,
    progress: Progress = silent,
) -> Scan:
    """Digest every image of a data set, decoding only those whose file changed since the last run.

    Args:
        dataset: The samples.
        memory: File that remembers digests between runs; read if it is there, then replaced.
        recheck: Decode all images and trust no stamp.
        workers: Decoding threads.
        strict: Raise at the first image that cannot be read.
        progress: Called after each image.

    Raises:
        DataError: An image cannot be read and `strict` is set.
    """
    total = len(dataset.samples)
    stamps = np.array([_key(dataset.stamp(i)) for i in range(total)], "S16")
    digests, known = _recall(stamps, memory) if not recheck else _nothing(total)
    result = Scan(dataset, digests, known)
    unknown = np.flatnonzero(~known).tolist()
    kept_bytes = 0

    def look(index: int) -> tuple[int, npt.NDArray[np.uint8] | DataError, bytes]:
        try:
            image = dataset.read(index)
        except DataError as error:
            return index, error, b""
        return index, image, pixel_digest(image)

    with threads(workers, "scan") as pool:
        for done, (index, image, digest) in enumerate(ahead(look, unknown, pool, depth=2 * workers), start=1):
            progress("scan", done, len(unknown))
            if isinstance(image, DataError):
                if strict:
                    raise image
                result.set_aside[dataset.samples[index].id] = str(image)
                continue
            digests[index] = np.frombuffer(digest, np.uint8)
            known[index] = True
            if kept_bytes + image.nbytes <= KEEP_BYTES:
                kept_bytes += image.nbytes
                result._kept[index] = image
    if unknown:
        _remember(stamps[known], digests[known], memory)
    return result


def _key(stamp: str | None) -> bytes:
    """16 bytes that stand for a stamp; samples without one share the empty key, which is never looked up."""
    return b"" if stamp is None else hashlib.blake2b(stamp.encode(), digest_size=8).hexdigest().encode()


def _nothing(total: int) -> tuple[Digests, npt.NDArray[np.bool_]]:
    return np.zeros((total, 32), np.uint8), np.zeros(total, bool)


def _recall(stamps: npt.NDArray[np.bytes_], memory: Path) -> tuple[Digests, npt.NDArray[np.bool_]]:
    """Digests of the samples whose stamp is remembered; a memory that cannot be read is as good as none."""
    digests, known = _nothing(len(stamps))
    try:
        with np.load(memory, allow_pickle=False) as file:
            keys, remembered = file["keys"], file["digests"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return digests, known
    if (
        keys.dtype != stamps.dtype
        or remembered.dtype != np.uint8
        or remembered.shape != (len(keys), 32)
        or not len(keys)
    ):
        return digests, known
    at = np.minimum(np.searchsorted(keys, stamps), len(keys) - 1)
    known = (keys[at] == stamps) & (stamps != b"")
    digests[known] = remembered[at[known]]
    return digests, known


def _remember(stamps: npt.NDArray[np.bytes_], digests: Digests, memory: Path) -> None:
    """Write the memory, sorted by key, through a temporary name of this process's own."""
    order = np.argsort(stamps)
    memory.parent.mkdir(parents=True, exist_ok=True)
    partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, keys=stamps[order], digests=digests[order])
    partial.replace(memory)
