"""MedMNIST archives: an `.npz` of any size, grey or RGB, with the splits that its makers drew.

The image arrays in an archive are compressed as a whole (16 GB for PathMNIST at 224 px), so a single image cannot be
read from it. On first use a split is unpacked into a nameless temporary file and mapped from there: the memory is the
page cache's, and one pass costs what `numpy.load` costs.
"""

from __future__ import annotations

import json
import lzma
import mmap
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import SPLITS, Dataset, Image, Label, Mask, Sample, Split, Task
from pipeline.data.layouts.medmnist_sets import SETS
from pipeline.errors import DataError
from pipeline.url import AnyPath, Url

_LOOK_BYTES, _COPY_BYTES = 1 << 16, 1 << 24  # fetched at once from a server: of labels and headers, of images


def load_medmnist(
    path: AnyPath, *, class_names: tuple[str, ...] = (), task: Task | None = None, masks: AnyPath | None = None
) -> Dataset:
    """Load a MedMNIST archive, or one in its layout.

    Ids are `train/000123`: split and position. MedMNIST does not say which images share a patient, so every image is
    its own group.

    Args:
        path: An `.npz` file with `{train,val,test}_images`, uint8 (n, S, S) or (n, S, S, 3), and `{...}_labels`,
            integers (n, 1), or (n, classes) of 0 and 1; or its URL, of a server that sends parts of files.
        class_names: By class number; known for the official sets (by file name), else `class 0`, `class 1`, ...
        task: What the labels mean; known for the official sets, else from the shape and number of labels.
        masks: An `.npz` file with `{train,val,test}_masks` of the same images, integers or bool (n, H, W); non-zero is
            the finding. MedMNIST has none; None for none.

    Raises:
        DataError: A file is missing, damaged, or not of this layout.
        UnreachableError: The server behind a URL does not answer.
    """
    known = SETS.get(path.stem.rsplit("_", 1)[0]) or SETS.get(path.stem)
    samples: list[Sample] = []
    shapes: dict[Split, tuple[int, ...]] = {}
    columns = 1
    known_masks = None if masks is None else _masks(masks)
    for split in SPLITS:
        labels = _labels(path, split)
        shapes[split] = _image_shape(path, split)
        if shapes[split][0] != len(labels):
            message = f"{path}: {split} has {shapes[split][0]} images and {len(labels)} labels; download it again"
            raise DataError(message)
        if known_masks is not None and len(known_masks[split]) != len(labels):
            message = f"{masks}: {split} has {len(known_masks[split])} masks, and {path} {len(labels)} images"
            raise DataError(message)
        columns = max(columns, labels.shape[1])
        values: list[Label] = labels[:, 0].tolist() if labels.shape[1] == 1 else [tuple(v) for v in labels.tolist()]
        ids = (f"{split}/{i:06d}" for i in range(len(values)))
        samples += [Sample(id, label, split, id) for id, label in zip(ids, values, strict=True)]
    if not class_names:
        count = columns if columns > 1 else 1 + max((s.label for s in samples if isinstance(s.label, int)), default=0)
        class_names = known.class_names if known else tuple(f"class {k}" for k in range(count))
    if task is None:
        guess: Task = "multilabel" if columns > 1 else "binary" if len(class_names) == 2 else "multiclass"
        task = known.task if known else guess
    return Dataset(path.stem, tuple(samples), class_names, task, _Archive(path, shapes, known_masks))


Masks = dict[Split, npt.NDArray[np.bool_]]


