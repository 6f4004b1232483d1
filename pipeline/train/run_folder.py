"""The folder of a training run: its files, written whole or not at all, and the model they hold.

    samples.csv         the images that it was trained on and chosen on, by id and digest of their pixels
    model.safetensors   weights of the best epoch
    model.json          what to build around them: options, class names, fingerprint of the features, metrics
    settings.json       everything that the result depends on; a folder takes one run
    history.csv, .json  one row per epoch

once it is evaluated, what `evaluate` found of this very model:

    metrics.json, predictions.csv, and curves as tables and pictures

and, until the run is done:

    last.pt             all that continuing needs, replaced at the end of each epoch; tensors and plain values, no code
    best-0007.safetensors   weights of the best epoch so far, which last.pt names
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cache import Fingerprint
from cache.errors import Difference
from cache.fingerprint import MISSING
from pipeline.clip import read_architecture
from pipeline.errors import DamagedFileError, RunError, naming
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.clip_backbone import ClipOptions
from pipeline.model.overlay import OverlayOptions
from pipeline.model.tasks import Head, Task, outputs_of
from pipeline.model.uses import Shape
from pipeline.weights import TORN

_VERSION = 1
_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a spreadsheet runs, or text that has been quoted already
_QUOTED = re.compile(r"'+[=+\-@\t\r]")
EXTERNAL = "external"  # in a run: a folder for each external test set
_EARLIER = "earlier"  # in a run: scores of images that were its test set before
_MOST_BYTES = 256 << 20  # of JSON: a history of a million epochs
_CAME_LATER = ("first_weights_sha256", "data.groups_sha256")  # earlier versions did not record it
_LONGEST = 80  # characters of a setting in a message
_OF_TRAINING = ("last.pt", "samples.csv", "model.*", "best-*.safetensors", "history.*")
_OF_EVALUATION = ("metrics.json", "predictions.csv", "roc.*", "precision_recall.*", "reliability.*",
                  "decision_curve.csv", "loss.png", "confusion.png")  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What a trained model is, beside its weights.

    Attributes:
        model: How it was built.
        task: What its labels mean.
        head: What its outputs mean.
        class_names: Names of the classes.
        taps: (C, h, w) of each stored tap that it reads.
        fingerprint: Of the features it was trained on; None without gates.
        training: Options of its training, for the reader.
        metrics: Figures on val, and the epoch they are of.
        provenance: How it came about, for the reader (`pipeline.train.identity`); empty where that was not recorded.
        weights_sha256: Of the file of weights beside it; empty where an older version wrote it.
        clip: Of a CLIP, `architecture` (see `pipeline.clip.Architecture`) and `prompts` by class; None for others.
    """

    model: ModelOptions
    task: Task
    head: Head
    class_names: tuple[str, ...]
    taps: Mapping[str, Shape]
    fingerprint: Fingerprint | None
    training: Mapping[str, Any]
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    clip: Mapping[str, Any] | None = None


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


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors."""
    content = safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in state.items()})
    with replacing(path) as file:
        file.write(content)


def save_description(folder: Path, description: Description) -> None:
    """Write `model.json`, with the digest of the weights that lie beside it."""
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    values = asdict(replace(description, weights_sha256=digest))
    values["fingerprint"] = None if description.fingerprint is None else dict(description.fingerprint.fields)
    write_json(folder / "model.json", {"version": _VERSION, **values})


def load_description(folder: Path) -> Description:
    """Read `model.json`.

    Raises:
        RunError: There is no finished run in the folder, or not one that this version reads.
    """
    file = folder / "model.json"
    try:
        values = read_json(file)
        if values.pop("version") != _VERSION:
            msg = f"{str(file)!r} is of another version of this program: train again, or use the version that wrote it."
            raise RunError(msg)
        model = values.pop("model")
        model["gates"] = tuple((tap, stage) for tap, stage in model["gates"])
        model["fuse"] = tuple(model.get("fuse", ()))
        model["overlay"] = OverlayOptions(**model["overlay"]) if model.get("overlay") else None
        model["clip"] = _read_clip(model.get("clip"))
        if "norm" not in model:  # until 0.2.0
            model["norm"] = {None: "layer_on_blocks", True: "layer", False: "none"}[model.pop("normalise")]
            model.pop("gain")  # of the first weights, which are long gone
        fingerprint = values.pop("fingerprint")
        return Description(
            model=ModelOptions(**model),
            class_names=tuple(values.pop("class_names")),
            taps={tap: cast(Shape, tuple(shape)) for tap, shape in values.pop("taps").items()},
            fingerprint=None if fingerprint is None else Fingerprint(fingerprint),
            **values,
        )
    except FileNotFoundError as error:
        msg = f"There is no trained model in {str(folder)!r}: run `pipeline train` first, or name another run."
        raise RunError(msg) from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        msg = f"{str(file)!r} is no description of a model ({error}): delete the folder and train again."
        raise RunError(msg) from error


def _read_clip(values: Mapping[str, Any] | None) -> ClipOptions | None:
    """Undo what JSON did to a CLIP's options."""
    if values is None:
        return None
    words = tuple((name, said) for name, said in values["words"])
    return ClipOptions(tuple(values["templates"]), words, values["lora"])


