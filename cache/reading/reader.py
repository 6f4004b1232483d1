"""Reading a store: rows of any order into the caller's buffer, at memory speed, checked on the way.

Rows are copied from mapped files (`cache.reading.copying`), and each copy is compared with the crc32c in the index,
not with the one stored behind the row: so a shard file that was swapped, duplicated or left from an older version is
found as well as a flipped bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cache.description import PACKED, SCALE, TapSpec, load_json, taps_of
from cache.errors import DamagedRowError, FingerprintMismatchError, FormatError, StoreError, StoreNotFoundError
from cache.fingerprint import JSON, Fingerprint
from cache.formats.hdf5_file import open_hdf5
from cache.formats.mapped import Watch
from cache.formats.zarr_folder import OpenedStore, open_zarr
from cache.index import Row, UInt8
from cache.labels import Labels, parse_labels
from cache.packing import unpack
from cache.reading.copying import copy_rows
from cache.reading.selection import is_one, select_rows
from cache.reading.summary import summarise


def store_format(path: Path) -> Literal["zarr", "hdf5"]:
    """Format of the store at a path, by its suffix.

    Raises:
        StoreError: The suffix names none.
    """
    if path.suffix == ".zarr":
        return "zarr"
    if path.suffix in {".h5", ".hdf5"}:
        return "hdf5"
    message = f"{path} is no store: the name of one ends in .zarr, .h5 or .hdf5"
    raise StoreError(message)


_ATTEMPTS = 1000  # to open a store that is swapped meanwhile
_CACHED_NUMBERS = 1 << 15  # that are unpacked beside their place, where rows are short
_NUMBERS_AT_ONCE = 1 << 20  # of a packed tap, at least one row


def open_files(path: Path | str) -> OpenedStore:
    """Open the files of a finished store in either format, here or at a URL; see `open_store` for the errors.

    A store may be swapped for its next version at any moment. What was read of two versions fits nowhere, so opening
    begins again where that has happened meanwhile; only what is wrong with one version is an error.
    """
    if isinstance(path, str):
        from cache.reading.remote import open_remote

        return open_remote(path)
    for _ in range(_ATTEMPTS):
        watch = Watch(path)
        try:
            opened = _open_files(path)
        except StoreError:
            if not watch.replaced():
                raise
        else:
            if not watch.replaced():
                return opened
    message = f"{path} was replaced by other versions {_ATTEMPTS} times while it was opened; open it when it rests"
    raise StoreError(message)


def _open_files(path: Path) -> OpenedStore:
    """Open the files of one version."""
    kind = store_format(path)
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        begun = " (one was begun: run the same extract again to finish it)" if partial.exists() else ""
        message = f"there is no store at {path}{begun}; check the path, or run extract to make it"
        raise StoreNotFoundError(message)
    if path.is_dir() != (kind == "zarr"):
        message = f"{path} is a {'folder' if path.is_dir() else 'file'}, which a store named {path.suffix!r} is not"
        raise FormatError(message)
    return open_zarr(path) if kind == "zarr" else open_hdf5(Path(os.path.realpath(path)))


def open_store(path: str | os.PathLike[str], expect: Fingerprint | None = None) -> Store:
    """Open a finished store.

    Args:
        path: `NAME.zarr`, `NAME.h5` or `NAME.hdf5`, or the URL of one, which is read where it lies: `http://...`,
            `s3://...`. Rows that were read once are kept in `$FEATURE_STORE_CACHE`.
        expect: Refuse a store of any other fingerprint.

    Raises:
        StoreNotFoundError: There is none.
        FormatError: It is none, or its metadata are damaged.
        UntrustedStoreError: It asks for what a store never needs.
        FingerprintMismatchError: Its fingerprint is not the expected one; the message names the fields.
    """
    store = Store(path if isinstance(path, str) and "://" in path else Path(path))
    differences = store.fingerprint.differences(expect) if expect else ()
    if differences:
        shown = "; ".join(f"{d.field} is {d.ours!r} there, expected {d.theirs!r}" for d in differences[:8])
        message = f"{store.path} holds features of another fingerprint ({shown}); extract it again or name another one"
        raise FingerprintMismatchError(message, differences)
    return store


class Store:
    """A finished store, open for reading.

    It pickles by its path and opens again in the process that loads it; there it must still be the same version. It may
    be read from several threads at once. `store[rows]` reads all taps of some rows; `read` chooses taps, and fills
    buffers.

    Attributes:
        path: Where it lies: a path, or text for a URL.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the store at `path`."""
        self.path = path
        self._files: OpenedStore | None = open_files(path)
        self._version = self._files.description.checksum
        self._row_of: dict[str, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The path and the version, nothing that is open."""
        return {"path": self.path, "_version": self._version, "_files": None, "_row_of": None}

    @property
    def _opened(self) -> OpenedStore:
        files = self._files  # looked at once: another thread may close the store
        if files is None:
            files = open_files(self.path)
            if files.description.checksum != self._version:
                message = f"{self.path} was replaced by another version since it was opened; open it again"
                raise StoreError(message)
            self._files = files
        return files

    @property
    def ids(self) -> tuple[str, ...]:
        """Sample ids in row order."""
        return self._opened.index.ids

    @property
    def taps(self) -> Mapping[str, TapSpec]:
        """Shape and type by tap name."""
        return taps_of(self._opened.description.taps)

    @property
    def arrays(self) -> Mapping[str, TapSpec]:
        """Shape and type of every array: the taps, and behind each packed one what lies beside it."""
        return self._opened.description.taps

    @property
    def fingerprint(self) -> Fingerprint:
        """What the features depend on apart from the pixels."""
        return self._opened.description.fingerprint

    @property
    def provenance(self) -> Mapping[str, JSON]:
        """How the store came about; nothing depends on it."""
        return self._opened.description.provenance

    @property
    def version(self) -> str:
        """Hexadecimal SHA-256 over everything in the store: equal for equal content."""
        return self._version

    @property
    def digests(self) -> UInt8:
        """(rows, 32) uint8 SHA-256 of each row's source pixels; (0, 32) if the store does not tell."""
        digest = self._opened.index.digest
        return np.empty((0, 32), np.uint8) if digest is None else digest[self._opened.index.slot]

    @property
    def extents(self) -> npt.NDArray[np.float32]:
        """(rows, 2) float32 part of the grid's height and width that is image and not padding, in (0, 1]."""
        return self._opened.index.extent[self._opened.index.slot]

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """(rows,) int64 place of each row in the arrays; rows with identical pixels have the same."""
        return self._opened.index.slot

    @property
    def removed(self) -> int:
        """Rows of samples that were taken out or changed, and lie in the arrays until their shard is rewritten."""
        return int(self._opened.index.present.sum()) - len(np.unique(self._opened.index.slot))

    @property
    def labels(self) -> Labels | None:
        """Class names, labels and splits, where they were sent along."""
        text = self._opened.index.text("labels")
        if not text:
            return None
        where = f"{self.path}: labels"
        return parse_labels(load_json(text.encode(), where), len(self), where)

    @property
    def card(self) -> str:
        """What a stranger should know of the store, as Markdown."""
        return self._opened.index.text("card")

    @property
    def set_aside_rows(self) -> tuple[Row, ...]:
        """The samples that were asked for and gave no feature."""
        return tuple(Row(item["id"], bytes.fromhex(item["digest"])) for item in self._opened.index.set_aside)

    @property
    def set_aside(self) -> Mapping[str, str]:
        """Reason by id, for samples that were asked for and gave no feature."""
        return {item["id"]: item["reason"] for item in self._opened.index.set_aside}

    def __len__(self) -> int:
        return self._opened.description.rows

    def __repr__(self) -> str:
        return summarise(self)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._rows_by_id()

    def __getitem__(self, key: Any) -> dict[str, npt.NDArray[Any]]:
        """Read all taps of the rows that a key means.

        Args:
            key: A row number or an id for one row; a slice, a mask of `len(self)` booleans, or a sequence of row
                numbers or of ids for several. Negative numbers count from the end.

        Returns:
            By tap (C, h, w) for one row, and (n, C, h, w) for several.

        Raises:
            NoSuchRowError: There is no such row or id.
            DamagedRowError: See `read`.
        """
        found = self.read(select_rows(key, len(self), self._rows_by_id))
        return {tap: values[0] for tap, values in found.items()} if is_one(key) else found

    def _rows_by_id(self) -> dict[str, int]:
        """Row by id, in row order; made when it is first asked for."""
        if self._row_of is None:
            self._row_of = {name: row for row, name in enumerate(self.ids)}
        return self._row_of

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the maps; a later use opens the store again."""
        self._files = None

    def read(
        self,
        rows: Sequence[int] | npt.NDArray[np.integer[Any]],
        taps: Sequence[str] | None = None,
        out: Mapping[str, npt.NDArray[Any]] | None = None,
        verify: bool = True,
        dtype: Literal["float32", "stored"] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Copy rows into memory.

        Args:
            rows: Row numbers, 0 to `len(self) - 1`, in any order, repeats allowed.
            taps: Tap names; all by default.
            out: Buffers to fill, by tap: writable, C-contiguous, of shape (len(rows), C, h, w), for example views of
                pinned memory. Their type chooses what they are filled with: that of the tap's numbers
                (`TapSpec.numbers`), float32, or that of the array as it is stored. Allocated if not given.
            verify: Check every row's crc32c.
            dtype: Type of what is allocated: features as float32, or `"stored"`, every array as it lies there: int8
                with the scales as `TAP.scale` (n, C, 1, 1). None: the numbers, float16 where they are int8.

        Returns:
            By tap, (len(rows), C, h, w).

        Raises:
            DamagedRowError: Stored bytes are not those that were written; `ids` names the samples.
            StoreError: A tap, a row or a buffer is not what it must be, or the store was replaced meanwhile.
        """
        opened = self._opened
        slots = self._slots(opened, rows)
        if dtype not in (None, "float32", "stored"):
            message = f"dtype is {dtype!r}; give 'float32', 'stored', or None for the type that the store has"
            raise StoreError(message)
        every = self.arrays if dtype == "stored" else self.taps
        names = tuple(every) if taps is None else tuple(taps)
        filled = {name: self._buffer(name, len(slots), out, dtype) for name in names}
        scaled = [
            name + SCALE
            for name in names
            if self.arrays[name].dtype == "int8" and filled[name].dtype != self.arrays[name].array_dtype
        ]
        opened.rows.fetch([*names, *scaled], slots)  # all at once from where they lie
        damaged: set[int] = set()
        for name in names:
            if filled[name].dtype == self.arrays[name].array_dtype:
                damaged |= self._fill(opened, name, slots, filled[name], verify)
            else:
                damaged |= self._fill_numbers(opened, name, slots, filled[name], verify)
        if damaged:
            raise self._damage(opened, np.asarray(rows)[sorted(damaged)])
        return filled

    def _slots(self, opened: OpenedStore, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """(n,) slots of the rows asked for."""
        numbers = np.asarray(rows)
        count = opened.description.rows
        if numbers.size == 0:
            numbers = numbers.astype(np.int64)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or ((numbers < 0) | (numbers >= count)).any():
            message = f"rows must be whole numbers from 0 to {count - 1} in one dimension, got {rows!r:.200}"
            raise StoreError(message)
        slots: npt.NDArray[np.int64] = opened.index.slot[numbers]
        return slots

    def _buffer(
        self, name: str, count: int, out: Mapping[str, npt.NDArray[Any]] | None, dtype: str | None
    ) -> npt.NDArray[Any]:
        """The caller's buffer after a check, or a new one."""
        if name not in self.arrays:
            message = f"{self.path} has no tap {name!r}; it has {', '.join(map(repr, self.taps))}"
            raise StoreError(message)
        spec = self.arrays[name]
        shape = (count, *spec.shape)
        if out is None:
            wide = dtype == "float32" and not spec.holds_pixels
            return np.empty(shape, "float32" if wide else spec.array_dtype if dtype == "stored" else spec.numbers)
        if name not in out:
            message = f"out has no buffer for tap {name!r}; give one, or name the taps to read"
            raise StoreError(message)
        buffer = out[name]
        good = buffer.flags.c_contiguous and buffer.flags.writeable
        fitting = dict.fromkeys([spec.numbers, *([] if spec.holds_pixels else ["float32"]), spec.array_dtype])
        if buffer.shape != shape or buffer.dtype.name not in fitting or not good:
            kind = f"{'' if good else 'read-only or strided '}{buffer.dtype} array of shape {buffer.shape}"
            message = (
                f"out[{name!r}] is a {kind}; expected a writable, C-contiguous {' or '.join(fitting)} array of shape "
                f"{shape}"
            )
            raise StoreError(message)
        return buffer

    def _fill_numbers(
        self, opened: OpenedStore, name: str, slots: npt.NDArray[np.int64], buffer: npt.NDArray[Any], verify: bool
    ) -> set[int]:
        """Fill a buffer with the numbers of one tap that is stored in another type; returns which are damaged.

        Rows of some MiB at a time are copied, in the order in which they lie, and made numbers from there.
        """
        spec = opened.description.taps[name]
        scales = np.empty((len(slots), spec.channels, 1, 1), np.float32) if spec.dtype == "int8" else None
        damaged: set[int] = set()
        if scales is not None:
            damaged |= self._fill(opened, name + SCALE, slots, scales, verify)
        step = max(1, _NUMBERS_AT_ONCE // math.prod(spec.shape))
        stored = np.empty((min(step, len(slots)), *spec.shape), spec.array_dtype)
        order = np.argsort(slots, kind="stable")
        for first in range(0, len(slots), step):
            chosen = order[first : first + step]
            part = stored[: len(chosen)]
            bad = self._fill(opened, name, slots[chosen], part, verify)
            damaged |= {int(chosen[i]) for i in bad}
            _write_numbers(spec, part, None if scales is None else scales[chosen], buffer, chosen)
        return damaged

    def _fill(
        self, opened: OpenedStore, name: str, slots: npt.NDArray[np.int64], buffer: npt.NDArray[Any], verify: bool
    ) -> set[int]:
        """Copy the rows of one tap; returns the positions of damaged ones."""
        size = opened.description.taps[name].row_bytes
        target = buffer.reshape(-1).view(np.uint8).reshape(len(slots), size)
        expected = opened.index.checksums(name)[slots] if verify else None
        damaged = copy_rows(opened.rows, name, size, slots, target, expected)
        if damaged:
            opened.rows.forget(name, slots[sorted(damaged)])
        return damaged

    def _damage(self, opened: OpenedStore, rows: npt.NDArray[np.integer[Any]]) -> DamagedRowError:
        """The error that names the samples of damaged rows."""
        ids = list(dict.fromkeys(opened.index.ids[row] for row in rows.tolist()))
        shown = ", ".join(map(repr, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        remedy = "run 'store verify' for all damage and 'store repair' to encode them again"
        if isinstance(self.path, str):
            remedy = "read them again, which fetches them anew; if that is no help, they are damaged where they lie"
        message = f"{self.path}: the stored features of {shown} are damaged; {remedy}"
        return DamagedRowError(message, ids)


def _write_numbers(
    spec: TapSpec,
    stored: npt.NDArray[Any],
    scale: npt.NDArray[Any] | None,
    buffer: npt.NDArray[Any],
    rows: npt.NDArray[np.int64],
) -> None:
    """Write the numbers of stored rows to their places in a buffer."""
    if spec.dtype not in PACKED:
        buffer[rows] = stored
        return
    step = max(1, _CACHED_NUMBERS // math.prod(spec.shape))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        scales = None if scale is None else scale[part]
        if len(rows[part]) == 1:
            unpack(spec, stored[part], scales, buffer[rows[first]][None])
        else:
            numbers = np.empty((len(rows[part]), *spec.shape), buffer.dtype)
            unpack(spec, stored[part], scales, numbers)
            buffer[rows[part]] = numbers
