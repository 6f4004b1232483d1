"""How long work reports itself: one callback that the command line draws and the library never does."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the state of long work after each piece of it."""

    def __call__(self, task: str, done: int, total: int, **info: float | str) -> None:
        """Report that `done` of `total` pieces of `task` are finished.

        Args:
            task: What is being done, as a person would say it: `"encode"`, `"epoch"`.
            done: Finished pieces, 0 to `total`.
            total: All pieces, 0 where there is nothing to do.
            info: Figures to show beside the bar, such as `loss=0.31`.
        """


def silent(task: str, done: int, total: int, **info: float | str) -> None:
    """Report to nobody: the default wherever a `Progress` is taken."""
