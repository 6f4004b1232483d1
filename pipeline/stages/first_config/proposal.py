"""Look at data and write a configuration for them that runs."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import data
from pipeline.config import commented
from pipeline.config.check import validate
from pipeline.config.schema import Config, SplitRule
from pipeline.data.count import count
from pipeline.data.glance import Glance, glance
from pipeline.data.layouts.files import Files
from pipeline.data.splits import even_seed
from pipeline.errors import ConfigError, DataError
from pipeline.stages.first_config.draft import Ask, Draft, Given, silent
from pipeline.stages.first_config.method import choose_method, fit_sizes, note_weights
from pipeline.stages.first_config.source import describe
from pipeline.stages.inputs import load_dataset

_NEGATIVE = re.compile(r"normal|healthy|benign|nevus|nevi|negative|control|absent|^no[_ -]|^0$", re.IGNORECASE)
_TWELVE_BIT = 16384  # 16-bit images that stay below this use a small part of their range


def propose(source: str, given: Given, target: Path | None = None, ask: Ask = silent) -> dict[str, Any]:
    """Look at data and write a configuration for them that runs; no file is ever overwritten.

    Args:
        source: A folder, a CSV table, a MedMNIST archive or its name, a store with labels, or `demo`.
        given: What is known already.
        target: File to write; None is `configs/NAME.yaml`, by the name of the data.
        ask: Called where a guess may be wrong.

    Returns:
        JSON values: `config`, the file; `source`; what was found; `notes`; and `next`, the commands from here on.

    Raises:
        ConfigError: The file is there already, or it is not clear what the source is or holds.
        DataError: The data cannot be read.
    """
    draft = Draft(_name_of(source))
    path = target or Path("configs") / f"{draft.name}.yaml"
    _refuse_existing(path)
    describe(source, given, ask, draft)
    if draft.values["data"]["layout"] != "store":  # which names its encoder
        choose_method(given, draft)
    config = validate(Config, draft.values, "the configuration that was made")
    _look(config, draft)
    note_weights(config, draft)
    validate(Config, draft.values, "the configuration that was made")
    _write(path, commented.as_yaml(draft.values, draft.beside, _head(source)))
    steps = ("probe", "train") if draft.values["data"]["layout"] == "store" else ("prepare", "extract", "train")
    commands = [f"pipeline {command} -c {path}" for command in (*steps, "evaluate", "report")]
    return {
        "config": str(path),
        "source": source,
        **draft.report,
        "encoder": config.encoder.name,
        "notes": draft.notes,
        "next": commands,
    }


def _name_of(source: str) -> str:
    """What to call the data set in paths."""
    stem = Path(os.path.realpath(source)).name if Path(source).is_dir() else Path(source).name
    for suffix in (".csv", ".npz", ".zarr", ".h5", ".hdf5"):
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._") or "data"


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        message = f"{path} is there already and is left as it is: name another file with --out"
        raise ConfigError(message)


def _write(path: Path, text: str) -> None:
    """Write a file that is not there yet."""
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def _head(source: str) -> str:
    return (
        f"Made by `pipeline init` for {source!r}. What a key does: `pipeline config --explain KEY`.\n"
        "What is not here has its default: `pipeline config -c THIS_FILE` shows everything.\n"
    )


def _look(config: Config, draft: Draft) -> None:
    """Look at the data set itself, where it is here, and fit sizes to it."""
    if not Path(str(draft.values["data"]["path"])).exists():
        return
    if draft.values["data"]["layout"] == "store":
        draft.report |= {"images": draft.report["rows"], "counts": asdict(count(load_dataset(config)))}
        return
    dataset = _drawn_evenly(config, draft)
    _name_positive(dataset, draft)
    counts = count(dataset)
    draft.report |= {"images": counts.images, "counts": asdict(counts)}
    if dataset.ignored:
        draft.report["ignored"] = dict(dataset.ignored)
    seen = None
    if isinstance(dataset.source, Files) and isinstance(dataset.source.root, Path):
        seen = glance([dataset.source.root / name for name in dataset.source.names])
        draft.report["seen"] = asdict(seen)
        _remark_on_files(seen, draft)
    side = min(dataset.read(0).shape[:2]) if seen is None else seen.median_side
    fit_sizes(draft, counts, side)


def _drawn_evenly(config: Config, draft: Draft) -> data.Dataset:
    """The data set; where its splits are drawn, by the seed that suits so few images best."""
    section = draft.values["data"]
    if section["layout"] not in ("folder", "csv"):
        return load_dataset(config)
    any_draw = config.data.model_copy(update={"split": SplitRule(draw="balanced")})
    dataset = load_dataset(config.model_copy(update={"data": any_draw}))
    if dataset.drawn is None:
        return dataset
    labels, groups = [s.label for s in dataset.samples], [s.group for s in dataset.samples]
    seed = even_seed(labels, groups, fractions={"val": SplitRule().val, "test": SplitRule().test})
    steady = config.data.model_copy(update={"split": SplitRule(seed=seed)})
    try:
        drawn = load_dataset(config.model_copy(update={"data": steady}))
    except DataError:  # too few groups for each split to have some of every class by chance
        section["split"] = {"draw": "balanced"}
        draft.beside["data.split.draw"] = "few images: a data set that changes is drawn anew"
        return dataset
    section["split"] = {"seed": seed}
    draft.beside["data.split.seed"] = "splits are drawn by the names of the patients; another seed, other splits"
    return drawn


def _name_positive(dataset: data.Dataset, draft: Draft) -> None:
    """Of two classes, name the one that is looked for: not the one that is called normal."""
    if dataset.task != "binary":
        return
    negative = [name for name in dataset.class_names if _NEGATIVE.search(name)]
    positive = next((name for name in reversed(dataset.class_names) if name not in negative), dataset.class_names[-1])
    draft.values["data"]["positive"] = positive
    draft.beside["data.positive"] = f"the class that is looked for, of {' and '.join(dataset.class_names)}"


def _remark_on_files(seen: Glance, draft: Draft) -> None:
    """What the files call for: a rule for more than 8 bits, a choice of page, a look at those that do not open."""
    section = draft.values["data"]
    floats = "grey, floating point" in seen.kinds
    if seen.deep_max is not None and (floats or seen.deep_max < _TWELVE_BIT):
        section["reading"] = {"depth": "percentile"}
        draft.beside["data.reading.depth"] = (
            f"values of more than 8 bits, at most {seen.deep_max:g} among those looked at"
        )
    if seen.pages[0]:
        draft.notes.append(
            f"{seen.pages[0]} of {seen.looked_at} files have several pages (up to {seen.pages[1]}): "
            f"the first is read; data.reading.frame chooses another."
        )
    if seen.unreadable:
        path, reason = next(iter(seen.unreadable.items()))
        draft.notes.append(
            f"{len(seen.unreadable)} of {seen.looked_at} files cannot be opened, {path} for one ({reason}): "
            f"`extract` sets such files aside and names them."
        )