def load_classifier(folder: Path, *, device: torch.device | None = None) -> tuple[Classifier, Description]:
    """Build the model of a finished run, ready to predict.

    Args:
        folder: The run.
        device: Where it goes.

    Raises:
        RunError: No finished run, or weights that are damaged or were not kept.
    """
    description = load_description(folder)
    outputs = outputs_of(description.head, len(description.class_names))
    with damage_named(folder / "model.json"):
        built = None if description.clip is None else read_architecture(description.clip["architecture"])
    options = replace(description.model, weights="none")
    classifier = Classifier(options, description.taps, outputs, architecture=built)
    content = read_weights(folder, description)
    try:
        classifier.load_state_dict(safetensors.torch.load(content))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise RunError(_other_weights(folder, str(error).splitlines()[0])) from error
    return classifier.to(device or torch.device("cpu")).eval(), description


def read_weights(folder: Path, description: Description) -> bytes:
    """The bytes of a finished run's weights, which are those that its description names.

    Raises:
        RunError: They are not, or were not kept.
    """
    file = weights_file(folder)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RunError(_other_weights(folder, str(error))) from error
    if description.weights_sha256 not in ("", hashlib.sha256(content).hexdigest()):
        raise RunError(_other_weights(folder, "they are other weights than those it names by their SHA-256"))
    return content


def _other_weights(folder: Path, why: str) -> str:
    return (
        f"{str(folder / 'model.safetensors')!r} does not hold the weights that model.json describes ({why}): "
        f"delete the folder {str(folder)!r} and train again."
    )


def weights_file(folder: Path) -> Path:
    """The file of a finished run's weights, which is there.

    Raises:
        RunError: It is not, as after a study that keeps no weights.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        msg = (
            f"The weights of the run {str(folder)!r} were not kept: delete this folder and run its study again with "
            f"`keep_weights: true`, or train that configuration on its own (`--set run=runs/NAME`)."
        )
        raise RunError(msg)
    return file


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of `history.json`."""
    history: list[dict[str, Any]] = read_json(folder / "history.json", kind=list)
    return history


