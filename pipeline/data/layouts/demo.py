"""The demo data set: generated images and lesion masks as PNG files, and a CSV table of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from pipeline.data.dataset import Dataset, Split
from pipeline.data.layouts.demo_images import CLASS_NAMES, STANDARD, VERSION, Difficulty, draw, roll
from pipeline.data.layouts.table import load_csv
from pipeline.data.splits import FRACTIONS, stratified_split
from pipeline.errors import DataError, UnreachableError
from pipeline.progress import Progress, silent
from pipeline.url import AnyPath, Url

_TABLE = "demo.csv"
_PARAMETERS = "demo.json"


def generate_demo(
    root: AnyPath,
    *,
    count: int = 360,
    size_px: int = 128,
    seed: int = 0,
    difficulty: Difficulty = STANDARD,
    fractions: Mapping[Split, float] = FRACTIONS,
    progress: Progress = silent,
) -> bool:
    """Have the demo data set in a folder; nothing is done where it lies there complete and of the same parameters.

    The images are made in `NAME.partial` beside the folder and get the folder's name when all are there. Behind a URL
    they are only looked for.

    Args:
        root: The folder: `demo.csv` (image, shape, split, patient, mask), `demo.json` (these parameters), `images/`
            and `masks/`. A demo of other parameters is replaced.
        count: Number of images.
        size_px: Side of the square images.
        seed: Of everything that is drawn.
        difficulty: How hard the shape is to see.
        fractions: Shares of val and test.
        progress: Called after each image.

    Returns:
        Whether images were made.

    Raises:
        UnreachableError: The server behind a URL does not answer.
        DataError: The folder holds something that is no demo data set, or the disk is full; or there is no demo of
            these parameters behind a URL.
    """
    parameters = {
        "version": VERSION,
        "count": count,
        "size_px": size_px,
        "seed": seed,
        "difficulty": dataclasses.asdict(difficulty),
        "fractions": dict(fractions),
    }
    parameters = json.loads(json.dumps(parameters))  # as they read back: tuples are lists
    if _complete(root, parameters):
        return False
    if isinstance(root, Url):
        message = f"{root}: there is no demo of these parameters; make it in a folder here and copy that there"
        raise DataError(message)
    if root.exists() and not (root.is_dir() and (not any(root.iterdir()) or (root / _PARAMETERS).is_file())):
        message = f"{root}: this is no demo data set and would be replaced by one; move it away or choose another path"
        raise DataError(message)
    partial, old = (root.with_name(root.name + suffix) for suffix in (".partial", ".old.partial"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        _write(partial, parameters, difficulty, fractions, progress)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        message = f"{root}: the demo images cannot be written ({error.strerror}); make room or choose another path"
        raise DataError(message) from error
    if root.exists():
        root.rename(old)
    partial.rename(root)
    shutil.rmtree(old, ignore_errors=True)
    return True


def load_demo(root: AnyPath) -> Dataset:
    """Load the demo data set; its masks come with it.

    Args:
        root: Folder that `generate_demo` made, or its URL.

    Raises:
        UnreachableError: The server behind a URL does not answer.
        DataError: There is none, or files are missing.
    """
    if isinstance(root, Path) and not (root / _PARAMETERS).is_file():
        message = f"{root}: there is no demo data set; `pipeline prepare` makes it"
        raise DataError(message)
    made = load_csv(
        root / _TABLE,
        root=root,
        path_column="image",
        label_column="shape",
        split_column="split",
        group_column="patient",
        mask_column="mask",
        draw=None,
    )
    return dataclasses.replace(made, name="demo")


def _complete(root: AnyPath, parameters: Mapping[str, Any]) -> bool:
    """Whether the folder holds all files of a demo of these parameters."""
    try:
        found = json.loads((root / _PARAMETERS).read_bytes())
        return bool(found == parameters and len(load_demo(root)) == parameters["count"])
    except UnreachableError:
        raise
    except (OSError, ValueError, DataError):
        return False


def _write(
    folder: Path,
    parameters: Mapping[str, Any],
    difficulty: Difficulty,
    fractions: Mapping[Split, float],
    progress: Progress,
) -> None:
    """Write all files of the data set; the parameters come last."""
    count, size_px, seed = parameters["count"], parameters["size_px"], parameters["seed"]
    rows = roll(count, seed)
    patients = [f"p{patient:04d}" for _, patient, _ in rows]
    splits = stratified_split([label for label, _, _ in rows], patients, fractions=fractions, seed=seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    with (folder / _TABLE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "shape", "split", "patient", "mask"])
        for done, ((label, patient, visit), split) in enumerate(zip(rows, splits, strict=True), start=1):
            pixels, lesion, _ = draw(label, patient, visit, size_px, seed, difficulty)
            image, mask = (f"{kind}/p{patient:04d}_{visit}.png" for kind in ("images", "masks"))
            _write_png(folder / image, pixels)
            _write_png(folder / mask, lesion.astype(np.uint8) * 255)
            table.writerow([image, CLASS_NAMES[label], split, f"p{patient:04d}", mask])
            progress("draw", done, count)
    (folder / _PARAMETERS).write_text(json.dumps(parameters, indent=2) + "\n")


def _write_png(path: Path, grey: npt.NDArray[np.uint8]) -> None:
    Pillow.fromarray(grey).save(path)
