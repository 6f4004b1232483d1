"""Processes that make a store slowly, to be killed, limited or to share the work."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cache
from tests.cache.making import FINGERPRINT, TAPS, begin, row, write

processes = multiprocessing.get_context("forkserver")
ON_THE_WAY = ["pytest", "h5py", "numpy.ma", "numpy.random", "encodings.cp437"]
"""What a process imports at its start and as it goes: most of its time, if each did so itself."""
processes.set_forkserver_preload(["tests.cache.run_store", *ON_THE_WAY])


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """A process of its own, quickly: it is forked from a server that has imported what it needs."""
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: Any) -> int:
    """Exit status of a process that must end by itself."""
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return int(process.exitcode)


Heard = tuple[str, set[int], float]
"""A step that began, the rows that it is about, and when."""


class Maker:
    """A process that makes a store, and what it has told so far."""

    def __init__(self, path: Path, numbers: Sequence[int]) -> None:
        self._ear, mouth = processes.Pipe(duplex=False)
        self._process = start(make_in_steps, path, numbers, 0.0005, mouth)
        mouth.close()
        self.heard: list[Heard] = []

    def hears(self, step: str, times: int = 1) -> bool:
        """Listen until a step begins for so many times; false if the process ends before."""
        with suppress(EOFError):
            while [name for name, *_ in self.heard].count(step) < times:
                assert self._ear.poll(60), "it hangs"
                self.heard.append(self._ear.recv())
            return True
        return False

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str | None:
        """Listen to the rest; returns the step in which the process was killed, None if it had done everything."""
        self.hears("anything else")
        self._ear.close()
        last, status = self.heard[-1][0] if self.heard else "start", finish(self._process)
        if last == "done":
            return None
        assert status == -signal.SIGKILL, f"it ended by itself, with {status}, in {last!r}"
        return last


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


def make_taps(path: Path, numbers: Sequence[int], taps: Mapping[str, cache.TapSpec], log: Path) -> None:
    """Make a store of other taps, a line in `log` for every shard that is about to be written."""
    unsynced()
    wanted = [row(number) for number in numbers]
    with begin(path, wanted, taps=taps) as writer:
        for plan in writer.pending:
            with log.open("a") as file:
                file.write("shard\n")
            time.sleep(0.02)
            write(writer, plan, wanted, taps)
        writer.commit()


def make_in_steps(path: Path, numbers: Sequence[int], seconds: float, tell: Connection) -> None:
    """Make a store and tell each step as it begins: its name, the indices of the rows that it is about, the time.

    Told between shards are the rows that are still to be written; then, and for each row, it takes some `seconds`.
    """
    unsynced()

    def begins(step: str, about: Iterable[int] = ()) -> None:
        tell.send((step, set(about), time.perf_counter()))

    wanted = [row(number) for number in numbers]
    begins("opening")
    writer = begin(path, wanted)
    missing = {i for plan in writer.pending for i in plan.rows}
    begins("between", missing)
    for plan in writer.claims():
        time.sleep(seconds)
        begins("encoding", plan.rows)
        time.sleep(seconds * len(plan.rows))
        begins("writing", plan.rows)
        write(writer, plan, wanted)
        missing -= set(plan.rows)
        begins("between", missing)
    begins("commit")
    writer.commit()
    begins("done")


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
