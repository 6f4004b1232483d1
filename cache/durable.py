"""Files that survive a power cut: written under another name, synced, renamed, and the folder synced too."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import NoSpaceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HDF5_ERRNO = re.compile(r"errno = (\d+)")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" into a `NoSpaceError` that says what happens to the work so far."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        found = _HDF5_ERRNO.search(str(error))  # HDF5 tells the number in its text only
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in _FULL:
            raise
        message = (
            f"{path}: {os.strerror(number).lower()} while writing; what is finished is kept: "
            f"make space (or raise the limit) and run the same command again"
        )
        raise NoSpaceError(message) from error


def write_file(path: Path, blocks: Iterable[bytes | memoryview], scratch: Path) -> None:
    """Write `blocks` to `path` so that the name never shows anything but the whole, synced content.

    The name itself is durable after `sync_folder` on the folder, which one call does for many files.

    Args:
        path: The file; replaced if it exists (its old inode is left as it was).
        blocks: Content, in order.
        scratch: Name to write under first, on the same file system; removed on failure.

    Raises:
        NoSpaceError: The disk is full; `path` is as it was.
    """
    with space_errors(path):
        try:
            with scratch.open("wb", buffering=0) as file:
                for block in blocks:
                    view = memoryview(block)
                    while view:
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def require_space(size: int, scratch: Path) -> None:
    """Try whether a file of `size` bytes fits, for a writer that does not survive a full disk.

    Raises:
        OSError: It does not.
    """
    try:
        with scratch.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    finally:
        scratch.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path, scratch: Path) -> None:
    """Give the bytes of `source` a second name, without a second copy where the file system can."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}:
            with space_errors(target):
                raise
        with source.open("rb") as file:
            write_file(target, iter(lambda: file.read(1 << 22), b""), scratch)


def swap(new: Path, current: Path, aside: Path) -> None:
    """Put `new` in the place of the existing `current`; the old one lies at `new` or `aside` afterwards.

    On Linux the two names are exchanged in one step. Elsewhere two renames are needed, and `recover_swap` undoes a
    stop between them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(current), _RENAME_EXCHANGE)
        if done == 0:
            return
    current.rename(aside)
    new.rename(current)


def recover_swap(current: Path, aside: Path) -> None:
    """Give a store its name back if a swap in two renames was stopped between them."""
    if aside.exists() and not current.exists():
        aside.rename(current)


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
