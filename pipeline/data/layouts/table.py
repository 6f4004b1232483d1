"""CSV tables: a row per image, with its label in one column or one column per class."""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.data.dataset import Dataset, Draw, Label, Sample, Split, Task, listing
from pipeline.data.depth import DEFAULT_READING, Reading
from pipeline.data.layouts.files import Files
from pipeline.data.splits import FRACTIONS, settle_splits, split_named
from pipeline.errors import DataError
from pipeline.url import AnyPath, Url, any_path, is_url

_INTEGER = re.compile(r"-?\d{1,18}")
MOST_SUBGROUPS = 20  # values of a column: with more, each would hold too few samples to say anything


@dataclass(frozen=True)
class _Row:
    """A line of a table: where it stands, what it says, and the split that its file stands for, if any."""

    where: str
    cells: Mapping[str, str]
    split: Split | None


def load_csv(
    path: AnyPath | Mapping[Split, AnyPath],
    *,
    root: AnyPath | None = None,
    path_column: str,
    label_column: str | None = None,
    label_columns: Sequence[str] = (),
    rest_class: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    suffix: str = "",
    mask_column: str | None = None,
    task: Task | None = None,
    subgroup_columns: Sequence[str] = (),
    subgroup_bands: Mapping[str, Sequence[float]] | None = None,
    fractions: Mapping[Split, float] = FRACTIONS,
    seed: int = 0,
    draw: Draw | None = "steady",
    reading: Reading = DEFAULT_READING,
) -> Dataset:
    """Load a table, or one table per split, in which an id is what `path_column` says, as text.

    An image may have a URL of its own there. It is read as it stands; its id is the path below `root`, or else the URL,
    without what gives access.

    Every cell stays text (`007` is not 7). The splits are those of the mapping, or of `split_column`, or else drawn;
    where they are train and test alone, val is drawn from train.

    Args:
        path: A CSV file with a header, UTF-8; or one for each split.
        root: Folder that the paths are relative to; None for the one of the (first) table.
        path_column: Column of the image's path.
        label_column: Column of the class name. Classes are numbered by value if all are integers, else by name.
        label_columns: Instead of `label_column`: one column of 0 and 1 per class, in the order of the classes.
        rest_class: Name of one more class, for the rows that have 0 in all `label_columns`.
        split_column: Column of the split: train, val or test, in any of their usual spellings.
        group_column: Column of the group, such as the patient. None: every image is a group.
        suffix: Appended to every path, such as `.jpg`.
        mask_column: Column of the path of a mask image, relative to `root`.
        task: `multilabel` lets any number of `label_columns` be 1; `ordinal` says that the classes ascend. None:
            binary or multiclass, by the number of classes.
        subgroup_columns: Columns whose values are scored by themselves, such as the sex; cells may be empty.
        subgroup_bands: For columns of numbers among them, such as the age, the limits between bands, ascending.
        fractions: Shares of val and test where the splits are drawn.
        seed: Of the drawn splits.
        draw: How they are drawn, see `pipeline.data.splits`; None makes everything test.
        reading: How the files become uint8 RGB.

    Raises:
        DataError: A table or column is missing, a cell is empty or not what its column holds, files are missing
            (they are listed), a path leaves `root`, a column of subgroups has too many values or is not among those
            with bands, or the result is no valid `Dataset`.
    """
    where = ", ".join(map(str, _tables(path)))
    if (label_column is None) == (not label_columns):
        given = "neither" if label_column is None else f"{label_column!r} and {listing(label_columns)}"
        message = f"{where}: got {given}; give either label_column or label_columns (data.label_column)"
        raise DataError(message)
    if split_column is not None and isinstance(path, Mapping):
        message = f"{where}: with one table per split there is no split_column ({split_column!r})"
        raise DataError(message)
    bands = dict(subgroup_bands or {})
    _check_bands(where, subgroup_columns, bands)
    columns = [path_column, label_column, *label_columns, split_column, group_column, mask_column, *subgroup_columns]
    rows = _read(path, [column for column in columns if column is not None])
    root = _tables(path)[0].parent if root is None else root
    names = [_cell(row, path_column) for row in rows]
    ids = [_id_of(name, root) for name in names]
    groups = ids if group_column is None else [_cell(row, group_column) for row in rows]
    if label_column is not None:
        labels, class_names = _named_labels(rows, label_column)
    else:
        labels, class_names = _column_labels(rows, label_columns, rest_class, multilabel=task == "multilabel")
    own = _splits(rows, split_column)
    settled = settle_splits(own, labels, groups, class_names, draw=draw, fractions=fractions, seed=seed, where=where)
    masks = () if mask_column is None else tuple(_masks(row, mask_column) for row in rows)
    files = Files(root, tuple(name + suffix for name in names), reading, masks)
    if isinstance(root, Url) and root.can_list and not files.all_elsewhere:
        files = replace(files, listed=root.files()[1])
    files.check(where)
    task = task or ("binary" if len(class_names) == 2 else "multiclass")
    name = ", ".join(table.stem for table in _tables(path))
    known = [_subgroups(rows, column, bands.get(column)) for column in subgroup_columns]
    subgroups = zip(*known, strict=True) if known else [()] * len(rows)
    samples = tuple(map(Sample, ids, labels, settled.splits, groups, subgroups))
    return Dataset(
        name,
        samples,
        class_names,
        task,
        files,
        subgroup_names=tuple(subgroup_columns),
        drawn=settled.drawn,
        val_drawn=settled.val_drawn,
    )


