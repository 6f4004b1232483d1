"""The folder of a training run: who may write there, what continues it, and what is kept.

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
    lock                names the process that writes here
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cache import Fingerprint
from cache.errors import Difference, StoreLockedError
from cache.fingerprint import MISSING
from cache.writing.lock import WriterLock
from pipeline.errors import RunError
from pipeline.records import read_csv, read_json, replacing, write_json
from pipeline.weights import TORN

_VERSION = 1
_LOCK = "lock"  # in a run: there while a process writes it
EXTERNAL = "external"  # in a run: a folder for each external test set
_EARLIER = "earlier"  # in a run: scores of images that were its test set before
_CAME_LATER = ("first_weights_sha256", "data.groups_sha256")  # earlier versions did not record it
_LONGEST = 80  # characters of a setting in a message
_OF_TRAINING = ("last.pt", "samples.csv", "model.*", "best-*.safetensors", "history.*")
_OF_EVALUATION = ("metrics.json", "predictions.csv", "roc.*", "precision_recall.*", "reliability.*",
                  "decision_curve.csv", "loss.png", "confusion.png")  # fmt: skip
_OF_READERS = ("probe.json", "probe.csv", "probe.png", "report.html")  # what says of it how it was chosen, and the page
_BELOW = (EXTERNAL, _EARLIER, "explain", "tensorboard")  # folders in a run: of other images, pictures, events


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


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Be the only process that writes a run; whoever comes second would mix its own weights with ours.

    A folder in which nobody may write, as that of a finished run of others, is nobody's.

    Args:
        folder: Made if it is not there.

    Raises:
        RunError: Another process writes it.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK):
        yield
        return
    try:
        lock = WriterLock(folder / _LOCK, folder)
    except StoreLockedError as error:
        raise RunError(str(error)) from error
    try:
        yield
    finally:
        lock.release()


def begin(folder: Path, settings: Mapping[str, Any], *, replace: bool) -> None:
    """Claim a folder for a run with these settings; one that holds the same run is left as it is.

    Args:
        folder: Made if it is not there.
        settings: JSON values; everything that the result depends on.
        replace: Remove a run with other settings, and all that commands left of it, instead of refusing. One that never
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
        for pattern in (*_OF_EVALUATION, *_OF_TRAINING, *_OF_READERS):
            for old in folder.glob(pattern):
                old.unlink()
        for name in _BELOW:
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