def steps_of(history: Sequence[Mapping[str, Any]], kept: int) -> tuple[str, str, str]:
    """What a row of a history is called, what several are, and which one was kept.

    Training has epochs; the probe tries penalties, and an adapter of CLIP settings, with `alpha` and `beta` if any.

    Args:
        history: The rows; they are numbered from 1 (`epoch`).
        kept: Number of the one that val chose.
    """
    row = history[kept - 1]
    if "c" in row:
        return "penalty, from strong to weak", "penalties", f"C = {row['c']:g}"
    if "alpha" in row:
        return "setting", "settings", f"alpha = {row['alpha']:g}, beta = {row['beta']:g}"
    return ("epoch", "epochs", f"epoch {kept}") if "lr" in row else ("setting", "settings", "the only one")


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The leaves in which two records of what a run depends on differ.

    What one of them does not say, because an earlier version wrote it, fits whatever the other says: finished runs stay
    valid when this program comes to record more.
    """
    return tuple(
        found
        for found in Fingerprint(ours).differences(Fingerprint(theirs))
        if found.field not in _CAME_LATER or MISSING not in (found.ours, found.theirs)
    )


def begin(folder: Path, settings: Mapping[str, Any], *, replace: bool) -> None:
    """Claim a folder for a run with these settings; one that holds the same run is left as it is.

    Args:
        folder: Made if it is not there.
        settings: JSON values; everything that the result depends on.
        replace: Remove a run with other settings, and what `evaluate` found of it, instead of refusing. One that never
            finished an epoch is no run, and gives way.

    Raises:
        RunError: The folder holds a run with other settings, which the message lists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if file.is_file():
        try:
            others = differences(settings, read_json(file))
        except ValueError as error:
            msg = f"{str(file)!r} cannot be read ({error}): delete the folder {str(folder)!r} and train again."
            raise RunError(msg) from error
        if not others:
            return
        started = any((folder / name).exists() for name in ("last.pt", "model.json"))
        if started and not replace:
            listed = "; ".join(f"{d.field} is {brief(d.ours)} and was {brief(d.theirs)}" for d in others)
            msg = (
                f"{str(folder)!r} holds a run with other settings: {listed}. "
                f"Name another folder (`--set run=runs/NAME`), or start over with `--replace`."
            )
            raise RunError(msg)
        for pattern in (*_OF_EVALUATION, *_OF_TRAINING):
            for old in folder.glob(pattern):
                old.unlink()
        for name in (EXTERNAL, _EARLIER):  # what it came to on other images
            shutil.rmtree(folder / name, ignore_errors=True)
    write_json(file, Fingerprint(settings).fields)


def keep_earlier(folder: Path, tested: Mapping[str, str]) -> None:
    """Put what `evaluate` has found on other images aside, in the first free `earlier/N`, before it writes anew.

    Args:
        folder: The run.
        tested: Digest of the pixels by id, of the images that are scored now; empty digests agree with any.
    """
    file = folder / "predictions.csv"
    if not file.is_file():
        return
    before = {row["id"]: row.get("pixels_sha256") or "" for row in read_csv(file)}
    if before.keys() == tested.keys() and all(
        not (a and b) or a == b for a, b in ((before[name], tested[name]) for name in tested)
    ):
        return
    number = 1
    while (folder / _EARLIER / str(number)).exists():
        number += 1
    aside = folder / _EARLIER / str(number)
    aside.mkdir(parents=True)
    for pattern in _OF_EVALUATION:
        for old in folder.glob(pattern):
            old.rename(aside / old.name)


def brief(value: object) -> str:
    """A setting in a message: the start of a digest tells it apart, and of anything long the start is enough."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return repr(value[:12])
    said = repr(value)
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


def tidy(folder: Path) -> None:
    """Remove from a finished run what only continuing needed."""
    for pattern in ("last.pt", "best-*.safetensors", "*.partial"):
        for file in folder.glob(pattern):
            file.unlink()


def save_checkpoint(folder: Path, checkpoint: Mapping[str, Any]) -> None:
    """Replace `last.pt`; a kill at any moment leaves the old one or the new one."""
    with replacing(folder / "last.pt") as file:
        torch.save({"version": _VERSION, **checkpoint}, file)


def is_started(folder: Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return (folder / "last.pt").is_file()


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Read `last.pt` if there is one.

    Raises:
        RunError: It cannot be read.
    """
    file = folder / "last.pt"
    if not file.is_file():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except TORN as error:
        msg = f"{str(file)!r} cannot be read ({type(error).__name__}): delete it and train again."
        raise RunError(msg) from error
    return checkpoint
