"""A data set by the name of its layout and plain values: the one place that knows all layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.count import check_expected
from pipeline.data.dataset import Dataset, Split
from pipeline.data.depth import Reading
from pipeline.data.layouts.demo import load_demo
from pipeline.data.layouts.folder import load_folder
from pipeline.data.layouts.medmnist import load_medmnist
from pipeline.data.layouts.medmnist_sets import SETS
from pipeline.data.layouts.stored import load_stored
from pipeline.data.layouts.table import load_csv
from pipeline.errors import ConfigError


def load_dataset(
    layout: str,
    *,
    path: Any,
    reading: Reading,
    positive: str | None = None,
    expect: Mapping[str, int] | None = None,
    only_test: bool = False,
    **options: Any,
) -> Dataset:
    """Load a data set.

    Args:
        layout: `demo`, `folder`, `csv`, `medmnist` or `store`.
        path: Where it lies; of a table a path by split where each split has one of its own.
        reading: How image files become uint8 RGB where that is a choice.
        positive: Name of the class that is looked for; None for the last of two.
        expect: How many images there should be in `train`, `val` and `test` of the data set's own splits, or in `all`.
        only_test: Draw no splits where there are none: everything is test then.
        options: The others that the layout has, by the names that a configuration gives them; see its loader.

    Raises:
        ConfigError: There is no such layout.
        DataError: The data set cannot be loaded, has no class of the name `positive`, or other numbers of images than
            are expected.
    """
    if only_test and "split" in options:
        options["split"] = {**options["split"], "draw": None}
    found = _load(layout, path, reading, options)
    check_expected(found, expect or {})
    return found if positive is None else dataclasses.replace(found, positive=positive)


def _load(layout: str, path: Any, reading: Reading, options: dict[str, Any]) -> Dataset:
    match layout:
        case "demo":
            return load_demo(path)
        case "medmnist":
            return _load_archive(path, options["name"], options["masks"])
        case "folder":
            split = options.pop("split")
            return load_folder(path, reading=reading, **options, **_drawn(split))
        case "csv":
            split, images = options.pop("split"), options.pop("images")
            return load_csv(path, root=images, reading=reading, **options, **_drawn(split))
        case "store":
            return load_stored(path, task=options["task"])
    message = f"data.layout: there is no layout {layout!r}; valid: demo, folder, csv, medmnist, store"
    raise ConfigError(message)


def _load_archive(path: Path, name: str, masks: Path | None) -> Dataset:
    """An archive, with the class names and the task that its makers say it has, where the set is known."""
    known = SETS.get(name)
    said: dict[str, Any] = {} if known is None else {"class_names": known.class_names, "task": known.task}
    return load_medmnist(path, masks=masks, **said)


def _drawn(rule: Mapping[str, Any]) -> dict[str, Any]:
    """How splits are drawn where the data set has none of its own."""
    fractions: dict[Split, float] = {"val": rule["val"], "test": rule["test"]}
    return {"fractions": fractions, "seed": rule["seed"], "draw": rule["draw"]}
