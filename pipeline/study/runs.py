"""Many runs of one study: done ones are skipped, each is made by one process, and a dead process's run is taken over.

Processes of one machine share nothing but the folder: a run is claimed by an advisory lock in its own folder, which
dies with its process. A process that finds only claimed runs waits for them, so that whoever is left makes the tables
of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import StoreLockedError
from cache.writing.lock import WriterLock
from pipeline.errors import DataError, RunError
from pipeline.progress import Progress, silent
from pipeline.train import run_folder

Row = dict[str, Any]
_RESULT = "result.json"  # of a run: written last, so that it says the run is done
_CLAIM = "claim"
WAIT_SECONDS = 1.0  # between looks at what other processes hold


@dataclass(frozen=True)
class Planned:
    """One run of a study.

    Attributes:
        name: Of the run, unique in its study.
        folder: Where it is made.
        cell: What its row of the table is about, by column: variant, backbone, other axes, fraction, and any shots.
        seed: What the runs of a cell differ in.
        fold: Of a cross-validation, from 0; None without one. The runs of a cell and seed are its folds.
    """

    name: str
    folder: Path
    cell: Mapping[str, Any]
    seed: int
    fold: int | None = None


def result_of(planned: Planned) -> Row | None:
    """Read what a run came to: `scores` by name, `val_auc`, `best_epoch`, `seconds`; None if it is not done."""
    try:
        result: Row = run_folder.read_json(planned.folder / _RESULT)
    except FileNotFoundError:
        return None
    return result


def forget_result(planned: Planned) -> None:
    """Have a run count as not done."""
    (planned.folder / _RESULT).unlink(missing_ok=True)


def result_from(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Row:
    """Take what a study needs from the metrics of an evaluated run and from its history."""
    return {
        "scores": {name: value for name, value in metrics.items() if name in _SCORES},
        "val_auc": metrics["val_auc"],
        "best_epoch": metrics["best_epoch"],
        "seconds": sum(row["seconds"] for row in history),
    }


_SCORES = ("auc", "ap", "acc", "balanced_acc", "f1", "kappa", "ece", "brier")


def work_through(
    runs: Sequence[Planned],
    make: Callable[[Planned, Progress], Row],
    *,
    after_each: Callable[[Planned], None] = lambda planned: None,
    wait_seconds: float = WAIT_SECONDS,
    progress: Progress = silent,
) -> dict[str, str]:
    """Make every run that is not done, together with whatever other processes do the same.

    Args:
        runs: Of the study.
        make: Makes a run, from the start or from where a dead process left it, and gives its result.
        after_each: Called with each run that this process made, once its result is written.
        wait_seconds: Pause between looks at runs that other processes hold.
        progress: Called after each run (`run`) and by `make`, with the run's name beside its figures.

    Returns:
        Why a run could not be made, by its name: its training or its data failed, and the others went on.
    """
    failed: dict[str, str] = {}
    left = [planned for planned in runs if result_of(planned) is None]
    while left:
        held = []
        for planned in left:
            _tell(progress, runs, planned)
            with _claim(planned) as is_mine:
                if not is_mine:
                    held.append(planned)
                elif result_of(planned) is None:
                    try:
                        run_folder.write_json(planned.folder / _RESULT, make(planned, _named(progress, planned)))
                        after_each(planned)
                    except (RunError, DataError) as error:
                        failed[planned.name] = str(error)
        if len(held) == len(left):
            time.sleep(wait_seconds)
        left = [planned for planned in held if result_of(planned) is None]
    _tell(progress, runs, None)
    return failed


@contextmanager
def alone(lock: Path, subject: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Be the only process in the block; others wait.

    Args:
        lock: The lock file.
        subject: What the block is about.
        wait_seconds: Pause between tries.
    """
    while True:
        try:
            held = WriterLock(lock, subject)
            break
        except StoreLockedError:
            time.sleep(wait_seconds)
    try:
        yield
    finally:
        held.release()


@contextmanager
def _claim(planned: Planned) -> Iterator[bool]:
    """Hold a run for the block; says whether it could be had."""
    try:
        held = WriterLock(planned.folder / _CLAIM, planned.folder)
    except StoreLockedError:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def _tell(progress: Progress, runs: Sequence[Planned], planned: Planned | None) -> None:
    done = sum((run.folder / _RESULT).is_file() for run in runs)
    now = {} if planned is None else {"now": planned.name}
    progress("run", done, len(runs), **now)


def _named(progress: Progress, planned: Planned) -> Progress:
    """Pass on what a run reports, but for its single steps, with its name."""

    def report(task: str, done: int, total: int, **info: float | str) -> None:
        if task != "train":
            progress(task, done, total, **({"of": planned.name} if task == "epoch" else {}), **info)

    return report
