"""What a person sees: bars and lines while work goes on, a table or JSON at its end, exit statuses."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import click

DONE, FAILED, WRONG_USE, INCOMPLETE, STOPPED = 0, 1, 2, 3, 130
SHOWN = 5  # texts of a list in a table; JSON has them all
_LONGEST_KEY = 40  # in a table
LINE_EVERY_SECONDS = 30.0  # between progress lines where there is no terminal to draw a bar on
SPEED_OVER_SECONDS = 600.0  # a bar's time left rests on this past: one image of a large encoder may take a minute


class Stopped(Exception):
    """Somebody stopped the work; the message says what of it is kept."""


@contextmanager
def telling_what_is_kept(tell: Callable[[], str]) -> Iterator[None]:
    """Let whoever stops the work inside know how much of it was not in vain."""
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        raise Stopped(tell()) from None


def examples(*lines: str) -> str:
    """Lines for the foot of a command's help, each kept on its own: the backspace asks click not to rewrap."""
    return "\b\n" + "\n".join(("Examples:", *(f"  {line}" for line in lines)))


def printable(text: str) -> str:
    """Text without anything that a terminal would obey: escapes, turned writing and line ends are made visible.

    All that comes from a store, a run, a configuration or a file name goes through here before it is printed.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text: str = "", *, bold: bool = False, err: bool = False) -> None:
    """Print a line."""
    click.secho(printable(text), bold=bold or None, err=err)


def say_json(value: object) -> None:
    """Print a JSON object on a line; it is in ASCII, so no terminal obeys any of it."""
    click.echo(json.dumps(value, default=str, allow_nan=False))


def show(report: Mapping[str, Any], as_json: bool, page: Callable[[Mapping[str, Any]], None] | None = None) -> int:
    """Print a report: one JSON object, or the page of it; without one a table with nested reports indented."""
    if as_json:
        say_json(report)
        return DONE
    if page is not None:
        page(report)
        return DONE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _lines(report):
        said = "\n".join(map(printable, value.split("\n")))
        table.add_row(Text(_shortened(printable(key))), Text(said))  # not as markup: names may hold brackets
    Console().print(table)
    return DONE


def _shortened(key: str) -> str:
    """A key that leaves room for values."""
    return key if len(key) <= _LONGEST_KEY else f"{key[: _LONGEST_KEY - 3]}..."


def _lines(report: Mapping[str, Any], indent: str = "", *, names: bool = False) -> Iterator[tuple[str, str]]:
    """Key and value of each line; keys are our words, or below a key `names` of taps, classes and settings."""
    for key, value in report.items():
        name = indent + (str(key) if names else str(key).replace("_", " "))
        if isinstance(value, Mapping) and value:
            yield name, ""
            yield from _lines(value, indent + "  ", names=True)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            yield name, ""
            yield from _blocks(value, indent + "  ")
        elif isinstance(value, list | tuple):
            yield name, _listed(value)
        elif value not in ("", None, {}):
            yield name, _number(value)


def _blocks(items: Sequence[Mapping[str, Any]], indent: str) -> Iterator[tuple[str, str]]:
    """Each report of a list: a line of its first value, and the others indented below."""
    for item in items:
        (first, value), *rest = item.items()
        yield from _lines({first: value}, indent)
        yield from _lines(dict(rest), indent + "  ")


def _listed(items: Sequence[Any]) -> str:
    """A list on a line: texts in full up to five, then how many there are besides."""
    shown = items[:SHOWN] if any(isinstance(item, str) for item in items) else items
    more = [f"and {len(items) - len(shown)} more"] if len(items) > len(shown) else []
    return ", ".join([*map(_number, shown), *more]) or "none"


@contextmanager
def bars() -> Iterator[Callable[..., None]]:
    """A `Progress` that draws a bar per task on a terminal and writes a line now and then elsewhere.

    The epochs of a training on its own leave a row of a table each above the bars.
    Of several processes that `torchrun` starts on a machine the first one speaks.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield lambda task, done, total, **info: None
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description:>10}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn(
            "{task.fields[figures]}", markup=False, table_column=Column(no_wrap=False)
        ),  # where it is narrow, this one gives
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=SPEED_OVER_SECONDS) as bars:
        tasks: dict[str, Any] = {}
        table = _EpochTable()

        def draw(task: str, done: int, total: int, **info: float | str) -> None:
            if task == "epoch" and "of" not in info:  # of a study, whose many runs would flood the terminal
                for line in table.lines(done, info):
                    bars.console.print(line, highlight=False, no_wrap=True, overflow="crop")
                return
            info = _without_table_only(task, info)
            if total == 1 and task not in tasks:  # nothing that takes time, only something to say
                bars.console.print(f"{task}  {_figures(info)}", highlight=False, markup=False)
                return
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total, figures="")
            elif done < bars.tasks[tasks[task]].completed:
                bars.reset(tasks[task])  # the same work on something else
            bars.update(tasks[task], completed=done, total=total, figures=_figures(info))

        yield draw


class _EpochTable:
    """What each finished epoch of a training leaves on a terminal: a row, and a header above the first."""

    columns: ClassVar = {"train_loss": "train loss", "val_loss": "val loss", "val_auc": "val AUC", "seconds": "seconds"}

    def __init__(self) -> None:
        self._last = 0

    def lines(self, epoch: int, figures: Mapping[str, float | str]) -> Iterator[str]:
        """Give the row of an epoch, after the header where a training begins."""
        if not 0 < self._last < epoch:
            yield "  ".join(("epoch", *(f"{title:>10}" for title in self.columns.values())))
        self._last = epoch
        cells = (f"{_cell(key, figures[key]):>10}" for key in self.columns if key in figures)
        yield "  ".join((f"{epoch:>5}", *cells, *(["best so far"] if figures.get("best_epoch") == epoch else [])))


def _cell(key: str, value: float | str) -> str:
    """A figure with as many decimals as its column has."""
    return f"{float(value):.1f}" if key == "seconds" else f"{float(value):.4f}"


def _without_table_only(task: str, info: Mapping[str, float | str]) -> dict[str, float | str]:
    """The figures of an epoch that belong on a line: the table alone has room for the others."""
    return {key: value for key, value in info.items() if task != "epoch" or key not in ("seconds", "best_epoch")}


class _Lines:
    """Progress where there is no terminal: a line every half minute, at a task's end, and after its first piece.

    The line after the first piece comes where the task has said when it began, so that there is a time left to tell.
    """

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}

    def __call__(self, task: str, done: int, total: int, **info: float | str) -> None:
        now = time.monotonic()
        if task not in self._began:
            self._began[task] = now, done
            self._last[task] = now if done else -LINE_EVERY_SECONDS
        if done < total and (not done or now - self._last[task] < LINE_EVERY_SECONDS):
            return
        self._last[task] = now
        info = _without_table_only(task, info)
        began, before = self._began[task]
        left = f"{(now - began) / (done - before) * (total - done):.0f} s left" if before < done < total else ""
        say("  ".join(filter(None, (f"{task} {done}/{total}", _figures(info), left))), err=True)


def _figures(info: Mapping[str, float | str]) -> str:
    return printable("  ".join(f"{_words(key)} {_number(value)}" for key, value in info.items()))


def _words(key: str) -> str:
    return key.replace("_per_", "/").replace("_", " ")


def _number(value: object) -> str:
    """Four digits of a small number, all of a large one, never an exponent for something to be compared at a glance."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
