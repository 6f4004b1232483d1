"""What a source is, a folder, a table, an archive or a store, and what that makes of the section `data`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cache
from pipeline import data
from pipeline.data import guess
from pipeline.data.layouts.medmnist_sets import SETS
from pipeline.errors import ConfigError, DataError
from pipeline.mask_tap import features_of
from pipeline.stages.first_config.draft import NONE, Ask, Draft, Given
from pipeline.url import Url, any_path

_SHOWN = 3  # examples of groups, and images in each


def describe(source: str, given: Given, ask: Ask, draft: Draft) -> None:
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


def _describe_store(path: Path, draft: Draft) -> None:
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


def _describe_archive(path: Path, given: Given, draft: Draft) -> None:
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


def _describe_folder(path: Path, given: Given, ask: Ask, draft: Draft) -> None:
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


def _describe_table(path: Path, given: Given, ask: Ask, draft: Draft) -> None:
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
