"""Reading a store where it lies, over http or from a bucket: rows travel when they are asked for, and only once.

Description and index are fetched when the store is opened. Rows go into sparse files of the same layout in a folder of
this machine, from which they are read like any local store, checksums included. What a batch lacks is asked for at
once, from all shards and taps; rows that lie near one another come in one piece, with what is between them, and small
holes between rows that are here are filled.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
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

_GAP_BYTES = 8 << 20
"""What lies between a row and the next that is wanted or here comes along if it is no more than this.

A request costs as much, and an epoch wants it.
"""
_PIECE_BYTES = 8 << 20
"""A request is for no more than this, or one row: several at once are faster than one, and memory holds them all."""

PUSHED_FILE = "store.h5"
"""Name of a store that is one file, in the folder that a push makes for it."""


_Shard = tuple[str, int]
"""Name of a tap and number of one of its shards."""


class _Asked(threading.local):
    """What a thread has fetched last, to hand out no map without it: places by shard."""

    places: Mapping[_Shard, Int64] = {}


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

    def fetch(self, taps: Sequence[str], slots: Int64) -> None:
        """Make sure that the rows of these slots are here; those of all shards and taps are asked for at once."""
        slots = np.unique(slots)
        numbers, first = np.unique(slots // self._description.shard_rows, return_index=True)
        places = np.split(slots % self._description.shard_rows, first[1:])
        shards = dict(zip(numbers.tolist(), places, strict=False))
        self._asked.places = {(tap, number): wanted for tap in taps for number, wanted in shards.items()}
        keys = list(self._asked.places)
        for some in range(0, len(keys), MAX_MAPS):
            self._bring({key: self._asked.places[key] for key in keys[some : some + MAX_MAPS]})

    def file(self, tap: str, number: int) -> MappedFile:
        """A sparse file, mapped; it has the rows that this thread has fetched last, even if others deleted it since."""
        key = tap, number
        (copy,) = self._bring({key: self._asked.places.get(key, np.empty(0, np.int64))})
        return copy.file

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

    def _bring(self, wanted: Mapping[_Shard, Int64]) -> list[ShardCopy]:
        """The copies of shards, each with the rows at the places that are wanted of it."""
        with self._fetching:
            for _ in range(_TRIES):
                try:
                    copies = {key: self._copy(*key) for key in wanted}
                    if not all(copies[key].have[places].all() for key, places in wanted.items()):
                        self._fetch_missing(copies, wanted)
                    return list(copies.values())
                except OSError as error:
                    if error.errno not in PASSING:
                        raise
                    reason = (error.strerror or str(error)).lower()
                    for key in list(self._copies) if error.errno == errno.EMFILE else wanted:
                        self._copies.pop(key, None)
                    copies = {}
        if len(wanted) > 1:  # fewer files at a time may do
            return [self._bring({key: places})[0] for key, places in wanted.items()]
        message = (
            f"{self._folder / next(iter(wanted))[0]}: {reason}, again and again; if too many files are open, close "
            f"other stores or raise the limit with `ulimit -n`, else set $FEATURE_STORE_CACHE to another folder"
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

    def _fetch_missing(self, copies: Mapping[_Shard, ShardCopy], wanted: Mapping[_Shard, Int64]) -> None:
        """Fetch rows that no process has fetched yet into the copies of their shards."""
        parts: list[tuple[_Shard, int]] = []
        spans: list[tuple[str, int, int]] = []
        for key, places in wanted.items():
            copy, stride, start, name = copies[key], self._stride(key[0]), self._start(*key), self._name(*key)
            if copy.have[places].all():
                continue
            with copy.opened() as handle:
                copy.reload(handle)
            for first, last in _spans(copy.have, places, _GAP_BYTES // stride, max(1, _PIECE_BYTES // stride)):
                parts.append((key, first))
                spans.append((name, start + first * stride, start + (last + 1) * stride))

        def put(number: int, data: bytes) -> None:
            (key, first), (name, begin, end) = parts[number], spans[number]
            stride = self._stride(key[0])
            with copies[key].opened() as handle:
                copies[key].put(handle, first, data[: len(data) // stride * stride])
            self._remote.check_end(name, end, begin + len(data))

        self._remote.fetch(spans, put)

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


def _spans(have: npt.NDArray[np.bool_], wanted: Int64, gap: int, most: int) -> list[tuple[int, int]]:
    """Spans [first, last] of at most `most` places to fetch: what is wanted and not here, and small holes beside it.

    So an epoch does not come back for every row that its first batches left out. In a shard of which nothing is here
    yet, rows before the first wanted one and behind the last do not come along.

    Args:
        have: (places,) which rows are here.
        wanted: Places that are wanted, of which some may be here.
        gap: So many places come along between a wanted one and the next that is wanted or here.
        most: Places in a span.
    """
    near = have.copy()
    near[wanted] = True
    bounds = np.flatnonzero(near)
    if have.any():
        bounds = np.concatenate([[-1], bounds, [len(have)]])
    fetched, beside = np.zeros(len(have), np.bool_), np.zeros(len(have) + 2, np.bool_)
    fetched[wanted] = beside[wanted + 1] = True
    before, after = bounds[:-1], bounds[1:]
    holes = (after - before - 1 <= gap) & (beside[before + 1] | beside[after + 1])
    for start, stop in zip((before[holes] + 1).tolist(), after[holes].tolist(), strict=True):
        fetched[start:stop] = True
    edges = np.flatnonzero(np.diff(fetched & ~have, prepend=False, append=False)).reshape(-1, 2)
    return [(at, min(at + most, stop) - 1) for start, stop in edges.tolist() for at in range(start, stop, most)]


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
