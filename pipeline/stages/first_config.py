"""The first configuration for somebody's own data: look at them, choose what fits them and this machine, write it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import cache
from pipeline import data, encoders
from pipeline.config import commented
from pipeline.config.check import validate
from pipeline.config.schema import Config, SplitRule
from pipeline.data import guess
from pipeline.data.count import Counts, count
from pipeline.data.glance import Glance, glance
from pipeline.data.layouts.files import Files
from pipeline.data.layouts.medmnist_sets import SETS
from pipeline.data.splits import even_seed
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.mask_tap import features_of
from pipeline.stages.inputs import load_dataset
from pipeline.url import Url, any_path

Report = dict[str, Any]
Ask = Callable[[str, str, str], str]
"""Asks a person: the flag that would answer, the question, and the answer that is taken without one."""

_NEGATIVE = re.compile(r"normal|healthy|benign|nevus|nevi|negative|control|absent|^no[_ -]|^0$", re.IGNORECASE)
NONE = "none"  # answers that there is nothing of the kind
_SHOWN = 3  # examples of groups, and images in each
_TWELVE_BIT = 16384  # 16-bit images that stay below this use a small part of their range


@dataclass(frozen=True)
class Given:
    """What a person has said about the data and the method; None where it is to be found out.

    Attributes:
        group_pattern: See `data.group_pattern`; `none` for no groups.
        images: Folder that the paths of a table are relative to.
        path_column: Column of the images.
        label_column: Column of the class.
        split_column: Column of the split; `none` to draw splits.
        group_column: Column of the patient; `none` for no groups.
        size_px: Side of the images of a MedMNIST archive.
        encoder: Name of the encoder.
        checkpoint: Its weights.
        backbone: Of the classifier.
    """

    group_pattern: str | None = None
    images: Path | None = None
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    size_px: int | None = None
    encoder: str | None = None
    checkpoint: str | None = None
    backbone: str | None = None


@dataclass
class _Draft:
    """A configuration that grows.

    Attributes:
        name: Of the data set, for paths.
        values: The configuration.
        beside: Remarks, by dotted key.
        report: What was found, for the person.
        notes: What the person should know, a sentence each.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    report: Report = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def silent(flag: str, question: str, default: str) -> str:
    """Ask nobody and take every guess."""
    return default


def propose(source: str, given: Given, target: Path | None = None, ask: Ask = silent) -> Report:
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
    draft = _Draft(_name_of(source))
    path = target or Path("configs") / f"{draft.name}.yaml"
    _refuse_existing(path)
    _describe(source, given, ask, draft)
    if draft.values["data"]["layout"] != "store":  # which names its encoder
        _choose_method(given, draft)
    config = validate(Config, draft.values, "the configuration that was made")
    _look(config, draft)
    _note_weights(config, draft)
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
    for suffix in (".csv", ".npz", ".zarr", ".h5"):
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


def _describe(source: str, given: Given, ask: Ask, draft: _Draft) -> None:
    """Find out what the source is, and write the section `data`."""
    place = any_path(source)
    if isinstance(place, Url):
        message = (
            f"{place} is a URL, and `init` looks at files of this machine: copy configs/default.yaml and give it the "
            f"section data: {{layout: folder, path: {place}}}, or that of another layout (docs/data.md)"
        )
        raise ConfigError(message)
    path = place
    if _is_store(path):
        _describe_store(path, draft)
    elif path.is_dir():
        _describe_folder(path, given, ask, draft)
    elif path.suffix.lower() == ".csv" or (path.is_file() and path.suffix != ".npz"):
        _describe_table(path, given, ask, draft)
    elif source == "demo":
        draft.values["data"] = {"layout": "demo", "path": "data/demo", "count": 360}
        draft.beside["data.layout"] = "ultrasound-like images, made by `prepare`"
    elif draft.name.split("_")[0] in SETS:
        _describe_archive(path, given, draft)
    else:
        message = (
            f"{source!r} is no folder, no CSV table, no store and no MedMNIST set: name a folder with a sub-folder for "
            f"each class, a table with a row per image, `demo`, or one of {', '.join(SETS)}"
        )
        raise ConfigError(message)


