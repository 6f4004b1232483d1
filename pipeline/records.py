"""Records on disk, JSON and tables: written whole or not at all, and named where they are damaged."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import DamagedFileError, naming

_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a spreadsheet runs, or text that has been quoted already
_QUOTED = re.compile(r"'+[=+\-@\t\r]")
_MOST_BYTES = 256 << 20  # of JSON: a history of a million epochs


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose name never shows anything but the whole content, whatever kills the process."""
    scratch = path.with_name(path.name + ".partial")
    with naming(path), scratch.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write JSON for people and programs: indented, no NaN."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what is raised while a run's file is taken apart into an error that names it.

    Raises:
        DamagedFileError: The file is not what the command wrote that leaves it there.
    """
    try:
        yield
    except DamagedFileError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        said = "it is nested too deep" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
        msg = f"{str(path)!r} cannot be read ({said}): delete it, and run the command again that writes it."
        raise DamagedFileError(msg) from error


def read_json(path: Path, *, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """Read a file of JSON.

    Args:
        path: The file.
        kind: What it holds.

    Raises:
        DamagedFileError: It is no JSON of that kind, too large, nested too deep, or no plain file.
        OSError: It is not there or cannot be read.
    """
    with damage_named(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            problem = f"no plain file of at most {_MOST_BYTES} bytes"
            raise ValueError(problem)
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            problem = f"expected {'an object' if kind is dict else 'a list'}"
            raise ValueError(problem)
        return value


def write_csv(path: Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str] = ()) -> None:
    """Write a table, row by row.

    Text that a spreadsheet would run as a formula (a class may be called `=HYPERLINK(...)`) gets an apostrophe in
    front, which spreadsheets hide and `read_csv` takes off again.

    Args:
        path: The file.
        rows: Values by column.
        columns: All of them, in order; those of the first row by default.
    """
    remaining = iter(rows)
    first = next(remaining, None)
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.DictWriter(text, fieldnames=columns or list(first or ()), lineterminator="\n")
        table.writeheader()
        for row in () if first is None else itertools.chain([first], remaining):
            table.writerow({key: _inert(value) for key, value in row.items()})
        text.detach()  # flushes, and leaves the file open for whoever syncs it


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a table that `write_csv` wrote.

    Raises:
        DamagedFileError: It is no table, or a line has other cells than its header.
        OSError: It cannot be read.
    """
    with damage_named(path), path.open(newline="", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines, strict=True)
        return [
            {key: cell[1:] if _QUOTED.match(cell) else cell for key, cell in zip(header, row, strict=True)}
            for row in rows
            if row
        ]


def _inert(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value
