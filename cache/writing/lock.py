"""One writer at a time: an advisory lock that names its holder and dies with it.

The lock is the kernel's (`flock`), so it serves one machine, a dead process holds nothing, and there is no "stale lock"
to judge. The file is deleted on release; whoever waited for the deleted file notices that the name means another file
now and starts over.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

from cache.durable import space_errors
from cache.errors import StoreLockedError


class WriterLock:
    """Exclusive right to write one store, held until `release` or the end of the process."""

    def __init__(self, path: Path, subject: Path) -> None:
        """Take the lock.

        Args:
            path: The lock file; its folder is made if it is missing.
            subject: The store, for the message.

        Raises:
            StoreLockedError: Another process holds it; the message says which and for how long.
            NoSpaceError: The disk is full.
        """
        self._path = path
        self._handle = _acquire(path, subject)
        self._since = time.time()
        try:
            self._tell(leads=False)
        except BaseException:
            self.release()
            raise

    def lead(self) -> None:
        """Tell those who wait that the work is planned, so that they may join it."""
        self._tell(leads=True)

    def _tell(self, *, leads: bool) -> None:
        holder = {"pid": os.getpid(), "since": self._since, "leads": leads}
        with space_errors(self._path):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(holder).encode(), 0)

    @property
    def folder(self) -> Path:
        """Where the lock file lies."""
        return self._path.parent

    def release(self) -> None:
        """Give the lock back and delete its file; a second call does nothing."""
        if self._handle >= 0:
            self._path.unlink(missing_ok=True)
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # a forked child would keep it with its copy of the descriptor
            os.close(self._handle)
            self._handle = -1


def is_led(path: Path) -> bool:
    """Whether a living process holds this lock and has planned its work.

    The lock itself is not tried: whoever tries it has it for a moment, in which its holder to be would be refused.
    """
    try:
        fields = json.loads(path.read_bytes())
        os.kill(fields["pid"], 0)
        return bool(fields["leads"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _acquire(path: Path, subject: Path) -> int:
    """Descriptor of the locked file that `path` names at that moment."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 4096, 0)
            os.close(handle)
            raise StoreLockedError(_refusal(holder, subject)) from None
        except BaseException:
            os.close(handle)
            raise
        if _names(path, handle):
            return handle
        os.close(handle)


def _names(path: Path, handle: int) -> bool:
    """Whether `path` still means the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _refusal(holder: bytes, subject: Path) -> str:
    """The message for whoever comes second."""
    try:
        fields = json.loads(holder)
        who = f"process {fields['pid']} since {time.time() - fields['since']:.0f} s"
    except (ValueError, TypeError, KeyError):
        who = "another process"
    return f"{subject} is being written by {who}; wait for it, or stop it and run the same command again"
