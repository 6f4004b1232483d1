"""The folder of a cluster that is started on this machine; a process that was killed leaves it to the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = Path("/tmp")  # and not $TMPDIR: a socket's path must be short
_OURS = "slca-ray-"
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds that Ray's processes take to end, at most


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder that is gone after the block; those of processes that were killed go before it."""
    for left in _TEMPORARY.glob(f"{_OURS}*"):
        handle = _locked(left)
        if handle is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
    handle = None
    while handle is None:  # another process may look before it is locked, and take it for one that is left
        folder = Path(tempfile.mkdtemp(prefix=_OURS, dir=_TEMPORARY))
        handle = _locked(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(handle)


def _remove(folder: Path) -> None:
    """Remove a folder in which processes that are about to end may write for a moment still."""
    for pause in _PAUSES:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(pause)
    shutil.rmtree(folder, ignore_errors=True)  # what is left the next run removes


def _locked(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives and the handle is open; None where it is another's, or gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None
