"""What a person wants to know of a store, from its root alone, finished or not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cache.description import Description, TapSpec, taps_of, version_for
from cache.errors import StoreNotFoundError
from cache.fingerprint import JSON, Fingerprint
from cache.formats.hdf5_file import read_header
from cache.formats.zarr_folder import read_root
from cache.reading.reader import store_format
from cache.writing.card import rounding_of
from cache.writing.partial import WorkFolder, partial_path


@dataclass(frozen=True)
class StoreInfo:
    """A summary of one store.

    Attributes:
        path: Where it lies.
        format: `"zarr"` or `"hdf5"`.
        format_version: Version of the format.
        complete: Whether it is finished; an unfinished one has no rows yet that could be read.
        rows: Samples, planned ones if it is unfinished.
        slots: Places for features, 0 if it is unfinished.
        shards: Shard files of each tap, planned ones if it is unfinished.
        shards_done: Shards that are finished.
        taps: Shape and type by tap name.
        fingerprint: What the features depend on.
        provenance: How it came about.
        rounding: By packed tap, how far its numbers are from those that they were made from: root mean square, over
            their standard deviation; none if it is unfinished.
        bytes_on_disk: Size of all its files.
        written: When the last of its files was, here: ISO 8601 in UTC.
        version: Hexadecimal SHA-256 of the content, empty if it is unfinished.
    """

    path: Path
    format: str
    format_version: int
    complete: bool
    rows: int
    slots: int
    shards: int
    shards_done: int
    taps: Mapping[str, TapSpec]
    fingerprint: Fingerprint
    provenance: Mapping[str, JSON]
    rounding: Mapping[str, float]
    bytes_on_disk: int
    written: str
    version: str


def info(path: str | os.PathLike[str]) -> StoreInfo:
    """Summarise a store, or the remains of an unfinished one, without reading its features or index.

    Args:
        path: `NAME.zarr`, `NAME.h5`, or either with `.partial` behind it. Where only the partial one exists, it is
            described.

    Raises:
        StoreNotFoundError: There is neither.
        FormatError: The root is damaged.
    """
    wanted = Path(path)
    if wanted.suffix == ".partial":
        return _partial_info(wanted.with_suffix(""))
    kind = store_format(wanted)
    if not wanted.exists() and WorkFolder(partial_path(wanted)).exists():
        return _partial_info(wanted)
    description = read_root(wanted) if kind == "zarr" else read_header(Path(os.path.realpath(wanted)))[0].description
    return _finished_info(wanted, kind, description)


def _finished_info(path: Path, kind: str, description: Description) -> StoreInfo:
    shards = -(-description.slots // description.shard_rows) if kind == "zarr" else 1
    files = list(_files(path))
    return StoreInfo(
        path=path,
        format=kind,
        format_version=description.version,
        complete=True,
        rows=description.rows,
        slots=description.slots,
        shards=shards,
        shards_done=shards,
        taps=taps_of(description.taps),
        fingerprint=description.fingerprint,
        provenance=description.provenance,
        rounding=rounding_of(description.provenance),
        bytes_on_disk=sum(file.st_size for file in files),
        written=_latest(files),
        version=description.checksum,
    )


def _partial_info(path: Path) -> StoreInfo:
    kind = store_format(path)
    work = WorkFolder(partial_path(path))
    if not work.exists():
        message = f"there is no unfinished store at {work.path}; check the path"
        raise StoreNotFoundError(message)
    identity, _, _ = work.load()
    fields, files = work.fields(), list(_files(work.path))
    return StoreInfo(
        path=path,
        format=kind,
        format_version=version_for(identity.taps),
        complete=False,
        rows=fields["rows"],
        slots=0,
        shards=fields["shards"],
        shards_done=len(work.finished()),
        taps=taps_of(identity.taps),
        fingerprint=identity.fingerprint,
        provenance=identity.provenance,
        rounding={},
        bytes_on_disk=sum(file.st_size for file in files),
        written=_latest(files),
        version="",
    )


def _files(path: Path) -> Iterator[os.stat_result]:
    """What the file system says of each file at or below a path; links are not followed."""
    if not path.is_dir():
        yield path.stat()
        return
    with os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # renamed by a writer at work
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(Path(entry.path))
                else:
                    yield entry.stat(follow_symlinks=False)


def _latest(files: Sequence[os.stat_result]) -> str:
    """The time of the last change of a file, to the second."""
    when = datetime.fromtimestamp(max(file.st_mtime for file in files), UTC)
    return when.isoformat(timespec="seconds")
