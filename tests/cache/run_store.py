"""Processes that make a store slowly, to be killed, limited or to share the work."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import cache
from tests.cache.making import FINGERPRINT, TAPS, begin, row, write


def unsynced() -> None:
    """Kills do not lose what the kernel has; only power cuts do, and a sync costs more than all the rest here."""
    os.fsync = lambda handle: None  # type: ignore[assignment]


def make(path: Path, numbers: Sequence[int], seconds: float, log: Path, join: bool = False) -> None:
    """Make a store, one line in `log` for every image that is encoded."""
    unsynced()
    wanted = [row(number) for number in numbers]
    if join:
        writer: cache.StoreWriter | cache.StoreWorker = cache.join_store(
            path, fingerprint=FINGERPRINT, taps=TAPS, rows=wanted
        )
    else:
        writer = begin(path, wanted)
    with log.open("a") as file:
        for plan in writer.claims():
            for i in plan.rows:
                time.sleep(seconds)
                file.write(f"{os.getpid()} {wanted[i].id}\n")
                file.flush()
            write(writer, plan, wanted)
        if isinstance(writer, cache.StoreWriter):
            writer.commit()
            writer.close()


def make_within(path: Path, numbers: Sequence[int], limit_bytes: int, log: Path) -> None:
    """Make a store under a limit on the size of files; the error's type and text go to `log`."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        make(path, numbers, 0, Path(os.devnull))
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        log.write_text(f"{type(error).__name__}: {error}")


def report(path: Path, numbers: Sequence[int], log: Path) -> None:
    """Make a store; the error's type and text go to `log`."""
    try:
        make(path, numbers, 0, Path(os.devnull))
    except Exception as error:
        log.write_text(f"{type(error).__name__}: {error}")


def hold_in_turn(path: Path, counter: Path, turns: int) -> None:
    """Take the writer's lock `turns` times and count under it, without any other protection."""
    unsynced()
    while turns:
        try:
            with begin(path, [row(0)]):
                count = int(counter.read_text())
                time.sleep(0.002)
                counter.write_text(str(count + 1))
                turns -= 1
        except cache.StoreLockedError:
            time.sleep(0.001)
