"""Reading a store where it lies, over http or from a bucket: only the rows that are asked for travel, and only once.

Description and index are fetched when the store is opened. Rows go into sparse files of the same layout in a folder of
this machine, from which they are read like any local store, checksums included. For one batch at most two ranges are
requested of each shard: the missing rows are cut at their widest gap, and what lies between them comes along.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.description import Description, TapSpec
from cache.errors import FormatError, StoreError, StoreNotFoundError
from cache.formats.hdf5_file import Header, parse_block, user_block_size
from cache.formats.mapped import MAX_MAPS, Int64, MappedFile, Places
from cache.formats.zarr_folder import OpenedStore, parse_root
from cache.formats.zarr_layout import CHECKSUM_BYTES, index_chunk_name, shard_name, stored_places
from cache.index import Index, UInt8, check_size
from cache.reading.ranges import RemoteFile
from cache.reading.shard_copy import PASSING, ShardCopy, disk_errors, gone

_ROOT_BYTES = 1 << 20
_FIRST_BYTES = 1 << 14
_TRIES = 4

PUSHED_FILE = "store.h5"
"""Name of a store that is one file, in the folder that a push makes for it."""


class _Asked(threading.local):
    """What a thread has fetched last, to hand out no map without it: places by shard of one tap."""

    tap = ""
    places: Mapping[int, Int64] = {}


class RemoteRows:
    """Rows that are fetched when they are first wanted, and kept in sparse files."""

    def __init__(
        self,
        remote: RemoteFile,
        description: Description,
        present: npt.NDArray[np.bool_],
        folder: Path,
        header: Header | None,
    ) -> None:
        """Describe the store.

        Args:
            remote: Where it lies.
            description: What its root says.
            present: (slots,) which slots hold a row.
            folder: Where to keep rows.
            header: Header of a single file, None for a Zarr folder.
        """
        self._remote = remote
        self._description = description
        self._stored = stored_places(present, description.shard_rows)
        self._folder = folder
        self._header = header
        self._copies: OrderedDict[tuple[str, int], ShardCopy] = OrderedDict()
        self._asked = _Asked()
        self._fetching = threading.Lock()
        with suppress(FileNotFoundError):  # deleted meanwhile, and made again when there is something to keep
            self._make_folder(folder)

    def fetch(self, tap: str, slots: Int64) -> None:
        """Make sure that the rows of these slots are here."""
        slots = np.unique(slots)
        numbers, first = np.unique(slots // self._description.shard_rows, return_index=True)
        places = np.split(slots % self._description.shard_rows, first[1:])
        self._asked.tap, self._asked.places = tap, dict(zip(numbers.tolist(), places, strict=False))
        for number, wanted in self._asked.places.items():
            self._with_rows(tap, number, wanted)

    def file(self, tap: str, number: int) -> MappedFile:
        """A sparse file, mapped; it has the rows that this thread has fetched last, even if others deleted it since."""
        places = self._asked.places.get(number) if self._asked.tap == tap else None
        return self._with_rows(tap, number, np.empty(0, np.int64) if places is None else places)

    def forget(self, tap: str, slots: Int64) -> None:
        """Fetch the rows of these slots again when they are wanted next: what is here is damaged."""
        numbers, places = np.divmod(slots, self._description.shard_rows)
        with self._fetching:
            for number in np.unique(numbers).tolist():
                with suppress(OSError, StoreError):  # what is damaged is told, whether or not it can be marked
                    self._copy(tap, number).drop(places[numbers == number].tolist())

    def places(self, tap: str, slots: Int64) -> Places:
        """Where the rows of these slots lie in the sparse files."""
        files, within = np.divmod(slots, self._description.shard_rows)
        return Places(files, within * self._stride(tap))

    def _with_rows(self, tap: str, number: int, places: Int64) -> MappedFile:
        """The copy of a shard, with these rows in it."""
        with self._fetching:
            for _ in range(_TRIES):
                try:
                    copy = self._copy(tap, number)
                    if not copy.have[places].all():
                        self._fetch_missing(copy, tap, number, places)
                    return copy.file
                except OSError as error:
                    if error.errno not in PASSING:
                        raise
                    reason = (error.strerror or str(error)).lower()
                    self._copies.clear() if error.errno == errno.EMFILE else self._copies.pop((tap, number), None)
        message = (
            f"{self._folder / tap}: {reason}, again and again; if too many files are open, close other stores or raise "
            f"the limit with `ulimit -n`, else set $FEATURE_STORE_CACHE to another folder"
        )
        raise StoreError(message)

    def _copy(self, tap: str, number: int) -> ShardCopy:
        """The copy of a shard out of the table of those used last, each of which costs a descriptor."""
        key = tap, number
        if key not in self._copies:
            path = self._folder / tap / shard_name(number)
            self._make_folder(path.parent)
            self._copies[key] = ShardCopy(path, int(self._stored[number]), self._stride(tap))
            if len(self._copies) > MAX_MAPS:
                self._copies.popitem(last=False)
        self._copies.move_to_end(key)
        return self._copies[key]

    def _make_folder(self, path: Path) -> None:
        """Make the folder of this store, for its owner alone, and one in it."""
        with disk_errors(self._folder):
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.mkdir(exist_ok=True)
            except FileExistsError as error:
                if os.path.lexists(error.filename) and not Path(error.filename).is_dir():
                    raise
                raise gone(path) from error

    def _fetch_missing(self, copy: ShardCopy, tap: str, number: int, places: Int64) -> None:
        """Fetch rows of one shard that no process has fetched yet."""
        stride, start, name = self._stride(tap), self._start(tap, number), self._name(tap, number)
        with copy.opened() as handle:
            copy.reload(handle)
            missing = places[~copy.have[places]].tolist()
            if not missing:
                return
            spans = [(start + first * stride, start + (last + 1) * stride) for first, last in _two_spans(missing)]
            for (begin, end), data in zip(spans, self._remote.ranges(name, spans), strict=True):
                copy.put(handle, (begin - start) // stride, data[: len(data) // stride * stride])
                self._remote.check_end(name, end, begin + len(data))

    def _stride(self, tap: str) -> int:
        return self._spec(tap).row_bytes + CHECKSUM_BYTES

    def _spec(self, tap: str) -> TapSpec:
        return self._description.taps[tap]

    def _start(self, tap: str, number: int) -> int:
        """First byte of a shard's rows in the remote file."""
        if self._header is None:
            return 0
        return self._header.offsets[tap] + number * self._description.shard_rows * self._stride(tap)

    def _name(self, tap: str, number: int) -> str:
        return f"{tap}/{shard_name(number)}" if self._header is None else ""


