"""Sending stores to a folder, a bucket or a hub, and fetching them: only what is missing, and nothing unchecked.

At the URL lies the store's own files (a folder store can be read there directly) and `manifest.json` with the size and
SHA-256 of each. A push announces what it is going to send before it sends anything, so that a broken one continues; a
fetched store gets its name when every file has its digest and `verify` finds no damage.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from cache.care.relation import refuse_another
from cache.care.verify import stray_files, verify
from cache.durable import link_or_copy, remove, space_errors, swap, sync_folder, write_file
from cache.errors import FingerprintMismatchError, FormatError, NoSpaceError, StoreError, UntrustedStoreError
from cache.formats.mapped import ZarrRows, open_plain
from cache.formats.zarr_folder import OpenedStore
from cache.progress import Progress, silent
from cache.reading.ranges import HttpStream, file_system, is_http, local_place, network_errors
from cache.reading.reader import Store, open_files, open_store, store_format
from cache.reading.recover import is_marked
from cache.reading.remote import PUSHED_FILE
from cache.sharing.manifest import MANIFEST, MAX_MANIFEST_BYTES, File, Manifest, check_names, parse_manifest
from cache.writing.ending import store_files
from cache.writing.lock import WriterLock
from cache.writing.partial import WorkFolder, partial_path
from cache.writing.writer import let_go

_BLOCK_BYTES = 1 << 20


def make_manifest(path: str | os.PathLike[str], progress: Progress = silent) -> Manifest:
    """Sizes and digests of a finished store's files; reads all of them.

    Raises:
        UntrustedStoreError: There is something in its folder that is no plain file, or no part of the store.
    """
    store = Path(path)
    opened = open_files(store)
    files = {}
    found = _local_files(store)
    check_names(found, str(path))
    _refuse_strays(store, opened)
    for done, (name, file) in enumerate(found.items()):
        files[name] = File(file.stat().st_size, _sha256(file))
        progress("hash", done + 1, len(found))
    return Manifest(opened.description.checksum, files, complete=True)


def _local_files(store: Path) -> dict[str, Path]:
    """Files of a store by their path below its URL.

    Raises:
        UntrustedStoreError: Something in its folder is neither a plain file nor a folder.
    """
    if not store.is_dir():
        return {PUSHED_FILE: Path(os.path.realpath(store))}
    found: dict[str, Path] = {}
    for base, folders, names in os.walk(store):
        for entry in (Path(base) / name for name in folders + names):
            mode = entry.lstat().st_mode
            if stat.S_ISREG(mode):
                found[entry.relative_to(store).as_posix()] = entry
            elif not stat.S_ISDIR(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
                message = f"{entry} is {kind}; a store holds only files and folders: delete it, or do not pass it on"
                raise UntrustedStoreError(message)
    return dict(sorted(found.items()))


def _refuse_strays(store: Path, opened: OpenedStore) -> None:
    """Refuse to pass on what somebody put into a store's folder: it may be a key, or who is who."""
    if not isinstance(opened.rows, ZarrRows):
        return
    description, index = opened.description, opened.index
    known = store_files(description, {name: index.array(name) for name in description.index})
    stray = next(stray_files(store, description, opened.rows, known.keys()), None)
    if stray is not None:
        message = f"{store / stray.file}: {stray.reason}; nothing is sent: move it elsewhere"
        raise UntrustedStoreError(message)


