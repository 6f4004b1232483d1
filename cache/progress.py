"""How long work on a store reports itself: one callback, nobody by default."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the state of long work after each piece of it."""

    def __call__(self, task: str, done: int, total: int, **info: float | str) -> None:
        """Report that `done` of `total` pieces of `task` are finished."""


def silent(task: str, done: int, total: int, **info: float | str) -> None:
    """Report to nobody."""
