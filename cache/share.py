"""Sending stores to a folder, a bucket or a hub, and fetching them: only what is missing, and nothing unchecked.

At the URL lies the store's own files (a folder store can be read there directly) and `manifest.json` with the size and
SHA-256 of each. A push announces what it is going to send before it sends anything, so that a broken one continues; a
fetched store gets its name when every file has its digest and `verify` finds no damage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cache.description import load_json
from cache.durable import link_or_copy, remove, space_errors, swap, sync_folder
from cache.errors import FingerprintMismatchError, FormatError, NoSpaceError, StoreError, UntrustedStoreError
from cache.fingerprint import canonical
from cache.lock import WriterLock
from cache.progress import Progress, silent
from cache.reader import Store, open_files, open_store, store_format
from cache.remote import PUSHED_FILE
from cache.verify import verify
from cache.work import WorkFolder, partial_path
from cache.writer import let_go

MANIFEST = "manifest.json"
_VERSION = 1
_MAX_MANIFEST_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class File:
    """One file of a store.

    Attributes:
        size: Bytes.
        sha256: Hexadecimal digest.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What lies at a URL.

    Attributes:
        version: Checksum of the store's description.
        files: By path below the URL.
        complete: False while a push is under way.
    """

    version: str
    files: Mapping[str, File]
    complete: bool

    def to_bytes(self) -> bytes:
        """As stored at the URL."""
        files = {name: {"size": file.size, "sha256": file.sha256} for name, file in self.files.items()}
        return canonical({"manifest": _VERSION, "version": self.version, "complete": self.complete, "files": files})


def make_manifest(path: str | os.PathLike[str], progress: Progress = silent) -> Manifest:
    """Sizes and digests of a finished store's files; reads all of them."""
    store = Path(path)
    opened = open_files(store)
    files = {}
    found = _local_files(store)
    for done, (name, file) in enumerate(found.items()):
        files[name] = File(file.stat().st_size, _sha256(file))
        progress("hash", done + 1, len(found))
    return Manifest(opened.description.checksum, files, complete=True)


def _local_files(store: Path) -> dict[str, Path]:
    """Files of a store by their path below its URL."""
    if not store.is_dir():
        return {PUSHED_FILE: store}
    found = sorted(Path(base) / file for base, _, names in os.walk(store) for file in names)
    return {file.relative_to(store).as_posix(): file for file in found}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def push_store(path: str | os.PathLike[str], url: str, progress: Progress = silent) -> int:
    """Send a store to a folder or bucket; what is there already is not sent again.

    Args:
        path: A finished store.
        url: Anything fsspec writes to: a folder, `s3://bucket/name`, `gs://...`, `hf://datasets/...`.
        progress: Called after each file, with the bytes sent so far as `sent`.

    Returns:
        Bytes sent.

    Raises:
        StoreError: The place cannot be written, or another push is going on there with other content.
    """
    manifest = make_manifest(path, progress)
    local = _local_files(Path(path))
    fs, root = _file_system(url)
    before = _read_manifest(fs, root, url)
    trusted = before.files if before else {}
    stale = {name for name, file in trusted.items() if manifest.files.get(name) != file}
    if before is None or before.complete or before.files != manifest.files:
        for name in stale & manifest.files.keys():
            with suppress(FileNotFoundError):
                fs.rm_file(f"{root}/{name}")
        announced = Manifest(manifest.version, manifest.files, complete=False)
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/{MANIFEST}", announced.to_bytes())
    sent = 0
    for done, (name, file) in enumerate(manifest.files.items()):
        remote = f"{root}/{name}"
        if not (name in trusted and _size(fs, remote) == file.size):
            fs.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(local[name]), remote)
            sent += file.size
        progress("push", done + 1, len(manifest.files), sent=sent)
    fs.pipe_file(f"{root}/{MANIFEST}", manifest.to_bytes())
    for name in stale - manifest.files.keys():
        with suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{name}")
    return sent


def pull_store(url: str, path: str | os.PathLike[str], *, replace: bool = False, progress: Progress = silent) -> Store:
    """Fetch a store; files that are here already, from a broken pull or an older version, are not fetched again.

    Args:
        url: Where it was pushed to; http(s) works too.
        path: `NAME.zarr` or `NAME.h5`, whichever it is there.
        replace: Replace a store of another fingerprint.
        progress: Called after each file, with the bytes fetched so far as `fetched`.

    Raises:
        FormatError: There is no complete manifest, or a file is not what the manifest says.
        UntrustedStoreError: The manifest names a file outside of the store.
        FingerprintMismatchError: A store of another fingerprint has that name.
        StoreLockedError: Another process is writing that store.
    """
    target = Path(os.path.realpath(path))
    fs, root = _file_system(url)
    manifest = _read_manifest(fs, root, url)
    if manifest is None or not manifest.complete:
        state = "a push that is not finished" if manifest else "no manifest.json"
        message = f"{url}: there is {state}; check the URL, or push the store (again)"
        raise FormatError(message)
    if (PUSHED_FILE in manifest.files) != (store_format(target) == "hdf5"):
        message = f"{url} holds {'one file' if PUSHED_FILE in manifest.files else 'a folder'}; choose the other suffix"
        raise StoreError(message)
    work = WorkFolder(partial_path(target))
    lock = WriterLock(work.path / "lock", target)
    try:
        fetched = work.path / "pull" / (PUSHED_FILE if PUSHED_FILE in manifest.files else "store.zarr")
        _fetch_all(fs, root, manifest, fetched, target, progress)
        _accept(fetched, target, manifest, url, replace, work, progress)
        remove(work.path / "pull")
    finally:
        let_go(work, lock)
    return open_store(target)