def _id_of(name: str, root: AnyPath) -> str:
    """The id of an image that the table names by a path below `root`, or by a URL."""
    return str(any_path(name)).removeprefix(f"{root}/") if is_url(name) else name


def _tables(path: AnyPath | Mapping[Split, AnyPath]) -> list[AnyPath]:
    return list(path.values()) if isinstance(path, Mapping) else [path]


def _read(path: AnyPath | Mapping[Split, AnyPath], columns: Sequence[str]) -> list[_Row]:
    """Rows of one table, or of one per split."""
    if isinstance(path, Mapping):
        return [row for split, part in path.items() for row in _read_table(part, columns, split)]
    return _read_table(path, columns, None)


def _read_table(path: AnyPath, columns: Sequence[str], split: Split | None) -> list[_Row]:
    """Rows of a table that has all `columns`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            header = list(reader.fieldnames or ())
            if not header:
                message = (
                    f"{path}: the table is empty; expected a line with the names of its columns, and a row per image"
                )
                raise DataError(message)
            for column in columns:
                _check_column(path, header, column)
            rows = [_Row(f"{path}, line {reader.line_num}", cells, split) for cells in reader]
    except OSError as error:
        message = f"{path}: the table cannot be read ({error.strerror}); check data.path"
        raise DataError(message) from None
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"{path}: this is no CSV table in UTF-8 ({error}); save it as one"
        raise DataError(message) from None
    long = [row.where for row in rows if None in row.cells]
    if long:
        message = f"{long[0]}: there are more cells than the header has; quote those that hold a comma"
        raise DataError(message)
    return rows


def _check_column(path: AnyPath, header: Sequence[str], column: str) -> None:
    if header.count(column) == 1:
        return
    if column in header:
        message = f"{path}: the column {column!r} is there {header.count(column)} times; rename all but one"
        raise DataError(message)
    near = difflib.get_close_matches(column, header, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {listing(header)}"
    message = f"{path}: there is no column {column!r}; {hint}"
    raise DataError(message)


def _cell(row: _Row, column: str) -> str:
    """Text of a cell that must not be empty."""
    text = row.cells[column].strip()
    if not text:
        message = f"{row.where}: {column!r} is empty; fill it in or remove the line"
        raise DataError(message)
    return text


def _masks(row: _Row, column: str) -> tuple[str, ...]:
    """The mask file of a row; none where the cell is empty, as for an image without a finding."""
    name = row.cells[column].strip()
    return (name,) if name else ()


def _named_labels(rows: Sequence[_Row], column: str) -> tuple[list[Label], tuple[str, ...]]:
    """Class numbers and names from a column of names."""
    texts = [_cell(row, column) for row in rows]
    found = set(texts)
    numeric = all(map(_INTEGER.fullmatch, found))
    names = tuple(sorted(found, key=lambda text: (int(text) if numeric else 0, text)))
    number = {name: k for k, name in enumerate(names)}
    return [number[text] for text in texts], names


def _column_labels(
    rows: Sequence[_Row], columns: Sequence[str], rest_class: str | None, *, multilabel: bool
) -> tuple[list[Label], tuple[str, ...]]:
    """Labels and class names from one column of 0 and 1 per class."""
    if multilabel and rest_class is not None:
        message = f"rest_class {rest_class!r}: a multilabel task says 'none' by zeros and has no class for it"
        raise DataError(message)
    present = [tuple(_bit(row, column) for column in columns) for row in rows]
    names = (*columns, rest_class) if rest_class is not None else tuple(columns)
    if multilabel:
        return list(present), names
    labels: list[Label] = []
    for row, bits in zip(rows, present, strict=True):
        if sum(bits) > 1 or (not any(bits) and rest_class is None):
            message = (
                f"{row.where}: {sum(bits)} of {listing(columns)} are 1 and exactly one class is expected; "
                f"name a rest_class for rows of zeros, or set task to 'multilabel'"
            )
            raise DataError(message)
        labels.append(bits.index(1) if any(bits) else len(columns))
    return labels, names


def _bit(row: _Row, column: str) -> int:
    """0 or 1 from a cell, however the table writes its numbers."""
    text = _cell(row, column)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value not in (0.0, 1.0):
        message = f"{row.where}: {column!r} is {text!r}; a column per class holds 0 or 1"
        raise DataError(message)
    return int(value)


def _splits(rows: Sequence[_Row], column: str | None) -> list[Split]:
    """Splits that the files or a column give; empty if they are to be drawn."""
    if column is None:
        return [row.split for row in rows if row.split is not None]
    splits = [split_named(_cell(row, column)) for row in rows]
    unknown = {row.cells[column] for row, split in zip(rows, splits, strict=True) if split is None}
    if unknown:
        message = f"{rows[0].where}: the column {column!r} holds {listing(sorted(unknown))}; use train, val and test"
        raise DataError(message)
    return [split for split in splits if split is not None]


def _check_bands(where: str, columns: Sequence[str], bands: Mapping[str, Sequence[float]]) -> None:
    """Refuse bands of a column that is not asked for, or that do not ascend."""
    for column, limits in bands.items():
        if column not in columns:
            message = f"{where}: subgroup_bands names {column!r}, which is not among subgroup_columns; add it there"
            raise DataError(message)
        if not limits or any(low >= high for low, high in pairwise(limits)):
            message = f"{where}: the bands of {column!r} are {list(limits)}; give their limits in ascending order"
            raise DataError(message)


def _subgroups(rows: Sequence[_Row], column: str, limits: Sequence[float] | None) -> list[str]:
    """What a column says of each row: its text, or the band that its number is in; empty where the cell is."""
    texts = [row.cells[column].strip() for row in rows]
    if limits is not None:
        return [_band(row, column, text, limits) for row, text in zip(rows, texts, strict=True)]
    values = sorted(set(texts))
    if len(values) > MOST_SUBGROUPS:
        message = (
            f"{rows[0].where}: the column {column!r} has {len(values)} values, and a column of subgroups at most "
            f"{MOST_SUBGROUPS}: {listing(values)}; cut numbers into bands, as subgroup_bands: {{{column}: [40, 60]}}"
        )
        raise DataError(message)
    return texts


def _band(row: _Row, column: str, text: str, limits: Sequence[float]) -> str:
    """The band of a number, such as `40 to under 60`."""
    if not text:
        return ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        message = f"{row.where}: {column!r} is {text!r}; a column with bands holds numbers"
        raise DataError(message)
    above = [limit for limit in limits if value >= limit]
    if not above:
        return f"under {limits[0]:g}"
    if len(above) == len(limits):
        return f"{limits[-1]:g} and over"
    return f"{above[-1]:g} to under {limits[len(above)]:g}"