def _is_store(path: Path) -> bool:
    """Whether a path is that of a store, by its name."""
    return path.suffix in (".zarr", ".h5", ".hdf5") and path.exists()


def _describe_store(path: Path, draft: _Draft) -> None:
    """A store that somebody sent: its features are the input, and no image is read.

    Raises:
        ConfigError: No labels travel with it.
    """
    with cache.open_store(path) as store:
        labels, rows = store.labels, len(store)
        features = features_of(store.taps)
    if labels is None:
        message = (
            f"{path}: no labels travel with this store: ask whoever sent it for `pipeline store push --with-labels`, "
            f"or name a folder or a table of the images"
        )
        raise ConfigError(message)
    tap = "neck" if "neck" in features else features[-1]
    draft.values["data"] = {"layout": "store", "path": str(path)}
    draft.values["model"] = {"backbone": "none", "fuse": [tap]}
    draft.beside["model.backbone"] = "no image is read: a linear classifier of stored features"
    draft.beside["model.fuse"] = f"taps that it reads, of {', '.join(features)}"
    draft.values["train"] = {"epochs": 100, "batch_size": 32, "lr": 1e-3, "seed": 0}
    draft.values["run"] = f"runs/{draft.name}"
    draft.report["rows"] = rows


def _describe_archive(path: Path, given: Given, draft: _Draft) -> None:
    """An archive that is here, or an official one to fetch."""
    name, _, size = draft.name.partition("_")
    if path.suffix == ".npz" and path.is_file():
        draft.values["data"] = {"layout": "medmnist", "name": name, "path": str(path)}
        if size.isdecimal():
            draft.values["data"]["size_px"] = int(size)
        return
    size_px = given.size_px or (int(size) if size.isdecimal() else 224)
    file = f"{name}.npz" if size_px == 28 else f"{name}_{size_px}.npz"
    draft.values["data"] = {"layout": "medmnist", "name": name, "path": f"data/{file}", "size_px": size_px}
    draft.beside["data.path"] = "fetched by `prepare` from its official place, unless it is here"
    if not Path("data", file).is_file():
        draft.notes.append(f"data/{file} is not here: `pipeline prepare` downloads it from Zenodo.")


def _describe_folder(path: Path, given: Given, ask: Ask, draft: _Draft) -> None:
    """A folder of classes, and the patients that its file names seem to tell."""
    draft.values["data"] = section = {"layout": "folder", "path": str(path)}
    try:
        names = [sample.id for sample in data.load_folder(path, draw="balanced").samples]  # which any data allow
    except DataError as error:
        _advise_on_folder(path, error)
        raise
    masks = guess.guess_masks(names)
    if masks is not None:
        section["masks"], _ = masks
        draft.beside["data.masks"] = f"guessed: {masks[1]} files are masks of images beside them, and no images"
        names = [sample.id for sample in data.load_folder(path, draw="balanced", masks=masks[0]).samples]
    pattern = given.group_pattern or guess.guess_group_pattern(names)
    if given.group_pattern is None:
        pattern = ask("--group-pattern", _question_of(pattern, names), pattern or NONE)
    if pattern in (None, NONE):
        draft.beside["data.path"] = "each image is a patient of its own: if not, set group_pattern (--explain it)"
        return
    section["group_pattern"] = str(pattern)
    groups = guess.groups_by(str(pattern), names)
    if groups is None:
        return  # the data set says which names it does not match
    said = f"{len(groups)} groups in {len(names)} images"
    guessed = "guessed from the file names: " if given.group_pattern is None else ""
    draft.beside["data.group_pattern"] = f"{guessed}{said}, such as {_group_example(groups)}"
    draft.report["groups"] = {
        "pattern": pattern,
        "guessed": given.group_pattern is None,
        "count": len(groups),
        "examples": {group: members[:_SHOWN] for group, members in _largest(groups)},
    }


def _advise_on_folder(path: Path, error: DataError) -> None:
    """Say where the folder of classes may be, if this one is not."""
    below = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    inner = [folder for folder in below if sum(1 for child in folder.iterdir() if child.is_dir()) > 1]
    if len(below) < 2:
        names = ", ".join(folder.name for folder in below) or "none"
        error.add_note(f"expected a folder for each class below {path}; it has {names}")
    if len(below) == 1 and inner:
        error.add_note(f"perhaps you mean {inner[0]}")


