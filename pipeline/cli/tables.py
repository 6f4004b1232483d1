"""Tables and lines that several commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

MOST_ROWS = 30  # of a table for people; JSON and files have them all


def say(text: str) -> None:
    """Print a line as it is, with what no terminal should obey made visible."""
    click.echo("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, words: int = 1) -> None:
    """Print a table without a frame: the first columns are words, the others figures to be compared at a glance.

    Args:
        columns: Titles.
        rows: Cells; shown as plain text, so that names may hold brackets.
        words: How many columns, from the left, hold words.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(columns):
        table.add_column(title, justify="left" if number < words else "right", overflow="fold", no_wrap=number >= words)
    for row in rows[:MOST_ROWS]:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    Console().print(table)
    if len(rows) > MOST_ROWS:
        say(f"and {len(rows) - MOST_ROWS} more")


def printable(text: str) -> str:
    """Text without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
