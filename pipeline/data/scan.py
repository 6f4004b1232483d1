"""What is in the data set right now: a digest of every image's pixels, remembered by file size and time.

A digest costs a decode. It is remembered beside the store (`NAME.seen.npz`, private to this machine, never part of
the store) under the sample's stamp, so that an unchanged data set is recognised without reading a pixel.
"""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data import Dataset, Image, pixel_digest
from pipeline.data.dataset import Source
from pipeline.errors import DataError, naming
from pipeline.overlap import ahead, threads
from pipeline.progress import Progress, silent

KEEP_BYTES = 1 << 30  # decoded images kept between the scan and the encoder, so that small data sets are decoded once
SAVE_EVERY_SECONDS = 60.0  # what a long scan has found is remembered this often, so that a stop costs no more
_ARRAY_BYTES = 256  # of an image in memory besides its pixels
_AT_ONCE = 1024  # files whose sizes and times a thread asks for in one go
_ASKING, _ASKED = 32, 16  # threads that wait for a server's answers, and files of each in one go

_UNREADABLE = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile)
"""What reading a memory that is not there or spoilt ends in."""

Digests = npt.NDArray[np.uint8]
Stamps = npt.NDArray[np.uint64]
Known = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Remembered:
    """What earlier runs found out about the samples of a data set.

    Attributes:
        stamps: uint64 (n,), keys of the stamps; 0 where a sample has none.
        digests: uint8 (n, 32), sha256 of each sample's pixels; zeros where nothing is known.
        known: bool (n,), where something is.
    """

    stamps: Stamps
    digests: Digests
    known: Known


@dataclass(frozen=True)
class Looked:
    """What a look at an image found.

    Attributes:
        index: Of the sample.
        digest: sha256 of its pixels; empty where it cannot be read.
        image: Its pixels, uint8 (H, W, 3), where they are here.
        error: Why it cannot be read.
    """

    index: int
    digest: bytes = b""
    image: Image | None = None
    error: DataError | None = None


Look = Callable[[Sequence[int]], Iterator[Looked]]
"""Looks at samples, by their indices, and finds each once, in any order."""


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
        return read_again(self.dataset.source, index, self.digests[index].tobytes(), self.dataset.samples[index].id)


def read_again(source: Source, index: int, digest: bytes, sample: str) -> Image:
    """Decoded image of a sample, uint8 (H, W, 3), whose pixels are still those of the scan.

    Args:
        source: Where the pixels are.
        index: Of the sample.
        digest: sha256 of its pixels when it was looked at.
        sample: Its name, for the message.

    Raises:
        DataError: It cannot be read any more, or has other pixels.
    """
    image = source.read(index)
    if pixel_digest(image) != digest:
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
    look: Look | None = None,
    wait: Callable[[Callable[[], bool]], None] | None = None,
    progress: Progress = silent,
) -> Scan:
    """Digest every image of a data set, decoding only those whose file changed since the last run.

    Args:
        dataset: The samples.
        memory: File that remembers digests between runs; read if it is there, then replaced.
        recheck: Decode all images and trust no stamp.
        workers: Decoding threads.
        strict: Raise at the first image that cannot be read.
        look: Who looks at the images; None for this process's own threads.
        wait: Waits, before anything is looked at, until another process has; told how to ask whether one has.
        progress: Called after each image.

    Raises:
        DataError: An image cannot be read and `strict` is set, or none can.
    """
    stamps = _stamps(dataset, workers)
    if wait is not None:
        wait(partial(_has_seen, memory, stamps))
    found = _look_up(stamps, memory)
    digests = found.digests
    known = np.zeros_like(found.known) if recheck else found.known
    result = Scan(dataset, digests, known)
    unknown = np.flatnonzero(~known).tolist()
    kept_bytes = 0
    reasons: dict[int, str] = {}
    saved = time.monotonic()
    looks = (look or partial(look_here, dataset.source, workers))(unknown)
    for done, seen in enumerate(looks, start=1):
        progress("scan", done, len(unknown))
        if seen.error is not None:
            if strict:
                raise seen.error
            reasons[seen.index] = str(seen.error)
            continue
        digests[seen.index] = np.frombuffer(seen.digest, np.uint8)
        known[seen.index] = True
        image = seen.image
        if image is not None and kept_bytes + image.nbytes + _ARRAY_BYTES <= KEEP_BYTES:
            kept_bytes += image.nbytes + _ARRAY_BYTES
            result._kept[seen.index] = image
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:
            _remember(stamps[known], digests[known], memory)
            saved = time.monotonic()
    result.set_aside.update({dataset.samples[index].id: reasons[index] for index in sorted(reasons)})
    if unknown or not _has_seen(memory, stamps):
        _remember(stamps[known], digests[known], memory, seen=_all_of(stamps))
    if not known.any():
        reason = next(iter(result.set_aside.values()), "it has no samples")
        message = f"none of the {len(dataset.samples)} images of {dataset.name!r} can be read: {reason}"
        raise DataError(message)
    return result


