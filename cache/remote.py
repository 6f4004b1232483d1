"""Reading a store where it lies, over http or from a bucket: only the rows that are asked for travel, and only once.

Description and index are fetched when the store is opened. Rows go into sparse files of the same layout in a folder of
this machine, from which they are read like any local store, checksums included. For one batch at most two ranges are
requested of each shard: the missing rows are cut at their widest gap, and what lies between them comes along.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import Description, TapSpec
from cache.errors import FormatError, StoreNotFoundError
from cache.hdf5_file import Header, parse_block, user_block_size
from cache.index import Index, UInt8, check_size
from cache.mapped import Int64, MappedFile, Places
from cache.zarr_folder import OpenedStore, parse_root
from cache.zarr_layout import CHECKSUM_BYTES, index_chunk_name, shard_name, stored_places

_ROOT_BYTES = 1 << 20
_FIRST_BYTES = 1 << 14

PUSHED_FILE = "store.h5"
"""Name of a store that is one file, in the folder that a push makes for it."""


class RemoteFile:
    """Files below one URL.

    Attributes:
        url: The URL, for messages.
    """

    def __init__(self, url: str) -> None:
        """Name the URL; nothing is fetched."""
        self.url = url.rstrip("/")

    def ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, stop) of a file, for each span; one request a span, at once where the protocol can.

        Raises:
            StoreNotFoundError: The file is not there.
            FormatError: The server sent something else than was asked for.
        """
        import fsspec.core

        fs, path = fsspec.core.url_to_fs(f"{self.url}/{name}" if name else self.url)
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
        try:
            found = fs.cat_ranges([path] * len(spans), starts, stops, on_error="raise")
        except (FileNotFoundError, IsADirectoryError) as error:
            message = f"{self.url}{f'/{name}' if name else ''} does not exist; check the URL, or push the store again"
            raise StoreNotFoundError(message) from error
        for data, (start, stop) in zip(found, spans, strict=True):
            if len(data) > stop - start:
                message = f"{self.url}: the server sent {len(data)} bytes for {stop - start}; it does not know ranges"
                raise FormatError(message)
        return [bytes(data) for data in found]

    def exactly(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
            FormatError: The file ends earlier.
        """
        (data,) = self.ranges(name, [(start, stop)])
        if len(data) < stop - start:
            message = f"{self.url}/{name} ends before byte {stop}; it is damaged, or being pushed"
            raise FormatError(message)
        return data


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
        self._files: dict[tuple[str, int], MappedFile] = {}
        self._fetching = threading.Lock()

    def fetch(self, tap: str, slots: Int64) -> None:
        """Make sure that the rows of these slots are here."""
        rows = self._description.shard_rows
        with self._fetching:
            self._fetch_missing(tap, slots, rows)

    def forget(self, tap: str, slots: Int64) -> None:
        """Fetch the rows of these slots again when they are wanted next: what is here is damaged."""
        numbers, places = np.divmod(slots, self._description.shard_rows)
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
            self._have(tap, number)[place] = False

    def _fetch_missing(self, tap: str, slots: Int64, rows: int) -> None:
        for number in np.unique(slots // rows).tolist():
            places = np.unique(slots[slots // rows == number] % rows)
            have = self._have(tap, number)
            missing = places[~have[places]]
            if len(missing):
                self._fetch_shard(tap, number, _two_spans(missing.tolist()), have)

    def _fetch_shard(self, tap: str, number: int, spans: Sequence[tuple[int, int]], have: npt.NDArray[Any]) -> None:
        """Fetch spans [first, last] of places of one shard."""
        stride = self._stride(tap)
        start = self._start(tap, number)
        wanted = [(start + first * stride, start + (last + 1) * stride) for first, last in spans]
        found = self._remote.ranges(self._name(tap, number), wanted)
        with self._path(tap, number).open("r+b") as file:
            for (first, last), data in zip(spans, found, strict=True):
                if len(data) == (last + 1 - first) * stride:
                    file.seek(first * stride)
                    file.write(data)
        for (first, last), data in zip(spans, found, strict=True):
            have[first : last + 1] = len(data) == (last + 1 - first) * stride

    def _have(self, tap: str, number: int) -> npt.NDArray[Any]:
        """(places,) bool, kept in a file: which places of a shard are here."""
        path = self._path(tap, number)
        stored = int(self._stored[number])
        marks = path.with_name(path.name + ".have")
        if not marks.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            for file, size in ((path, stored * self._stride(tap)), (marks, stored)):
                file.touch()  # another process may be at the same: neither cuts off what the other has written
                os.truncate(file, size)
        return np.memmap(marks, np.bool_, "r+", shape=(stored,))

    def _path(self, tap: str, number: int) -> Path:
        return self._folder / tap / shard_name(number)

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

    def places(self, tap: str, slots: Int64) -> Places:
        """Where the rows of these slots lie in the sparse files."""
        files, within = np.divmod(slots, self._description.shard_rows)
        return Places(files, within * self._stride(tap))

    def file(self, tap: str, number: int) -> MappedFile:
        """A sparse file, mapped."""
        if (tap, number) not in self._files:
            size = int(self._stored[number]) * self._stride(tap)
            self._files[tap, number] = MappedFile(self._path(tap, number), size)
        return self._files[tap, number]


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
        path = f"index/{name}/{index_chunk_name(entry)}"
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
    folder = mirror_folder() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return OpenedStore(description, index, RemoteRows(remote, description, index.present, folder, header))


def mirror_folder() -> Path:
    """Where rows of remote stores are kept: `$FEATURE_STORE_CACHE`, else a folder in the user's cache."""
    chosen = os.environ.get("FEATURE_STORE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feature-store"
