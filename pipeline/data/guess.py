"""What names seem to mean: patients and masks in file names, columns of a table. Guesses, to be shown and confirmed.

A pattern must match every name and put several images into some group, but not many into one. Only what can hardly be
anything but a patient may leave every image on its own.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.dataset import listing
from pipeline.data.image import SUFFIXES
from pipeline.data.layouts.mask_files import masks_of
from pipeline.data.splits import split_named
from pipeline.errors import DataError

PATTERNS = (
    r"(?i)((?:patient|subject|subj|case|pat|sub|pid)[_-]?\d+)",
    r"^(\d+)[_-]",
    r"^([A-Za-z]+\d+)[_-]",
    r"^([A-Za-z]+[_-]\d+)[_-]",
    r"^([^_]+)_",
    r"^([^-]+)-",
    r"^(.+)[_-]\d+\.[^.]+$",
)
_SURE = {  # names that look like this have such a patient, even if none of them is there twice
    PATTERNS[0]: PATTERNS[0],
    r"^\d{4,}[_-]\d{1,4}\.[^.]+$": PATTERNS[1],
}
_MASKS = ("{stem}_mask*", "{stem}-mask*", "{stem}_seg*", "{stem}_gt*", "../masks/{stem}.*", "../mask/{stem}.*")
_FEWEST_GROUPS, _LARGEST_SHARE = 6, 0.25
_ROWS = 2000  # of a table, enough to tell what its columns are
_MOST_CLASSES = 50
_GROUP_WORDS = re.compile(r"patient|subject|person|case|mrn|\bpid\b|group|lesion", re.IGNORECASE)
_LABEL_WORDS = re.compile(r"label|class|diagnos|target|finding|grade|dx|category|pathology", re.IGNORECASE)


def groups_by(pattern: str, names: Sequence[str]) -> dict[str, list[str]] | None:
    """Names by what a pattern finds in them, as `layouts.folder` reads it; None where it does not match them all.

    Raises:
        DataError: It is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        message = f"the group pattern {pattern!r} is no regular expression ({error}); mend --group-pattern"
        raise DataError(message) from None
    groups: dict[str, list[str]] = {}
    for name in names:
        match = compiled.search(name.rsplit("/", 1)[-1])
        group = match and match[1 if compiled.groups else 0]
        if group is None:
            return None
        groups.setdefault(group, []).append(name)
    return groups


def guess_group_pattern(names: Sequence[str]) -> str | None:
    """A pattern that seems to find patients in file names; None where no pattern does."""
    sure = [pattern for shape, pattern in _SURE.items() if groups_by(shape, names) is not None]
    for pattern in (*sure, *PATTERNS):
        groups = groups_by(pattern, names)
        if groups is None or not _FEWEST_GROUPS <= len(groups) < len(names) + (pattern in sure):
            continue
        if max(map(len, groups.values())) <= max(2, _LARGEST_SHARE * len(names)):
            return pattern
    return None


def guess_masks(names: Sequence[str]) -> tuple[str, int] | None:
    """How mask files among images seem to be called, as `data.masks` has it, and how many there are.

    Args:
        names: Files of a folder, taken for images.

    Returns:
        None where no pattern finds a mask for at least half of what it leaves as images.
    """
    for pattern in _MASKS:
        found = masks_of(names, pattern)
        if 2 * sum(map(bool, found.values())) >= len(found) > 0:
            return pattern, len(names) - len(found)
    return None


@dataclass(frozen=True)
class Columns:
    """What the columns of a table seem to be.

    Attributes:
        distinct: Different cells by column, among the first rows.
        path: Column of the images.
        label: Column of the class.
        split: Column of the split.
        group: Column of the patient.
        images: Folder that the paths are relative to.
        suffix: What has to be appended to them.
    """

    distinct: Mapping[str, int]
    path: str | None
    label: str | None
    split: str | None
    group: str | None
    images: Path | None
    suffix: str


def guess_columns(table: Path, path_column: str | None = None, images: Path | None = None) -> Columns:
    """Look at the first rows of a table.

    Args:
        table: A CSV file with a header.
        path_column: Column of the images, where that is known.
        images: Folder of the images, where that is known.

    Raises:
        DataError: It cannot be read, or has no rows.
    """
    rows = _first_rows(table)
    cells = {column: [(row[column] or "").strip() for row in rows] for column in rows[0] if column}
    distinct = {column: len(set(texts)) for column, texts in cells.items()}
    candidates = [path_column] if path_column in cells else sorted(cells, key=lambda column: -distinct[column])
    path, folder, suffix = None, images, ""
    for column in candidates:
        found = _find_images(cells[str(column)], table.parent if images is None else images, searched=images is None)
        if found is not None:
            path, (folder, suffix) = column, found
            break
    rest = [column for column in cells if column != path]
    split = next((c for c in rest if all(map(split_named, cells[c])) and distinct[c] > 1), None)
    group = next((c for c in rest if c != split and _GROUP_WORDS.search(c) and 1 < distinct[c] < len(rows)), None)
    return Columns(distinct, path, _label(cells, distinct, {path, split, group}), split, group, folder, suffix)


def _first_rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row, _ in zip(csv.DictReader(file, restval=""), range(_ROWS), strict=False)]
    except OSError as error:
        message = f"{table}: the table cannot be read ({error.strerror}); check the path"
        raise DataError(message) from None
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"{table}: this is no CSV table in UTF-8 ({error}); save it as one"
        raise DataError(message) from None
    if not rows:
        message = f"{table}: there are no rows below the header; expected a row per image"
        raise DataError(message)
    return rows


def _find_images(texts: Sequence[str], folder: Path, *, searched: bool) -> tuple[Path, str] | None:
    """The folder in which all of the first paths lie, and the suffix that they lack."""
    some = [text for text in texts if text][:8]
    if not some:
        return None
    folders = [folder]
    if searched:
        folders += sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for place in folders:
        for suffix in ("", *SUFFIXES):
            if all((place / f"{text}{suffix}").is_file() for text in some):
                return place, suffix
    return None


def _label(cells: Mapping[str, Sequence[str]], distinct: Mapping[str, int], taken: set[str | None]) -> str | None:
    """The column whose few values repeat, one that is named like a label first."""
    able = [
        column
        for column, texts in cells.items()
        if column not in taken
        and 2 <= distinct[column] <= min(_MOST_CLASSES, max(2, len(texts) // 2))
        and all(texts)
        and min(Counter(texts).values()) >= 2
    ]
    named = [column for column in able if _LABEL_WORDS.search(column)]
    return named[0] if named else able[0] if len(able) == 1 else None


def spell_columns(columns: Columns) -> str:
    """Columns with how many different cells each has, for a message."""
    return listing(f"{name}: {number} values" for name, number in columns.distinct.items())
