"""Predictions of very many images as a table: made in parts, in any order and by anybody, joined in theirs.

Beside the table to be, `NAME.partial` has a file for each finished part, written whole or not at all. What is stopped
continues with the parts that are not there. A part is the same images in the same batches whoever makes it, so the
finished table is the one of a run that nobody stopped. A part whose images have changed since is made again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache import Fingerprint
from cache.durable import sync_folder
from cache.writing.lock import WriterLock
from pipeline import records
from pipeline.data.dataset import listing
from pipeline.data.named import Name
from pipeline.errors import DataError, RunError, from_extra
from pipeline.train import run_folder
from pipeline.url import Url

PART_IMAGES = 64  # what is lost at most when one is killed; whole batches
PARQUET = ".parquet"
FORMATS = (".csv", PARQUET)
_GROUP_ROWS = 1 << 16  # of a row group of Parquet
FEW = 1000  # images whose predictions a report may show; of more only the table has them
_COLUMNS = ("image", "predicted")

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Some of the images, one after the other.

    Attributes:
        number: From 0.
        names: Of the image files.
        stamp: Of their sizes and times; empty where this machine sees none of them.
        start: Place of the first among the images of its number; not 0 in one that was taken apart.
    """

    number: int
    names: tuple[Name, ...]
    stamp: str
    start: int = 0

    def halves(self) -> tuple[Part, ...]:
        """The part in two; a single image is in none."""
        middle = len(self.names) // 2
        if not middle:
            return ()
        first = replace(self, names=self.names[:middle])
        return first, replace(self, names=self.names[middle:], start=self.start + middle)


@dataclass(frozen=True)
class Summary:
    """What a finished table says.

    Attributes:
        images: How many were asked for.
        kept: How many of them an earlier run had done.
        predicted: How many of each class; of several labels, an image counts for each.
        set_aside: Reason by file, of those that cannot be read.
        predictions: All of them, where they are few, as `FilePredictor` says them; else none.
    """

    images: int
    kept: int
    predicted: Mapping[str, int]
    set_aside: Mapping[str, str]
    predictions: Sequence[Row]


