"""Tables and lines that several commands print."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.terminal import printable, say

_NARROWEST = 10  # of a column of words where the terminal is narrow
_UNBOUNDED = 2**16
MOST_ROWS = 30  # of a table for people; JSON and files have them all


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, words: int = 1, most: int = MOST_ROWS
) -> None:
    """Print a table without a frame: the first columns are words, the others figures to be compared at a glance.

    Args:
        columns: Titles.
        rows: Cells; shown as plain text, so that names may hold brackets.
        words: How many columns, from the left, hold words.
        most: Rows after which to stop.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows[:most]]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, title in enumerate(columns):
        if number < words:
            longest = max((len(row[number]) for row in cells), default=0)
            table.add_column(Text(printable(title)), overflow="fold", min_width=min(_NARROWEST, longest))
        else:
            table.add_column(Text(printable(title)), justify="right", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_UNBOUNDED)  # a file or a pipe folds nothing
    console.print(table)
    if len(rows) > most:
        say(f"and {len(rows) - most} more")


def counts_table(counts: Mapping[str, Any]) -> None:
    """Images by class and split, and groups by split."""
    splits = ("train", "val", "test")
    rows: list[list[object]] = [
        [name, *(found[split] for split in splits), sum(found.values())] for name, found in counts["classes"].items()
    ]
    groups = counts["groups"]
    if counts["largest_group"] > 1:
        rows.append(["patients", *(groups[split] for split in splits), sum(groups.values())])
    print_table(("class", *splits, "all"), rows)


def ignored_line(ignored: Mapping[str, int]) -> str:
    """How many files are no samples, by suffix: `3 (.heic 2, .gif 1)`."""
    kinds = ", ".join(f"{suffix} {number}" for suffix, number in sorted(ignored.items(), key=lambda item: -item[1]))
    return f"{sum(ignored.values())} ({kinds})"
