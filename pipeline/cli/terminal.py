"""What a person sees: bars and lines while work goes on, a table or JSON at its end, exit statuses."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

DONE, FAILED, WRONG_USE, INCOMPLETE, STOPPED = 0, 1, 2, 3, 130
LINE_EVERY_SECONDS = 30.0  # between progress lines where there is no terminal to draw a bar on


def examples(*lines: str) -> str:
    """Lines for the foot of a command's help, each kept on its own: the backspace asks click not to rewrap."""
    return "\b\n" + "\n".join(("Examples:", *(f"  {line}" for line in lines)))


def show(report: Mapping[str, Any], as_json: bool) -> int:
    """Print a report: one JSON object, or a table with nested reports indented."""
    if as_json:
        click.echo(json.dumps(report, default=str, allow_nan=False))
        return DONE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _lines(report):
        table.add_row(key, value)
    Console().print(table)
    return DONE


def _lines(report: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for key, value in report.items():
        name = indent + str(key).replace("_", " ")
        if isinstance(value, Mapping) and value:
            yield name, ""
            yield from _lines(value, indent + "  ")
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif isinstance(value, list | tuple):
            yield name, ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
        elif value not in ("", None, {}):
            yield name, str(value)


@contextmanager
def bars() -> Iterator[Callable[..., None]]:
    """A `Progress` that draws a bar per task on a terminal and writes a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def draw(task: str, done: int, total: int, **info: float | str) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total, figures="")
            bars.update(tasks[task], completed=done, total=total, figures=_figures(info))

        yield draw


class _Lines:
    """Progress where there is no terminal: a task's first and last piece, and a line every half minute."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def __call__(self, task: str, done: int, total: int, **info: float | str) -> None:
        now = time.monotonic()
        began = self._began.setdefault(task, now)
        if done < total and now - self._last.setdefault(task, now) < LINE_EVERY_SECONDS:
            return
        self._last[task] = now
        left = f"  {(now - began) / done * (total - done):.0f} s left" if 0 < done < total else ""
        click.echo(f"{task} {done}/{total}  {_figures(info)}{left}".rstrip(), err=True)


def _figures(info: Mapping[str, float | str]) -> str:
    return "  ".join(
        f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in info.items()
    )