def _largest(groups: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    return sorted(groups.items(), key=lambda item: -len(item[1]))[:_SHOWN]


def _group_example(groups: Mapping[str, list[str]]) -> str:
    ((group, members),) = _largest(groups)[:1]
    return f"{group!r} ({len(members)}: {', '.join(name.rsplit('/', 1)[-1] for name in members[:_SHOWN])})"


def _question_of(pattern: str | None, names: list[str]) -> str:
    groups = guess.groups_by(pattern, names) if pattern else None
    if groups is None:
        return (
            f"Which part of a file name is the patient, as a regular expression? (no guess from {names[0]!r}; none: "
            f"every image is a patient of its own)"
        )
    return (
        f"The pattern {pattern} finds {len(groups)} patients in {len(names)} images, such as {_group_example(groups)}. "
        f"Pattern, or none"
    )


def _describe_table(path: Path, given: Given, ask: Ask, draft: _Draft) -> None:
    """A table, and what its columns seem to be."""
    found = guess.guess_columns(path, given.path_column, given.images)
    shown = guess.spell_columns(found)

    def choose(flag: str, said: str | None, seems: str | None, what: str, *, needed: bool = False) -> str | None:
        """The column of a kind: as given, as guessed and confirmed, or none."""
        answer = said or ask(flag, f"Which column is {what}? ({shown})", seems or ("" if needed else NONE))
        if answer in ("", NONE):
            if needed:
                message = f"{path}: which column is {what} cannot be told from its cells: name it with {flag} ({shown})"
                raise ConfigError(message)
            return None
        return answer

    path_column = choose("--path-column", given.path_column, found.path, "the image's path", needed=True)
    images = given.images or found.images
    if images is None:
        message = f"{path}: the images of column {path_column!r} are not beside it: name their folder with --images"
        raise ConfigError(message)
    section: dict[str, Any] = {"layout": "csv", "path": str(path), "images": str(images), "path_column": path_column}
    section["label_column"] = choose("--label-column", given.label_column, found.label, "the class", needed=True)
    section["split_column"] = choose("--split-column", given.split_column, found.split, "the split, if any")
    section["group_column"] = choose("--group-column", given.group_column, found.group, "the patient, if any")
    section["suffix"] = found.suffix
    draft.values["data"] = {key: value for key, value in section.items() if value}
    if section["group_column"] is None:
        draft.beside["data.path"] = "each image is a patient of its own: if not, set group_column"


def _choose_method(given: Given, draft: _Draft) -> None:
    """The sections that the data do not decide: the encoder that suits this machine, and SLCA on a small ResNet."""
    known = [name for family in encoders.FAMILIES for name in family.names]
    name = given.encoder or _fitting_encoder(draft, known)
    if name not in known:
        message = f"--encoder: there is no encoder {name!r}; valid: {', '.join(known)}"
        raise ConfigError(message)
    encoder: dict[str, Any] = {"name": name, "checkpoint": given.checkpoint or _weights_of(name)}
    draft.beside["encoder.checkpoint"] = "had by `pipeline prepare`, or name a file"
    if name == "sam_demo":
        encoder |= {"pool": 2, "training": {"images": 800, "steps": 100, "seed": 1}}
        draft.beside["encoder.name"] = (
            "a miniature SAM, trained by `prepare` on images of its own; no evidence about SAM"
        )
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        encoder["precision"] = "bfloat16"
    draft.values["encoder"] = encoder
    draft.values["store"] = {"path": f"features/{draft.name}.zarr", "license": "unknown", "citation": "unknown"}
    draft.beside["store.license"] = "of your data; it stands on the card of the store"
    draft.beside["store.citation"] = "how to cite your data"
    taps = ("patch", "early", "middle", "late", "neck")
    stages = ("stem", "stage1", "stage2", "stage3", "stage4")
    gates = [{"tap": tap, "stage": stage} for tap, stage in zip(taps, stages, strict=True)]
    backbone = given.backbone or "resnet18"
    draft.values["model"] = {"backbone": backbone, "weights": "none", "image_px": 224, "gates": gates}
    draft.beside["model.weights"] = "`imagenet` is better where it can be downloaded"
    draft.beside["model.gates"] = "which depth of the encoder gates which stage; [] is the plain classifier"
    draft.values["train"] = {
        "epochs": 30,
        "batch_size": 32,
        "lr": 5e-4,
        "warmup_epochs": 1,
        "seed": 0,
        "augment": {"flip_horizontal": 0.5},
    }
    draft.beside["train.augment.flip_horizontal"] = "0 where left and right matter"
    draft.values["run"] = f"runs/{draft.name}"


def _fitting_encoder(draft: _Draft, known: list[str]) -> str:
    """The encoder to begin with: SAM's smallest on a GPU, a light one on a CPU."""
    if draft.values["data"]["layout"] == "demo":
        return "sam_demo"
    if torch.cuda.is_available():
        draft.beside["encoder.name"] = "this machine has a GPU"
        return "sam_vit_b"
    if "lite_medsam" in known:
        draft.beside["encoder.name"] = "light enough for a CPU; sam_vit_b is larger, and slower by far"
        return "lite_medsam"
    draft.notes.append("No GPU was found: SAM ViT-B takes seconds an image here. `pipeline doctor` measures how many.")
    return "sam_vit_b"


def _weights_of(name: str) -> str:
    """The weights that go with an encoder: published ones, or a file that `prepare` makes."""
    stands_for_a_file = encoders.weights_file(name, Path(name)) != Path(name)
    return name if stands_for_a_file else f"weights/{name}.pth"


def _note_weights(config: Config, draft: _Draft) -> None:
    """Say how to have weights that are not here and are not made on the spot."""
    name = config.encoder.name
    if name == "sam_demo" or draft.values["data"]["layout"] == "store" or encoders.family_of(name).reads == "mask":
        return
    try:
        encoders.present_weights(name, config.encoder.checkpoint)
    except CheckpointError as error:
        said = str(error).removeprefix("encoder.checkpoint: ")
        draft.notes.append(f"{said[:1].upper()}{said[1:]}.")


def _look(config: Config, draft: _Draft) -> None:
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
    _fit_sizes(draft, counts, side)


def _drawn_evenly(config: Config, draft: _Draft) -> data.Dataset:
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


def _name_positive(dataset: data.Dataset, draft: _Draft) -> None:
    """Of two classes, name the one that is looked for: not the one that is called normal."""
    if dataset.task != "binary":
        return
    negative = [name for name in dataset.class_names if _NEGATIVE.search(name)]
    positive = next((name for name in reversed(dataset.class_names) if name not in negative), dataset.class_names[-1])
    draft.values["data"]["positive"] = positive
    draft.beside["data.positive"] = f"the class that is looked for, of {' and '.join(dataset.class_names)}"


def _remark_on_files(seen: Glance, draft: _Draft) -> None:
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


def _fit_sizes(draft: _Draft, counts: Counts, side: int | None) -> None:
    """Sizes of the classifier's image, batch and training."""
    wanted = 224 if side is None or side >= 224 else max(64, -(-side // 32) * 32)
    draft.values["model"]["image_px"] = wanted
    draft.beside["model.image_px"] = f"the images have {side} px" if side is not None else "as ImageNet has it"
    training = counts.splits["train"]
    if training < 256:
        draft.values["train"] |= {"batch_size": 8 if training < 64 else 16, "epochs": 50}
    drawn = draft.values["data"]["layout"] in ("folder", "csv")
    groups = sum(counts.groups.values())
    if drawn and groups == counts.images and "groups" not in draft.report:
        draft.notes.append(
            f"Every image counts as a patient of its own. If a patient has several, set "
            f"{'group_column' if draft.values['data']['layout'] == 'csv' else 'group_pattern'}: "
            f"else the scores are too good."
        )
    few = [f"{name} ({sum(found.values())})" for name, found in counts.classes.items() if sum(found.values()) < 20]
    if few:
        draft.notes.append(f"Few images of {', '.join(few)}: expect wide intervals.")