class TableInParts:
    """A table that is being made; see `making`.

    Attributes:
        path: Of the table.
        names: Of all images, in the order of its rows.
        class_names: Of its columns.
        done: Images whose part is there, of those that were asked about.
    """

    def __init__(self, path: Path, names: Sequence[Name], class_names: Sequence[str]) -> None:
        self.path, self.names, self.class_names = path, names, tuple(class_names)
        self.done = self._kept = 0
        self._pieces: dict[int, dict[int, tuple[Part, Mapping[str, Any]]]] = defaultdict(dict)

    def pending(self) -> Iterator[Part]:
        """Yield the parts that are not there; files are looked at when the turn of their part comes."""
        for number in range(-(-len(self.names) // PART_IMAGES)):
            names = self._names_of(number)
            part = Part(number, names, _stamp(names))
            if self._is_done(part):
                self._kept += len(names)
                self.done += len(names)
            else:
                yield part

    def put(self, part: Part, found: Mapping[str, Any]) -> None:
        """Keep what a `FilePredictor` says of a part; of a piece of one, once the others are there."""
        self.done += len(part.names)
        pieces = self._pieces[part.number]
        pieces[part.start] = part, found
        if sum(len(piece.names) for piece, _ in pieces.values()) < len(self._names_of(part.number)):
            return
        value: dict[str, Any] = {"stamp": part.stamp, "rows": [], "set_aside": {}}
        for _, (_, said) in sorted(self._pieces.pop(part.number).items()):
            value["set_aside"].update(said["set_aside"])
            for row in said["predictions"]:
                shares = (row["probabilities"][name] for name in self.class_names)
                value["rows"].append([row["image"], row["predicted"], *shares])
        with records.replacing(self._file(part.number)) as file:
            file.write(json.dumps(value, allow_nan=False, separators=(",", ":")).encode())

    def join(self) -> Summary:
        """Put all parts into the table, in order, and give it its name.

        Images that were set aside are listed beside it, in `NAME_set_aside.csv`.

        Raises:
            DataError: All were.
        """
        predicted: Counter[str] = Counter(dict.fromkeys(self.class_names, 0))
        set_aside: dict[str, str] = {}
        few: list[Row] = []

        def rows() -> Iterator[Row]:
            for number in range(-(-len(self.names) // PART_IMAGES)):
                part = records.read_json(self._file(number))
                set_aside.update(part["set_aside"])
                for image, called, *shares in part["rows"]:
                    names = [called] if isinstance(called, str) else called
                    predicted.update(names)
                    if len(self.names) <= FEW:
                        by_class = dict(zip(self.class_names, shares, strict=True))
                        few.append({"image": image, "predicted": called, "probabilities": by_class})
                    yield dict(zip(self.columns, (image, "|".join(names), *shares), strict=True))

        joined = self._folder / "joined"
        write = _write_parquet if self.path.suffix == PARQUET else records.write_csv
        write(joined, rows(), self.columns)
        if set_aside.keys() == set(map(str, self.names)):
            shutil.rmtree(self._folder)  # the next command tries them again
            raise DataError(next(iter(set_aside.values())))
        aside = self.path.with_name(f"{self.path.stem}_set_aside.csv")
        aside.unlink(missing_ok=True)  # of a table before this one
        if set_aside:
            listed = ({"image": name, "reason": reason} for name, reason in set_aside.items())
            records.write_csv(aside, listed)
        joined.replace(self.path)
        sync_folder(self.path.parent)
        shutil.rmtree(self._folder)
        return Summary(len(self.names), self._kept, dict(predicted), set_aside, few)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table."""
        return (*_COLUMNS, *(f"p_{name}" for name in self.class_names))

    @property
    def _folder(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    def _names_of(self, number: int) -> tuple[Name, ...]:
        return tuple(self.names[number * PART_IMAGES : (number + 1) * PART_IMAGES])

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:07d}.json"

    def _is_done(self, part: Part) -> bool:
        file = self._file(part.number)
        return file.is_file() and records.read_json(file)["stamp"] == part.stamp


@contextmanager
def making(
    path: Path, names: Sequence[Name], class_names: Sequence[str], about: Mapping[str, Any], *, replace: bool = False
) -> Iterator[TableInParts]:
    """Be the only one that makes a table, from where the last one stopped.

    Args:
        path: `NAME.csv` or `NAME.parquet`.
        names: Of all images, in the order of its rows.
        class_names: Of its columns.
        about: JSON values, everything that the predictions depend on but the images.
        replace: Make it anew where there is one, or parts of another.

    Raises:
        DataError: A name is no text in UTF-8, which a table could not hold.
        RunError: There is such a table already, or parts of one of other images or another model.
        cache.StoreLockedError: Somebody else is making it.
    """
    if path.suffix not in FORMATS:
        msg = f"{path}: predictions are written as {' or '.join(FORMATS)}: give the file one of these endings."
        raise RunError(msg)
    if path.suffix == PARQUET:
        _parquet()  # a missing extra is said now
    if path.exists() and not replace:
        msg = f"{str(path)!r} is there already: name another file, or make it again with --replace."
        raise RunError(msg)
    wrong = [name for name in map(str, names) if not _is_text(name)]
    if wrong:
        msg = f"{len(wrong)} names are no text in UTF-8, and a table holds text: {listing(wrong)}; rename them"
        raise DataError(msg)
    table = TableInParts(path, names, class_names)
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).hexdigest()
    wanted = Fingerprint({**about, "images": len(names), "images_sha256": digest, "part": PART_IMAGES})
    lock = WriterLock(table._folder / "lock", path)
    try:
        _begin(table, wanted, replace=replace)
        yield table
    finally:
        lock.release()


def _begin(table: TableInParts, wanted: Fingerprint, *, replace: bool) -> None:
    """Keep the parts of the same table; remove those of another if that is wanted, or refuse.

    Raises:
        RunError: There are such parts.
    """
    file = table._folder / "request.json"
    differences = wanted.differences(Fingerprint(records.read_json(file))) if file.is_file() else ()
    if differences and not replace:
        listed = "; ".join(
            f"{d.field} is {run_folder.brief(d.ours)} and was {run_folder.brief(d.theirs)}" for d in differences
        )
        msg = (
            f"{str(table._folder)!r} holds parts of other predictions: {listed}. Run the command that began them, name "
            f"another file, or start over with --replace."
        )
        raise RunError(msg)
    if differences or not file.is_file():
        for old in table._folder.glob("*.json"):
            old.unlink()
        records.write_json(file, wanted.fields)


def _stamp(names: Sequence[Name]) -> str:
    """Digest of sizes and times of files; empty where none of them is here. Nobody asks a server for each."""
    found = []
    for name in names:
        try:
            status = None if isinstance(name, Url) else os.stat(name)  # noqa: PTH116  a Path costs more than the question
        except OSError:
            status = None
        found.append("" if status is None else f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest() if any(found) else ""


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; bytes of a file's name that are none came as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet() -> Any:
    with from_extra("A table in Parquet", "parquet"):
        import pyarrow.parquet
    return pyarrow


def _write_parquet(path: Path, rows: Iterator[Row], columns: Sequence[str]) -> None:
    """Write a table as Parquet: names and classes as text, probabilities as float64."""
    pa = _parquet()
    schema = pa.schema([(name, pa.string() if name in _COLUMNS else pa.float64()) for name in columns])
    with records.replacing(path) as file, pa.parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(rows, _GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