def _two_spans(places: Sequence[int]) -> list[tuple[int, int]]:
    """At most two spans [first, last] that cover all places, without their widest gap."""
    gaps = [after - before for before, after in pairwise(places)]
    if not gaps or max(gaps) == 1:
        return [(places[0], places[-1])]
    cut = gaps.index(max(gaps))
    return [(places[0], places[cut]), (places[cut + 1], places[-1])]


def open_remote(url: str) -> OpenedStore:
    """Open a store at a URL for reading: a Zarr folder or an HDF5 file, or the folder that a push made for either.

    Raises:
        StoreNotFoundError: There is none.
        FormatError: Its metadata are damaged, or the server does not know ranges.
        UntrustedStoreError: It asks for what a store never needs.
    """
    remote = RemoteFile(url)
    ways = [(_open_folder, remote), (_open_single, remote), (_open_single, RemoteFile(f"{remote.url}/{PUSHED_FILE}"))]
    if remote.url.endswith(".h5"):
        ways = ways[1:] + ways[:1]
    reasons: list[StoreNotFoundError | FormatError] = []
    for open_there, place in ways:
        try:
            return open_there(place)
        except StoreNotFoundError as reason:
            reasons.append(reason)
        except FormatError as reason:
            reasons.insert(0, reason)
    raise reasons[0]


def _open_folder(remote: RemoteFile) -> OpenedStore:
    (data,) = remote.ranges("zarr.json", [(0, _ROOT_BYTES)])
    description = parse_root(data, f"{remote.url}/zarr.json")

    def load(name: str) -> UInt8:
        entry = description.index[name]
        path = f"index/{name}/{index_chunk_name(entry.shape)}"
        data = np.frombuffer(remote.exactly(path, 0, entry.size_bytes), np.uint8)
        check_size(entry, data.nbytes, f"{remote.url}/{path}")
        return data

    return _opened(remote, description, Index(description, load, remote.url), None)


def _open_single(remote: RemoteFile) -> OpenedStore:
    (first,) = remote.ranges("", [(0, _FIRST_BYTES)])
    size = user_block_size(first, remote.url)
    block = first[:size] if size <= len(first) else remote.exactly("", 0, size)
    header = parse_block(block, remote.url)

    def load(name: str) -> UInt8:
        start = header.offsets[f"index/{name}"]
        entry = header.description.index[name]
        return np.frombuffer(remote.exactly("", start, start + entry.size_bytes), np.uint8)

    return _opened(remote, header.description, Index(header.description, load, remote.url), header)


def _opened(remote: RemoteFile, description: Description, index: Index, header: Header | None) -> OpenedStore:
    """A store whose rows are kept in a folder of its own, by URL and version."""
    name = hashlib.sha256(remote.url.encode()).hexdigest()[:16] + "-" + description.checksum[:16]
    rows = RemoteRows(remote, description, index.present, mirror_folder() / name, header)
    return OpenedStore(description, index, rows)


def mirror_folder() -> Path:
    """Where rows of remote stores are kept: `$FEATURE_STORE_CACHE`, else a folder in the user's cache."""
    chosen = os.environ.get("FEATURE_STORE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feature-store"
