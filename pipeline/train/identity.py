"""What a run rests on: every command that continues, scores or shows it asks here whether data and store still fit.

An identity is a tree of JSON values that is compared leaf by leaf, like the fingerprint of a store, and recorded in the
run. How a run came about is for the reader and never compared: see `pipeline.train.provenance`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import Fingerprint, Store
from cache.errors import Difference
from pipeline.data import Dataset
from pipeline.errors import RunError
from pipeline.image_tap import of_features
from pipeline.records import damage_named, read_csv, write_csv
from pipeline.train.run_folder import differences
from pipeline.train.trained_model import load_description
from pipeline.weights import file_sha256

if TYPE_CHECKING:
    from pipeline.model.classifier import ModelOptions
    from pipeline.train.augment import Augmentation
    from pipeline.train.feeding.feed import Feed
    from pipeline.train.optimise import TrainOptions

_SAMPLES = "samples.csv"  # of a run


def identity_of(
    dataset: Dataset, store: Store | None, model: ModelOptions, options: TrainOptions, augmentation: Augmentation
) -> dict[str, Any]:
    """Everything that the result of a training depends on.

    Args:
        dataset: Samples, labels and splits.
        store: Of the features; looked at only where the model reads any.
        model: What is trained.
        options: How.
        augmentation: On what.

    Returns:
        JSON values: those of `inputs_of`, `model`, `train`, `augmentation`.
    """
    return {
        **inputs_of(dataset, store if model.taps else None, model.weights_file),
        "model": _without_new_defaults(asdict(model)),
        "train": _without_new_defaults(asdict(options)),
        "augmentation": asdict(augmentation),
    }


# Keys of `model` and `train` and of what is in them, and what changes nothing.
_CAME_LATER: dict[str, Any] = {
    "fuse": (),
    "overlay": None,
    "shots": None,
    "clip": None,
    "alignment": None,
    "text_lr": 0.0,
    "head": "linear",
    "cached": 0,
    "min_stability": 0.0,
}


def _without_new_defaults(section: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys that came later where they change nothing: a run of an earlier version is the same run."""
    return {
        key: _without_new_defaults(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if key not in _CAME_LATER or value != _CAME_LATER[key]
    }


def inputs_of(dataset: Dataset, store: Store | None, first_weights: Path | None) -> dict[str, Any]:
    """The part of `identity_of` that may change while the configuration stays the same.

    Args:
        dataset: The samples.
        store: Whose rows are read; None if none are.
        first_weights: The file that the backbone starts from; None where its weights are drawn.

    Returns:
        JSON values: `data` (see `data_identity`); `features`, what their fingerprint says; and `first_weights_sha256`,
        where there is a file.
    """
    return {
        "data": data_identity(dataset, store),
        "features": None if store is None else of_features(store.fingerprint).fields,
        **({"first_weights_sha256": file_sha256(first_weights)} if first_weights and first_weights.is_file() else {}),
    }


def changed_inputs(
    folder: Path, dataset: Dataset, store: Store | None, first_weights: Path | None
) -> tuple[Difference, ...]:
    """What a finished run rests on that is otherwise by now, its settings apart; see `inputs_of`."""
    now, recorded = inputs_of(dataset, store, first_weights), recorded_identity(folder)
    return differences({key: recorded[key] for key in now if key in recorded}, now)


def data_identity(dataset: Dataset, store: Store | None) -> dict[str, Any]:
    """What a run rests on that its configuration does not say: samples, their groups, and a store's source pixels.

    Groups choose the training part, and intervals are drawn over them.

    Args:
        dataset: The samples.
        store: Whose rows are read; None if none are, and then the pixels are not looked at.
    """
    return {
        "samples_sha256": _samples_sha256(dataset),
        "groups_sha256": _digest([sample.group for sample in dataset.samples]),
        "pixels_sha256": None if store is None else _pixels_sha256(dataset, store),
        "task": dataset.task,
        "class_names": list(dataset.class_names),
    }


def _pixels_sha256(dataset: Dataset, store: Store) -> str | None:
    """A digest of the pixels behind a store's rows of a data set, wherever the rows lie and whatever else is there.

    None where the store does not tell; of all its rows where it knows the samples by other names.
    """
    digests = store.digests
    if not len(digests):
        return None
    row_of = {name: row for row, name in enumerate(store.ids)}
    rows = [row_of[sample.id] for sample in dataset.samples if sample.id in row_of]
    return hashlib.sha256((digests[rows] if rows else digests).tobytes()).hexdigest()


def recorded_identity(folder: Path) -> dict[str, Any]:
    """The identity that a finished run recorded.

    Raises:
        RunError: There is no finished run, or an older version of this program trained it.
    """
    provenance = load_description(folder).provenance
    if "settings" not in provenance:
        msg = f"The run in {str(folder)!r} does not say what it depends on: train it again with this version."
        raise RunError(msg)
    settings: dict[str, Any] = provenance["settings"]
    return settings


def check_samples(folder: Path, dataset: Dataset) -> None:
    """Refuse a data set that is not the one a run was trained on.

    Raises:
        RunError: Its samples, labels or splits are others.
    """
    if recorded_identity(folder)["data"]["samples_sha256"] != _samples_sha256(dataset):
        msg = (
            f"The run {str(folder)!r} was trained on other samples, labels or splits than {dataset.name!r} has now: "
            f"give the run's own configuration with -c, or train again. {what_changed(folder, dataset)}"
        )
        raise RunError(msg.rstrip())


def record_samples(folder: Path, feeds: Iterable[Feed]) -> None:
    """Write down which images a run was trained on and chosen on: split, id, and digest of the pixels of each."""
    write_csv(
        folder / _SAMPLES,
        [
            {"split": feed.split, "id": name, "pixels_sha256": (feed.pixel_digest(position) or b"").hex()}
            for feed in feeds
            for position, name in enumerate(feed.ids)
        ],
    )


def check_feed(folder: Path, dataset: Dataset, feed: Feed) -> None:
    """Refuse to score or show images under another split than the one that the run used them in.

    On the very samples of the training this always holds. On others (images added, renamed or removed since, another
    data set) no image may be one that the run has used otherwise, by its pixels where both are known, else by its id
    (a run that read images ahead of each step need not have read all of them when it wrote them down).
    So a run may be tested on images from elsewhere, and never on those that it has learnt.

    Args:
        folder: The run.
        dataset: What it is used on.
        feed: Of one split, after its images have been read.

    Raises:
        RunError: Such images are among them, or the run does not say which images it has used.
    """
    if recorded_identity(folder)["data"]["samples_sha256"] == _samples_sha256(dataset):
        return
    try:
        used = read_csv(folder / _SAMPLES)
    except FileNotFoundError:
        msg = (
            f"{dataset.name!r} has other samples, labels or splits than the run {str(folder)!r} was trained on, and an "
            f"older version trained it, which did not record its images: train it again, or give its own data. "
            f"{_how_drawn(dataset)}"
        )
        raise RunError(msg.rstrip()) from None
    moved = _used_otherwise(folder, used, feed)
    if moved:
        first, then = moved[0]
        msg = (
            f"{len(moved)} of {len(feed)} images of split {feed.split!r} were used otherwise by the run "
            f"{str(folder)!r}: {first!r}, for one, was in {then!r}. The data set {dataset.name!r} has changed since, "
            f"or shares images with the run's own: give the run's own data, leave them out, or train again. "
            f"{_how_drawn(dataset)}"
        )
        raise RunError(msg.rstrip())


def also_learnt(folder: Path, feed: Feed) -> str:
    """Which images of a split the run has used in another one, by their pixels: in words, empty where there are none.

    On the very samples of the training that is no mistake of the run, and no reason to refuse it: a data set may hold
    an image twice. But what it scores on such images is no test.
    """
    try:
        used = read_csv(folder / _SAMPLES)
    except FileNotFoundError:  # an older version trained it
        return ""
    moved = _used_otherwise(folder, used, feed)
    if not moved:
        return ""
    first, then = moved[0]
    return (
        f"{len(moved)} of {len(feed)} images of split {feed.split!r} have the pixels of images that the run was "
        f"trained or chosen on: {first!r}, for one, of one in {then!r}"
    )


def _used_otherwise(folder: Path, used: Sequence[Mapping[str, str]], feed: Feed) -> list[tuple[str, str]]:
    """Images of a feed that a run has used in another split, and in which."""
    with damage_named(folder / _SAMPLES):
        by_pixels = {row["pixels_sha256"]: row["split"] for row in used if row["pixels_sha256"]}
        by_id = {row["id"]: row["split"] for row in used}
        unread = {row["id"]: row["split"] for row in used if not row["pixels_sha256"]}
    moved = []
    for position, name in enumerate(feed.ids):
        digest = feed.pixel_digest(position)
        known = by_id.get(name) if digest is None else by_pixels.get(digest.hex(), unread.get(name))
        if known is not None and known != feed.split:
            moved.append((name, known))
    return moved


def what_changed(folder: Path, dataset: Dataset) -> str:
    """What is otherwise in a data set than it was when a run was trained on it: sentences for a message.

    Args:
        folder: Of the run; what it does not tell is left out.
        dataset: As it is now.
    """
    try:
        used = {row["id"]: row["split"] for row in read_csv(folder / _SAMPLES)}
        before = load_description(folder).provenance["data"]["samples"]
    except (OSError, RunError, KeyError, TypeError):
        return _how_drawn(dataset)
    now = {sample.id: sample.split for sample in dataset.samples}
    moved = [(name, split, now[name]) for name, split in used.items() if name in now and now[name] != split]
    gone = sum(name not in now for name in used)
    told = [f"of the {len(used)} images that it has used, {len(moved)} are in another split now and {gone} are gone"]
    if moved:
        told.append("{!r}, for one, was in {!r} and is in {!r}".format(*moved[0]))
    if before != len(dataset):
        told.append(f"the data set had {before} images and has {len(dataset)}")
    said = "; ".join(told)
    return f"{said[0].upper()}{said[1:]}. {_how_drawn(dataset) if moved else ''}".rstrip()


def data_changed(folder: Path, dataset: Dataset) -> str:
    """What is otherwise in a data set than it was when a run was trained on it; empty where all is as it was."""
    if recorded_identity(folder)["data"]["samples_sha256"] == _samples_sha256(dataset):
        return ""
    return what_changed(folder, dataset) or "The data set has other samples, labels or splits than in training."


def _how_drawn(dataset: Dataset) -> str:
    """How splits that were drawn come to be others than they were, and the way back: a sentence for a message."""
    if dataset.drawn == "steady":
        return (
            "Until version 0.2.0 splits were drawn in another way, in which images moved when the data set changed: "
            "`--set data.split.draw=balanced` draws them so, for a run of that time."
        )
    if dataset.drawn == "balanced":
        return (
            "Splits that are drawn as 'balanced' move when the data set changes; "
            "`--set data.split.draw=steady` draws them so that none ever does."
        )
    return ""


def check_classes(folder: Path, task: str, class_names: tuple[str, ...], dataset: Dataset) -> None:
    """Refuse a data set whose classes are not those of a model.

    Args:
        folder: Of the run, for the message.
        task: What the model's labels mean.
        class_names: The classes that it knows.
        dataset: What it is to be used on.

    Raises:
        RunError: The task or the names of the classes differ.
    """
    if (dataset.task, tuple(dataset.class_names)) != (task, class_names):
        msg = (
            f"The model in {str(folder)!r} knows the {task} classes {list(class_names)}; "
            f"the data set {dataset.name!r} has the {dataset.task} classes {list(dataset.class_names)}: name its own."
        )
        raise RunError(msg)


def check_features(folder: Path, trained_on: Fingerprint | None, given: Fingerprint) -> None:
    """Refuse features that were computed in another way than those a model was trained on.

    Args:
        folder: Of the run, for the message.
        trained_on: None for a model without features, which takes any.
        given: Of the features at hand.

    Raises:
        RunError: They were; the message lists each field that differs.
    """
    differences = () if trained_on is None else trained_on.differences(of_features(given))
    if differences:
        listed = "; ".join(f"{d.field} is {d.theirs!r} and was {d.ours!r} in training" for d in differences)
        msg = (
            f"The model in {str(folder)!r} was trained on other features: {listed}. "
            f"Extract features as they were in training, or train again."
        )
        raise RunError(msg)


def _samples_sha256(dataset: Dataset) -> str:
    """A digest of which samples there are, with what labels, in which splits: hexadecimal."""
    return _digest([[sample.id, sample.label, sample.split] for sample in dataset.samples])


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