def _sha256(path: Path) -> str:
    with open(open_plain(path), "rb") as file:  # noqa: PTH123 - a descriptor has no path
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
        StoreError: The place cannot be written, is or holds the store itself, or holds what no push put there.
        FormatError: The store is damaged, so nobody could pull it; nothing is sent.
        UntrustedStoreError: There is something in the store's folder that is no part of it; nothing is sent.
    """
    fs, root = file_system(url)
    here = local_place(fs, root)
    if here is not None:
        _refuse_overlap(Path(os.path.realpath(path)), here)
    manifest = make_manifest(path, progress)
    damage = verify(path, progress)
    if damage:
        message = f"{path} is damaged ({damage[0]}); nothing is sent: run 'store repair', and push it again"
        raise FormatError(message)
    if len(manifest.to_bytes()) > MAX_MANIFEST_BYTES:
        message = f"{path} has {len(manifest.files)} files, which is too many to share; write it with larger shards"
        raise StoreError(message)
    local = _local_files(Path(path))
    try:
        before = _read_manifest(fs, root, url)
        if before is None:
            _refuse_strangers(fs, root, url)
    except (FormatError, UntrustedStoreError):  # nothing there can be taken over
        before = None
    trusted = before.files if before else {}
    stale = {name for name, file in trusted.items() if manifest.files.get(name) != file}
    if here is not None:
        _refuse_links(here, manifest.files.keys() | trusted.keys())
    if before is None or before.complete or before.files != manifest.files:
        for name in stale & manifest.files.keys():
            with suppress(FileNotFoundError):
                fs.rm_file(f"{root}/{name}")
        _put_manifest(fs, root, here, Manifest(manifest.version, manifest.files, complete=False))
    sent = 0
    for done, (name, file) in enumerate(manifest.files.items()):
        remote = f"{root}/{name}"
        if not (name in trusted and _size(fs, remote) == file.size):
            if here is not None:
                _write(here / name, _blocks(local[name]))
            else:
                with network_errors(remote):
                    fs.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
                    fs.put_file(str(local[name]), remote)
            sent += file.size
        progress("push", done + 1, len(manifest.files), sent=sent)
    _put_manifest(fs, root, here, manifest)
    for name in stale - manifest.files.keys():
        with suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{name}")
    return sent


def _refuse_overlap(source: Path, here: Path) -> None:
    """Refuse to push a store into itself, or into a folder that it lies in."""
    if here.is_relative_to(source) or source.is_relative_to(here):
        where = "is the store itself or inside it" if here.is_relative_to(source) else f"holds the store {source.name}"
        message = f"{here} {where}; push to a folder of its own"
        raise StoreError(message)
    if here.exists() and not here.is_dir():
        message = f"{here} is a file, and a push needs a folder of its own; name another place"
        raise StoreError(message)


def _refuse_links(here: Path, names: Collection[str]) -> None:
    """Refuse a place whose folders are links: what they lead to is not the place's own."""
    for folder in sorted({(here / name).parent for name in names}):
        if Path(os.path.realpath(folder)) != folder:
            message = f"{folder} is a link, or lies behind one; delete it, or push to another place"
            raise StoreError(message)


