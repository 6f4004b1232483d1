"""Items on their way to workers: one whose worker died goes to another.

One that takes its workers with it is taken apart, until the part that does it is alone; so an innocent item is never
given up for the company that it was in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Done(Generic[T, R]):
    """An item and what a worker made of it.

    Attributes:
        item: As it was given, or a part of one that was taken apart.
        result: What the worker returned; arrays in it may be read-only.
        node: Name of the node that it happened on.
        seconds: How long the worker took.
    """

    item: T
    result: R
    node: str
    seconds: float


@dataclass(frozen=True)
class Lost(Generic[T]):
    """An item that takes its workers with it.

    Attributes:
        item: As it was given, or a part of one that was taken apart.
        reason: How its worker died, for people.
    """

    item: T
    reason: str


@dataclass
class Task(Generic[T]):
    """An item on its way; one under suspicion is worked on alone, so that it is plain what a worker died of."""

    item: T
    deaths: int = 0
    suspect: bool = False
    turn: int = 0  # in which it was handed out
    gone: int = 0  # how often its result could not be fetched
    arriving: Future[Any] | None = None  # its result, on its way here from the moment that it is there


class Queue(Generic[T]):
    """The tasks of a map that no worker has."""

    def __init__(self, items: Iterable[T], tries: int, split: Callable[[T], Sequence[T]] | None) -> None:
        self._source, self._drawn = iter(items), False
        self._tries, self._split = tries, split
        self.waiting: deque[Task[T]] = deque()

    def draw(self, count: int) -> None:
        """Have so many tasks waiting, if there are as many."""
        while not self._drawn and len(self.waiting) < count:
            try:
                self.waiting.append(Task(next(self._source)))
            except StopIteration:
                self._drawn = True

    def take(self, alone: bool) -> Task[T] | None:
        """The next task for a worker, which is `alone` with it or has others; None if there is none for it."""
        task = next((task for task in self.waiting if alone or not task.suspect), None)
        if task is not None:
            self.waiting.remove(task)
        return task

    def put_back(self, tasks: Sequence[Task[T]]) -> None:
        """Take tasks back through no fault of theirs."""
        self.waiting.extendleft(reversed(tasks))

    def blame(self, task: Task[T], how: str) -> Lost[T] | None:
        """Decide about a task whose worker died: another try, its parts, or none."""
        task.deaths, task.suspect = task.deaths + 1, True
        if task.deaths < self._tries:
            self.put_back([task])
            return None
        parts = self._parts(task.item)
        if len(parts) < 2:
            times = {1: "once", 2: "twice"}.get(self._tries, f"{self._tries} times")
            return Lost(task.item, f"its worker died {times}: {how}")
        last_try = self._tries - 1  # for a part that can be divided again; one that cannot has all of them
        self.put_back([Task(part, last_try if len(self._parts(part)) > 1 else 0, True) for part in parts])
        return None

    def _parts(self, item: T) -> Sequence[T]:
        return [] if self._split is None else self._split(item)