def _fetch_all(fs: Any, root: str, manifest: Manifest, fetched: Path, target: Path, progress: Progress) -> None:
    """Bring every file of a manifest into place."""
    base = fetched.parent if PUSHED_FILE in manifest.files else fetched
    base.mkdir(parents=True, exist_ok=True)
    older = _local_files(target) if target.exists() else {}
    missing = sum(file.size for name, file in manifest.files.items() if not (base / name).exists())
    if missing > shutil.disk_usage(base).free:
        message = f"{target}: {missing / 2**20:.0f} MiB are to be fetched and less is free; make space"
        raise NoSpaceError(message)
    total = 0
    for done, (name, file) in enumerate(manifest.files.items()):
        place = base / name
        if not _is(place, file):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            if name in older and _is(older[name], file):
                link_or_copy(older[name], place, base / ".unfinished")
            else:
                _fetch(fs, f"{root}/{name}", file, place)
                total += file.size
        progress("pull", done + 1, len(manifest.files), fetched=total)


def _is(place: Path, file: File) -> bool:
    """Whether a local file has the content that the manifest says."""
    return place.is_file() and place.stat().st_size == file.size and _sha256(place) == file.sha256


def _fetch(fs: Any, remote: str, file: File, place: Path) -> None:
    """Fetch one file under another name first; never more bytes than announced."""
    scratch = place.with_name(place.name + ".unfinished")
    digest, size = hashlib.sha256(), 0
    with space_errors(place), _open(fs, remote) as source, scratch.open("wb") as target:
        while (block := source.read(_BLOCK_BYTES)) and size <= file.size:
            digest.update(block)
            size += len(block)
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    if size != file.size or digest.hexdigest() != file.sha256:
        scratch.unlink()
        message = f"{remote} is not the file that its manifest describes; push the store again, or pull it again"
        raise FormatError(message)
    scratch.replace(place)


def _accept(
    fetched: Path, target: Path, manifest: Manifest, url: str, replace: bool, work: WorkFolder, progress: Progress
) -> None:
    """Give a fetched store its name, once it is sound and may have it."""
    base = fetched.parent if PUSHED_FILE in manifest.files else fetched
    for place in _local_files(fetched).values():
        if place.relative_to(base).as_posix() not in manifest.files:
            place.unlink()
    damage = verify(fetched, progress)
    if damage or open_files(fetched).description.checksum != manifest.version:
        reason = damage[0].reason if damage else "it is another version than its manifest says"
        message = f"{url}: the store that was fetched is damaged ({reason}); push it again"
        raise FormatError(message)
    if target.exists() and not replace:
        differences = open_store(target).fingerprint.differences(open_store(fetched).fingerprint)
        if differences:
            message = f"{target} has another fingerprint than the store at {url}; choose another name or replace it"
            raise FingerprintMismatchError(message, differences)
    for folder, _, _ in os.walk(fetched):
        sync_folder(Path(folder))
    if target.is_dir():
        swap(fetched, target, work.aside)
        remove(work.aside)
    else:
        fetched.replace(target)
    sync_folder(target.parent)


def _file_system(url: str) -> tuple[Any, str]:
    """Fsspec's file system for a URL, and the path in it.

    Raises:
        StoreError: fsspec does not know it or lacks a package for it.
    """
    import fsspec.core

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        message = f"{url}: {error}; install what that kind of place needs, or use another"
        raise StoreError(message) from error
    return fs, str(root).rstrip("/")


def _open(fs: Any, remote: str) -> Any:
    """A remote file as a stream; http servers need not know ranges for that."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return fs.open(remote, "rb", **({"block_size": 0} if protocols & {"http", "https"} else {}))


def _size(fs: Any, remote: str) -> int | None:
    try:
        return int(fs.size(remote))
    except (FileNotFoundError, TypeError):
        return None


def _read_manifest(fs: Any, root: str, url: str) -> Manifest | None:
    """The manifest at a URL, None if there is none.

    Raises:
        FormatError: It is malformed.
        UntrustedStoreError: It is huge or names a file outside of the store.
    """
    try:
        with _open(fs, f"{root}/{MANIFEST}") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > _MAX_MANIFEST_BYTES:
        message = f"{url}: the manifest is larger than {_MAX_MANIFEST_BYTES} bytes; it is no store's"
        raise UntrustedStoreError(message)
    value = load_json(data, f"{url}/{MANIFEST}")
    try:
        if value["manifest"] != _VERSION:
            message = f"its version is {value['manifest']!r}, this software reads {_VERSION}"
            raise ValueError(message)
        files = {name: File(file["size"], file["sha256"]) for name, file in value["files"].items()}
        numbers = all(type(file.size) is int and file.size >= 0 for file in files.values())
        if not numbers or not isinstance(value["version"], str) or type(value["complete"]) is not bool:
            message = "a value has the wrong type"
            raise TypeError(message)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{url}: the manifest is malformed ({error}); push the store again"
        raise FormatError(message) from error
    for name in files:
        _check_name(name, url)
    return Manifest(value["version"], files, value["complete"])


def _check_name(name: str, url: str) -> None:
    """Refuse a file name that leads out of the store's own folder."""
    parts = PurePosixPath(name).parts
    plain = json.dumps(name) == f'"{name}"' and "\\" not in name
    if not parts or name != "/".join(parts) or name.startswith("/") or {"..", "."} & set(parts) or not plain:
        message = f"{url}: the manifest names {name!r}, which is no file inside a store"
        raise UntrustedStoreError(message)