def look_at(source: Source, index: int) -> Looked:
    """Look at one image."""
    try:
        image = source.read(index)
    except DataError as error:
        return Looked(index, error=error)
    return Looked(index, pixel_digest(image), image)


def look_here(source: Source, workers: int, indices: Sequence[int]) -> Iterator[Looked]:
    """Look at images in threads of this process, in order."""
    with threads(workers, "scan") as pool:
        yield from ahead(partial(look_at, source), indices, pool, depth=2 * workers)


class Looker:
    """Looks at a slice of images at a time, for whoever keeps no images."""

    def __init__(self, source: Source, workers: int = 1) -> None:
        """Where the pixels are, and how many threads decode them, or wait for their server."""
        self._source, self._workers = source, workers

    def __call__(self, indices: tuple[int, ...]) -> tuple[Digests, dict[int, str]]:
        """Digests uint8 (n, 32), and the reason by index for those that cannot be read."""
        digests, reasons = np.zeros((len(indices), 32), np.uint8), {}
        for place, seen in enumerate(look_here(self._source, self._workers, indices)):
            if seen.error is not None:
                reasons[seen.index] = str(seen.error)
            else:
                digests[place] = np.frombuffer(seen.digest, np.uint8)
        return digests, reasons


def memory_of(store: Path) -> Path:
    """The file beside a store that remembers the digests of its images."""
    return store.with_name(store.name + ".seen.npz")


def remembered(dataset: Dataset, memory: Path, workers: int = 2) -> Remembered:
    """Look up every sample in the memory by its stamp, without reading a pixel.

    Args:
        dataset: The samples.
        memory: See `memory_of`; one that is not there or cannot be read knows nothing.
        workers: Threads that ask for the stamps; where a server is asked for each, there are more.
    """
    return _look_up(_stamps(dataset, workers), memory)


def _stamps(dataset: Dataset, workers: int) -> Stamps:
    """Keys of the stamps of all samples."""
    total = len(dataset.samples)
    stamps = np.empty(total, np.uint64)
    asking, at_once = (_ASKING, _ASKED) if dataset.asks_for_stamps else (workers, _AT_ONCE)

    def ask(start: int) -> None:
        end = min(start + at_once, total)
        stamps[start:end] = [_key(dataset.stamp(i)) for i in range(start, end)]

    with threads(asking, "stamp") as pool:
        for _ in ahead(ask, range(0, total, at_once), pool, depth=2 * asking):
            pass
    return stamps


def _look_up(stamps: Stamps, memory: Path) -> Remembered:
    """What a memory knows of samples with these stamps."""
    digests, known = np.zeros((len(stamps), 32), np.uint8), np.zeros(len(stamps), bool)
    try:
        with np.load(memory, allow_pickle=False) as file:
            keys, found = file["keys"], file["digests"]
    except _UNREADABLE:
        return Remembered(stamps, digests, known)
    if keys.dtype != stamps.dtype or found.dtype != np.uint8 or found.shape != (len(keys), 32) or not len(keys):
        return Remembered(stamps, digests, known)
    at = np.minimum(np.searchsorted(keys, stamps), len(keys) - 1)
    known = (keys[at] == stamps) & (stamps != 0)
    digests[known] = found[at[known]]
    return Remembered(stamps, digests, known)


def _all_of(stamps: Stamps) -> bytes:
    """What stands for a whole data set with these stamps."""
    return hashlib.sha256(stamps.tobytes()).digest()


def _has_seen(memory: Path, stamps: Stamps) -> bool:
    """Whether the last scan that ended has looked at all samples of just this data set, readable or not."""
    try:
        with np.load(memory, allow_pickle=False) as file:
            return bool(file["seen"].tobytes() == _all_of(stamps))
    except _UNREADABLE:
        return False


def _key(stamp: str | None) -> int:
    """64 bits that stand for a stamp; samples without one share 0, which is never looked up."""
    return 0 if stamp is None else int.from_bytes(hashlib.blake2b(stamp.encode(), digest_size=8).digest(), "little")


def _remember(stamps: Stamps, digests: Digests, memory: Path, seen: bytes = b"") -> None:
    """Write the memory, sorted by key, through a temporary name of this process's own; `seen` says that it is whole."""
    order = np.argsort(stamps)
    memory.parent.mkdir(parents=True, exist_ok=True)
    partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
    with naming(memory), partial.open("wb") as file:
        np.savez(file, keys=stamps[order], digests=digests[order], seen=np.frombuffer(seen, np.uint8))
    partial.replace(memory)
