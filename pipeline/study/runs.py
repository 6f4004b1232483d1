"""Many runs of one study: done ones are skipped, each is made once, and a dead process's run is taken over.

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
from pipeline import records
from pipeline.errors import DataError, RunError
from pipeline.progress import Progress, silent

Row = dict[str, Any]
SCORES = {"auc": "AUC", "ap": "AP", "acc": "ACC", "balanced_acc": "balanced ACC", "f1": "F1", "kappa": "kappa",
          "ece": "ECE", "brier": "Brier"}  # of a run that are kept, and what tables call them  # fmt: skip
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
        point: Where it is in the grid, seed and fold apart. Variants are compared at the same point, whatever each sets
            of its own, such as another backbone.
        seed: What the runs of a cell differ in.
        fold: Of a cross-validation, from 0; None without one. The runs of a cell and seed are its folds.
    """

    name: str
    folder: Path
    cell: Mapping[str, Any]
    point: Mapping[str, Any]
    seed: int
    fold: int | None = None


def result_of(planned: Planned) -> Row | None:
    """Read what a run came to: `scores` by name, `val_auc`, `best_epoch`, `seconds`; None if it is not done."""
    try:
        result: Row = records.read_json(planned.folder / _RESULT)
    except FileNotFoundError:
        return None
    return result


def forget_result(planned: Planned) -> None:
    """Have a run count as not done."""
    (planned.folder / _RESULT).unlink(missing_ok=True)


def result_from(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Row:
    """Take what a study needs from the metrics of an evaluated run and from its history."""
    return {
        "scores": {name: value for name, value in metrics.items() if name in SCORES},
        "val_auc": metrics["val_auc"],
        "best_epoch": metrics["best_epoch"],
        "seconds": sum(row["seconds"] for row in history),
    }


Crew = Callable[[Iterator[Planned]], Iterator[tuple[Planned, Row | str]]]
"""Makes runs, drawn as it has hands free, and gives what each came to, or why it could not be made, in any order."""


def one_by_one(make: Callable[[Planned, Progress], Row], progress: Progress = silent) -> Crew:
    """The crew of one: this process.

    Args:
        make: Makes a run, from the start or from where a dead process left it, and gives its result.
        progress: Called by `make`, with the run's name beside its figures.
    """

    def crew(runs: Iterator[Planned]) -> Iterator[tuple[Planned, Row | str]]:
        for planned in runs:
            try:
                outcome: Row | str = make(planned, _named(progress, planned))
            except (RunError, DataError) as error:
                outcome = str(error)
            yield planned, outcome

    return crew


def work_through(
    runs: Sequence[Planned],
    crew: Crew,
    *,
    after_each: Callable[[Planned], None] = lambda planned: None,
    wait_seconds: float = WAIT_SECONDS,
    progress: Progress = silent,
) -> dict[str, str]:
    """Make every run that is not done, together with whatever other processes do the same.

    Args:
        runs: Of the study.
        crew: Makes them.
        after_each: Called with each run that was made, once its result is written.
        wait_seconds: Pause between looks at runs that other processes hold.
        progress: Called before and after each run (`run`).

    Returns:
        Why a run could not be made, by its name: its training or its data failed, and the others went on.
    """
    failed: dict[str, str] = {}
    left = [planned for planned in runs if result_of(planned) is None]
    while left:
        with _Claims() as claims:
            for planned, outcome in crew(claims.of(left, lambda planned: _tell(progress, runs, planned))):
                if isinstance(outcome, str):
                    failed[planned.name] = outcome
                else:
                    records.write_json(planned.folder / _RESULT, outcome)
                    after_each(planned)
                claims.release(planned)
        if len(claims.held) == len(left):
            time.sleep(wait_seconds)
        left = [planned for planned in claims.held if result_of(planned) is None]
    _tell(progress, runs, None)
    return failed


class _Claims:
    """The runs that this process holds while it has them made.

    Attributes:
        held: Those that other processes held.
    """

    def __init__(self) -> None:
        self.held: list[Planned] = []
        self._ours: dict[str, WriterLock] = {}

    def __enter__(self) -> _Claims:
        return self

    def __exit__(self, *error: object) -> None:
        for lock in self._ours.values():
            lock.release()

    def of(self, runs: Sequence[Planned], tell: Callable[[Planned], None]) -> Iterator[Planned]:
        """Claim run by run and yield those that could be had and are not done meanwhile."""
        for planned in runs:
            tell(planned)
            try:
                self._ours[planned.name] = WriterLock(planned.folder / _CLAIM, planned.folder)
            except StoreLockedError:
                self.held.append(planned)
                continue
            if result_of(planned) is None:
                yield planned
            else:
                self.release(planned)

    def release(self, planned: Planned) -> None:
        """Let others have a run."""
        self._ours.pop(planned.name).release()


def claim_of(planned: Planned) -> bytes:
    """What the claim of a run says of who holds it: a machine that reads the same there sees the same folder."""
    try:
        return (planned.folder / _CLAIM).read_bytes()
    except OSError:
        return b""


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