class _Archive:
    """Images of the archive's splits, one after another in the order train, val, test."""

    def __init__(self, path: AnyPath, shapes: dict[Split, tuple[int, ...]], masks: Masks | None = None) -> None:
        self._path = path
        self._shapes = shapes
        self._masks = masks
        self._maps: dict[Split, npt.NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def read(self, index: int) -> Image:
        """Pixels of a sample, uint8 (S, S, 3); the first read of a split unpacks it.

        Raises:
            DataError: The archive is damaged, or there is no room to unpack it.
        """
        split, row = self._locate(index)
        with self._lock:
            if split not in self._maps:
                self._maps[split] = _unpacked(self._path, split, self._shapes[split])
        image = self._maps[split][row]
        return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image.copy()

    def stamp(self, index: int) -> str | None:
        """Name, size, times (or a server's version) of the archive, and the row in it; None where these are unknown."""
        if isinstance(self._path, Url):
            mark = self._mark
            return None if mark is None else json.dumps([self._path.name, mark, *self._locate(index)])
        try:
            status = self._path.stat()
        except OSError:
            return None
        state = status.st_size, status.st_mtime_ns, status.st_ctime_ns
        return json.dumps([self._path.name, *state, *self._locate(index)])

    @cached_property
    def _mark(self) -> str | None:
        """What the server says of the archive's version; asked once."""
        return self._path.mark() if isinstance(self._path, Url) else None

    def mask(self, index: int) -> Mask | None:
        """The finding of a sample, bool (H, W); None where no masks were given."""
        if self._masks is None:
            return None
        split, row = self._locate(index)
        mask: Mask = self._masks[split][row]
        return mask

    def _locate(self, index: int) -> tuple[Split, int]:
        row = index
        for split in SPLITS:
            count = self._shapes[split][0]
            if row < count:
                return split, row
            row -= count
        message = f"{self._path}: there is no sample {index}"
        raise IndexError(message)

    def __reduce__(self) -> tuple[type[_Archive], tuple[AnyPath, dict[Split, tuple[int, ...]], Masks | None]]:
        return _Archive, (self._path, self._shapes, self._masks)  # maps and locks stay in their process


@contextmanager
def _member(path: AnyPath, name: str, block_bytes: int = _LOOK_BYTES) -> Iterator[IO[bytes]]:
    """Open one array of an archive for reading; what is wrong with the archive becomes a `DataError`."""
    try:
        with (
            path.ranges(block_bytes) if isinstance(path, Url) else path.open("rb") as file,
            zipfile.ZipFile(file) as archive,
            archive.open(f"{name}.npy") as stream,
        ):
            yield stream
    except FileNotFoundError:
        message = f"{path}: there is no such file; `pipeline prepare` fetches it, or put it there"
        raise DataError(message) from None
    except KeyError:
        message = (
            f"{path}: the archive has no array {name!r}; expected MedMNIST's train, val and test images and labels"
        )
        raise DataError(message) from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        message = (
            f"{path}: {name!r} cannot be read ({error}); the file is damaged or no MedMNIST archive: fetch it again"
        )
        raise DataError(message) from error


def _labels(path: AnyPath, split: Split) -> npt.NDArray[np.int64]:
    """Labels of a split, int64 (n, columns)."""
    with _member(path, f"{split}_labels") as stream:
        labels = np.lib.format.read_array(stream, allow_pickle=False)
    if labels.ndim == 1:
        labels = labels[:, None]
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        message = f"{path}: {split}_labels is {labels.dtype} {labels.shape}; expected integers (n, 1) or (n, classes)"
        raise DataError(message)
    return labels.astype(np.int64)


def _masks(path: AnyPath) -> Masks:
    """Masks by split, bool (n, H, W)."""
    found: Masks = {}
    for split in SPLITS:
        with _member(path, f"{split}_masks") as stream:
            masks = np.lib.format.read_array(stream, allow_pickle=False)
        if masks.ndim != 3 or masks.dtype.kind not in "iub":
            message = f"{path}: {split}_masks is {masks.dtype} {masks.shape}; expected integers or bool (n, H, W)"
            raise DataError(message)
        found[split] = masks != 0
    return found


def _image_shape(path: AnyPath, split: Split) -> tuple[int, ...]:
    """Shape of a split's images from the header alone, (n, S, S) or (n, S, S, 3)."""
    with _member(path, f"{split}_images") as stream:
        shape, fortran, dtype = _header(stream)
    if dtype != np.uint8 or fortran or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)) or 0 in shape[1:]:
        message = f"{path}: {split}_images is {dtype} {shape}; expected uint8 (n, S, S) or (n, S, S, 3)"
        raise DataError(message)
    return shape


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and type of a `.npy` stream, which is left at the first value."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _unpacked(path: AnyPath, split: Split, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """All images of a split, mapped from a temporary file without a name that lives as long as the array."""
    if not shape[0]:
        return np.empty(shape, np.uint8)
    try:
        with tempfile.TemporaryFile() as scratch, _member(path, f"{split}_images", _COPY_BYTES) as stream:
            _header(stream)
            shutil.copyfileobj(stream, scratch, 1 << 20)
            scratch.flush()
            view = mmap.mmap(scratch.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        size_mib = int(np.prod(shape)) / 2**20
        message = (
            f"{path}: {split} cannot be unpacked ({error.strerror}): {size_mib:.0f} MiB are needed in "
            f"{tempfile.gettempdir()}; make room or set TMPDIR to a folder that has it"
        )
        raise DataError(message) from error
    if len(view) != int(np.prod(shape)):
        message = f"{path}: {split}_images holds {len(view)} bytes for {shape}; the file is damaged: fetch it again"
        raise DataError(message)
    return np.frombuffer(view, np.uint8).reshape(shape)
