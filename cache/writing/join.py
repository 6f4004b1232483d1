"""Several processes on one store: whoever claims a shard encodes it, and a dead process's claim is free again.

One process leads: it holds the store's lock (`create_store`) and commits. The others join its work folder. A claim is
a kernel lock on a file of the shard, so it ends with its holder and no claim ever has to be judged stale. All processes
are of one machine; on a cluster one process writes what others encode.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from cache.description import TapSpec, arrays_of
from cache.errors import FormatError, StoreError, StoreNotFoundError
from cache.fingerprint import Fingerprint
from cache.formats.mapped import Watch
from cache.formats.zarr_folder import OpenedStore
from cache.index import Row
from cache.reading.reader import open_files
from cache.writing.lock import is_led
from cache.writing.partial import WorkFolder, partial_path
from cache.writing.reuse import store_source
from cache.writing.same_work import Identity, holds, rows_sha256
from cache.writing.shards import ShardPlan, ShardWriter, find_origins

_POLL_SECONDS = 0.2


def claims(work: WorkFolder, pending: Sequence[ShardPlan], wait: bool) -> Iterator[ShardPlan]:
    """Shards for this process to encode, one after the other, until none is left.

    Args:
        work: The store in the making.
        pending: Candidates.
        wait: Stay until every candidate is finished, so that the shard of a process that dies is taken over.
    """
    remaining = list(pending)
    while remaining:
        for plan in list(remaining):
            if work.is_finished(plan.number):
                remaining.remove(plan)
                continue
            handle = _claim(work.claim_file(plan.number))
            if handle is None:
                continue
            try:
                if not work.is_finished(plan.number):
                    yield plan
            finally:
                os.close(handle)
            remaining.remove(plan)
        if not wait:
            return
        if remaining:
            time.sleep(_POLL_SECONDS)


def _claim(path: Path) -> int | None:
    """Descriptor that holds the claim, None if another process has it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:  # the store has been finished meanwhile
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


class StoreWorker:
    """Writes shards for a store that another process leads; made by `join_store`.

    Attributes:
        pending: Shards that needed features when this process joined.
    """

    def __init__(self, work: WorkFolder, shards: ShardWriter | None) -> None:
        """Join a work folder, or nothing where the store is finished."""
        self._work = work
        self._shards = shards
        self.pending: tuple[ShardPlan, ...] = shards.pending if shards else ()

    @property
    def shard_rows(self) -> int:
        """Rows of a full shard; 1 where the store is finished."""
        return self._shards.shard_rows if self._shards else 1

    def claims(self) -> Iterator[ShardPlan]:
        """Shards that no other process has taken; write each before asking for the next."""
        return claims(self._work, self.pending, wait=False)

    def write(
        self,
        plan: ShardPlan,
        features: Mapping[str, npt.NDArray[Any]],
        extents: npt.NDArray[Any],
        set_aside: Mapping[int, str] | None = None,
    ) -> None:
        """Write one shard of every tap; see `StoreWriter.write`."""
        if self._shards is None:
            message = f"{self._work.path}: the store is finished, shard {plan.number} is not wanted"
            raise StoreError(message)
        self._shards.write(plan, features, extents, set_aside)


def join_store(
    path: str | os.PathLike[str],
    *,
    fingerprint: Fingerprint,
    taps: Mapping[str, TapSpec],
    rows: Sequence[Row],
    reuse: Sequence[str | os.PathLike[str]] = (),
    wait_seconds: float = 60,
) -> StoreWorker:
    """Help another process that has called `create_store` with the same arguments.

    Args:
        path: The store.
        fingerprint: As given to `create_store`.
        taps: As given to `create_store`.
        rows: As given to `create_store`.
        reuse: As given to `create_store`.
        wait_seconds: How long to wait for the leading process to begin.

    Raises:
        StoreError: No process has begun this store in that time.
        FingerprintMismatchError: One has begun it with another fingerprint.
    """
    target = Path(os.path.realpath(path))
    work = WorkFolder(partial_path(target))
    identity = Identity(fingerprint, arrays_of(taps), {}, rows_sha256(rows))
    give_up = time.monotonic() + wait_seconds
    led: bool | None = None
    watched: list[Watch] = []
    while time.monotonic() <= give_up:
        if is_led(work.lock) is not led or any(watch.replaced() for watch in watched):  # else it would look in vain
            led, watched = is_led(work.lock), [Watch(target), Watch(work.plan)]
            worker = _join(target, work, identity, rows, reuse, led)
            if worker is not None:
                return worker
        time.sleep(_POLL_SECONDS)
    message = f"{target}: no process has begun this store within {wait_seconds:.0f} s; start the leading one first"
    raise StoreError(message)


def _join(
    target: Path,
    work: WorkFolder,
    identity: Identity,
    rows: Sequence[Row],
    reuse: Sequence[str | os.PathLike[str]],
    led: bool,
) -> StoreWorker | None:
    """Join the work as it is now; None where there is none of this store yet.

    Work of other rows or another fingerprint may be what an interrupted run has left, unless a process leads it.
    """
    stores: list[OpenedStore] = []
    finished = False
    with suppress(StoreNotFoundError):
        current = open_files(target)
        if not identity.differences(current.description.fingerprint, current.description.taps):
            if holds(current.index, rows):
                return StoreWorker(work, None)
            finished = holds(current.index, rows, also_set_aside=True)  # to try those again is the leader's choice
            stores.append(current)
    if not work.exists():
        return StoreWorker(work, None) if finished else None
    try:
        begun, plan, _ = work.load()
        if led:
            identity.require(begun.fingerprint, begun.taps, work.path, "join with the leader's own arguments")
        if identity.differences(begun.fingerprint, begun.taps) or begun.rows_sha256 != identity.rows_sha256:
            return None
        stores += [open_files(Path(name)) for name in reuse]
        sources = [source for opened in stores if (source := store_source(opened))]
        sources += [folder.source() for folder in work.retired()]
        return StoreWorker(work, ShardWriter(work, begun.taps, plan, find_origins(work, plan, begun.taps, sources)))
    except FormatError:
        if work.exists():
            raise
        return None  # the leader has committed it, or begins anew