def _refuse_strangers(fs: Any, root: str, url: str) -> None:
    """Refuse a place without a manifest that holds anything but hidden files, which hubs make by themselves."""
    try:
        with network_errors(url):
            names = [str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(root or "/", detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return
    found = sorted(name for name in names if not name.startswith("."))
    if found:
        message = f"{url} holds {found[0]!r} and no manifest.json, so no push made it; name a new or empty place"
        raise StoreError(message)


def _put_manifest(fs: Any, root: str, here: Path | None, manifest: Manifest) -> None:
    """Say at the place what is there, or is going to be."""
    if here is not None:
        _write(here / MANIFEST, [manifest.to_bytes()])
    else:
        with network_errors(root):
            fs.makedirs(root, exist_ok=True)
            fs.pipe_file(f"{root}/{MANIFEST}", manifest.to_bytes())


def _write(place: Path, blocks: Iterable[bytes]) -> None:
    """Write a file on this machine under a hidden name first: other names of what was there keep their content."""
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(f".{place.name}.unfinished")
    scratch.unlink(missing_ok=True)
    write_file(place, blocks, scratch)
    sync_folder(place.parent)


def _blocks(path: Path) -> Iterator[bytes]:
    with open(open_plain(path), "rb") as file:  # noqa: PTH123 - a descriptor has no path
        while block := file.read(_BLOCK_BYTES):
            yield block


def pull_store(url: str, path: str | os.PathLike[str], *, replace: bool = False, progress: Progress = silent) -> Store:
    """Fetch a store; files that are here already, from a broken pull or an older version, are not fetched again.

    Args:
        url: Where it was pushed to; http(s) works too.
        path: `NAME.zarr` or `NAME.h5`, whichever it is there.
        replace: Replace a store of another fingerprint or another data set.
        progress: Called after each file, with the bytes fetched so far as `fetched`.

    Raises:
        FormatError: There is no complete manifest, or a file is not what the manifest says.
        UntrustedStoreError: The manifest is huge, or names what is no file inside a store.
        FingerprintMismatchError: A store of another fingerprint has that name.
        StoreError: One that has no row in common with it has that name, or what is no store; or the other suffix is
            needed.
        StoreLockedError: Another process is writing that store.
    """
    target = Path(os.path.realpath(path))
    fs, root = file_system(url)
    manifest = _read_manifest(fs, root, url)
    if manifest is None or not manifest.complete:
        state = "a push that is not finished" if manifest else "no manifest.json"
        message = f"{url}: there is {state}; check the URL, or push the store (again)"
        raise FormatError(message)
    if (PUSHED_FILE in manifest.files) != (store_format(target) == "hdf5"):
        message = f"{url} holds {'one file' if PUSHED_FILE in manifest.files else 'a folder'}; choose the other suffix"
        raise StoreError(message)
    _refuse_no_store(target)
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


def _refuse_no_store(target: Path) -> None:
    """Refuse a name that something else than a store has: that is never deleted, whoever asks."""
    if target.exists() and not is_marked(target) and not (target.is_dir() and not any(target.iterdir())):
        message = f"{target} exists and is no feature store; move it away, or choose another name"
        raise StoreError(message)


def _fetch_all(fs: Any, root: str, manifest: Manifest, fetched: Path, target: Path, progress: Progress) -> None:
    """Bring every file of a manifest into place."""
    base = fetched.parent if PUSHED_FILE in manifest.files else fetched
    base.mkdir(parents=True, exist_ok=True)
    _clear(base, manifest)
    scratch = fetched.with_name("unfinished")
    older = {name: target if name == PUSHED_FILE else target / name for name in manifest.files}
    missing = sum(
        file.size
        for name, file in manifest.files.items()
        if not (base / name).exists() and not _has_size(older[name], file)
    )
    if missing > shutil.disk_usage(base).free:
        message = f"{target}: {missing / 2**20:.0f} MiB are to be fetched and less is free; make space"
        raise NoSpaceError(message)
    total = 0
    for done, (name, file) in enumerate(manifest.files.items()):
        place = base / name
        if not _is(place, file):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            if _is(older[name], file):
                link_or_copy(older[name], place, scratch)
            else:
                _fetch(fs, f"{root}/{name}", file, place, scratch)
                total += file.size
        progress("pull", done + 1, len(manifest.files), fetched=total)


def _clear(base: Path, manifest: Manifest) -> None:
    """Delete what a broken pull of another version left that is in the way, or in no place of this one."""
    folders = {str(folder) for name in manifest.files for folder in PurePosixPath(name).parents}
    for inside, inner, names in os.walk(base):
        for name in inner + names:
            here = Path(inside) / name
            wanted = manifest.files if name in names or here.is_symlink() else folders
            if here.relative_to(base).as_posix() not in wanted:
                remove(here)
        inner[:] = [name for name in inner if (Path(inside) / name).exists()]


def _is(place: Path, file: File) -> bool:
    """Whether a local file has the content that the manifest says."""
    try:
        return _has_size(place, file) and _sha256(place) == file.sha256
    except (FileNotFoundError, NotADirectoryError, UntrustedStoreError):
        return False


def _has_size(place: Path, file: File) -> bool:
    """Whether a local file is as long as the manifest says; without its digest that is a hint only."""
    try:
        return place.lstat().st_size == file.size
    except (FileNotFoundError, NotADirectoryError):
        return False


def _fetch(fs: Any, remote: str, file: File, place: Path, scratch: Path) -> None:
    """Fetch one file under another name first; never more bytes than announced."""
    digest, size = hashlib.sha256(), 0
    try:
        with space_errors(place), _stream(fs, remote) as source, scratch.open("wb") as target:
            while size <= file.size and (block := source.read(_BLOCK_BYTES)):
                digest.update(block)
                size += len(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        message = f"{remote} is named in the manifest and is not there; push the store again"
        raise FormatError(message) from error
    if size != file.size or digest.hexdigest() != file.sha256:
        scratch.unlink()
        message = (
            f"{remote} is not the file that its manifest describes; pull it again, or delete it there and push anew"
        )
        raise FormatError(message)
    scratch.replace(place)


def _accept(
    fetched: Path, target: Path, manifest: Manifest, url: str, replace: bool, work: WorkFolder, progress: Progress
) -> None:
    """Give a fetched store its name, once it is sound and may have it."""
    damage = verify(fetched, progress)
    if damage or open_files(fetched).description.checksum != manifest.version:
        reason = damage[0].reason if damage else "it is another version than its manifest says"
        message = f"{url}: the store that was fetched is damaged ({reason}); push it again"
        raise FormatError(message)
    if target.exists() and not replace:
        with open_store(target) as held, open_store(fetched) as coming:
            differences = held.fingerprint.differences(coming.fingerprint)
            if differences:
                message = f"{target} has another fingerprint than the store at {url}; choose another name or replace it"
                raise FingerprintMismatchError(message, differences)
            refuse_another(held, coming, "Choose another name, or replace it")
    for folder, _, _ in os.walk(fetched):
        sync_folder(Path(folder))
    if target.is_dir():
        swap(fetched, target, work.aside)
        remove(work.aside)
    else:
        fetched.replace(target)
    sync_folder(target.parent)


@contextmanager
def _stream(fs: Any, remote: str) -> Iterator[Any]:
    """A remote file from its beginning; http servers need not know ranges for that, nor are they asked for its size."""
    with network_errors(remote), HttpStream(fs, remote) if is_http(fs) else fs.open(remote, "rb") as file:
        yield file


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
    data = bytearray()
    try:
        with _stream(fs, f"{root}/{MANIFEST}") as file:
            while len(data) <= MAX_MANIFEST_BYTES and (block := file.read(_BLOCK_BYTES)):
                data += block
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) > MAX_MANIFEST_BYTES:
        message = f"{url}: the manifest is larger than {MAX_MANIFEST_BYTES} bytes; it is no store's: check the URL"
        raise UntrustedStoreError(message)
    return parse_manifest(bytes(data), url)
