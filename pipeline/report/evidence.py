"""Everything about a run that a reviewer asks for, gathered from its folder, its data and its store."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

import cache
from pipeline import records
from pipeline.data import Dataset, Split, identical_across_splits
from pipeline.data.layouts.stored import StoredImages
from pipeline.data.scan import Scan, scan
from pipeline.errors import RunError
from pipeline.evaluate.compare import Predictions, other_settings, read_predictions, what_differs
from pipeline.evaluate.external import FOLDER as EXTERNAL
from pipeline.image_tap import of_features
from pipeline.progress import Progress, silent
from pipeline.report.cohort import Cohort, follow
from pipeline.report.reproduce import Commands
from pipeline.report.verdict import Units
from pipeline.train import run_folder, trained_model
from pipeline.train.identity import check_samples, recorded_identity
from pipeline.train.provenance import data_in_numbers, versions

FOUND = "explain.json"  # in the folder of the pictures


@dataclass(frozen=True)
class Study:
    """Runs that stand beside this one.

    Attributes:
        name: Of the study.
        rows: Of its table, as text by column.
        curve: Its picture; None if there is none.
        compares: Whether one of its runs is this one, and another differs from it in having gates or none, and in
            nothing else.
        cross_validated: Whether its scores are those of all samples, each scored by the fold in which it was test.
    """

    name: str
    rows: Sequence[Mapping[str, str]]
    curve: Path | None
    compares: bool
    cross_validated: bool = False


@dataclass(frozen=True)
class Pictures:
    """Where the run looked.

    Attributes:
        folder: Of the pictures.
        found: What `explain` wrote down about them.
    """

    folder: Path
    found: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """A picture by the name that `explain` wrote down.

        Raises:
            RunError: It leads out of the folder: a run from elsewhere could have a page show any file of this machine.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            msg = f"{str(self.folder / FOUND)!r} names {name!r}, which is no picture of this run: run `explain` again."
            raise RunError(msg)
        return self.folder / name


@dataclass(frozen=True)
class Signature:
    """Who wrote the page, when and with what.

    Attributes:
        date: Such as 2026-11-28; empty to leave it out.
        author: As given; empty where nobody was named.
        version: Of this program.
    """

    date: str = ""
    author: str = ""
    version: str = field(default_factory=lambda: versions()["slca-pipeline"])


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run.

    Attributes:
        name: Of the run.
        description: The model.
        figures: What `evaluate` found.
        said: Of each test sample.
        history: One row per epoch.
        data: See `provenance.data_in_numbers`.
        checked: Images whose pixels were compared.
        leaks: Ids of each set of identical images that spans splits.
        unreadable: Reason by id of images that cannot be read.
        store: The store that the gates read; None without gates, or where it is gone.
        changed: Rows of the store whose image has other pixels now.
        extraction: What stage one took; None where that was not recorded.
        weights_sha256: Of the model's file.
        study: Runs beside it.
        pictures: Where it looked.
        generated: Whether the images are drawn by a program.
        untrained: Whether the encoder's weights are drawn from a seed.
        commands: That give the run again, or why there are none.
        cohort: Where every image went.
        signed: Who wrote the page, when and with what.
        encoder_made: What `prepare` recorded of the encoder's weights; empty where it did not make them.
        elsewhere: What `evaluate --data` found on external test sets, by their names.
        notes: What could not be shown, and why.
    """

    name: str
    description: trained_model.Description
    figures: Mapping[str, Any]
    said: Predictions
    history: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]
    checked: int
    leaks: Sequence[Sequence[str]]
    unreadable: Mapping[str, str]
    store: cache.StoreInfo | None
    changed: int
    extraction: Mapping[str, Any] | None
    weights_sha256: str
    study: Study | None
    pictures: Pictures | None
    generated: bool
    untrained: bool
    commands: Commands
    cohort: Cohort
    signed: Signature
    encoder_made: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def units(self) -> Units:
        """What the page calls a group."""
        return Units(self.data["grouped"], self.generated)

    @property
    def positive(self) -> str | None:
        """The class that is looked for; None where none is named."""
        named: str | None = self.figures["positive"]
        return named

    @property
    def point(self) -> str | None:
        """The operating point that stands in front: the first that `evaluate` was asked for; None without val."""
        return next(iter(self.figures["operating_points"]), None)


def collect(
    folder: Path,
    dataset: Dataset,
    store: Path | None,
    *,
    study: Path | None = None,
    generated: bool = False,
    untrained: bool = False,
    encoder_made: Mapping[str, Any] | None = None,
    commands: Commands | None = None,
    signed: Signature | None = None,
    workers: int = 2,
    progress: Progress = silent,
) -> Evidence:
    """Gather what there is about an evaluated run.

    Args:
        folder: The run.
        dataset: What it was trained and tested on.
        store: Where its features are; may be gone, or hold others by now, which a note then says.
        study: Folder of a study to show beside it.
        generated: Whether the images are drawn by a program.
        untrained: Whether the encoder's weights are drawn from a seed.
        encoder_made: What `prepare` recorded of the weights that the encoder has now; None where it did not make them.
        commands: That give the run again, or why there are none.
        signed: Who writes the page, and when.
        workers: Decoding threads, for images whose digest is not remembered.
        progress: Called while images are read.

    Raises:
        RunError: The run is not finished, not evaluated or without its weights, was trained on other samples or
            evaluated over other groups, or the study has no table.
    """
    description = trained_model.load_description(folder)
    figures = read_figures(folder, description)
    check_samples(folder, dataset)
    notes: list[str] = []
    seen = _scan(dataset, store, workers, progress)
    found, changed, stored = None, 0, None
    if description.fingerprint is not None and store is not None:
        found, changed, stored = _look_at_store(store, description.fingerprint, dataset, seen, notes)
    said = read_predictions(folder)
    _check_groups(folder, said, dataset)
    digest = hashlib.sha256(trained_model.weights_file(folder).read_bytes()).hexdigest()
    return Evidence(
        name=str(folder),
        description=description,
        figures=figures,
        said=said,
        history=run_folder.read_history(folder),
        data=data_in_numbers(dataset),
        checked=int(seen.readable.sum()),
        leaks=identical_across_splits(dataset, seen.digests),
        unreadable=seen.set_aside,
        store=found,
        changed=changed,
        extraction=None if found is None else _read_json(extraction_record(found.path)),
        weights_sha256=digest,
        study=None if study is None else read_study(study, folder),
        pictures=_read_pictures(folder / "explain", digest, notes),
        generated=generated,
        untrained=untrained,
        encoder_made=_if_of_the_run(encoder_made or {}, description),
        commands=commands or Commands(),
        cohort=follow(dataset, _used(folder, figures["split"], said.ids), seen.set_aside, stored),
        signed=signed or Signature(),
        elsewhere=_elsewhere(folder, figures, notes),
        notes=tuple(notes),
    )


def _check_groups(folder: Path, said: Predictions, dataset: Dataset) -> None:
    """Refuse intervals that were drawn over other groups than the page would count.

    Raises:
        RunError: Some image was of another group when the run was evaluated.
    """
    now = {sample.id: sample.group for sample in dataset.samples}
    if any(now.get(name, group) != group for name, group in zip(said.ids, said.groups, strict=True)):
        msg = (
            f"The scores in {str(folder)!r} are of other groups (patients) than {dataset.name!r} has now: run "
            f"`pipeline evaluate` on this run again."
        )
        raise RunError(msg)


def _if_of_the_run(made: Mapping[str, Any], description: trained_model.Description) -> Mapping[str, Any]:
    """What is recorded of an encoder's weights, if the run's features are of these weights."""
    fields = {} if description.fingerprint is None else description.fingerprint.fields
    return made if made and made.get("sha256") == fields.get("weights_sha256") else {}


def extraction_record(store: Path) -> Path:
    """Where stage one leaves what it took, beside the store: seconds depend on the machine and are no part of it."""
    return store.with_name(store.name + ".extract.json")


def read_study(folder: Path, beside: Path) -> Study:
    """Read the table and the curve that a study left, to stand beside an evaluated run.

    Raises:
        RunError: There is no table.
    """
    try:
        rows = records.read_csv(folder / "table.csv")
    except OSError as error:
        msg = f"There is no study at {str(folder)!r} ({error.strerror}): name the folder that has its table.csv."
        raise RunError(msg) from None
    curve = folder / "curve.png"
    return Study(
        folder.name,
        rows,
        curve if curve.is_file() else None,
        _compares(folder, beside),
        (folder / "folds.csv").is_file(),
    )


def _compares(study: Path, ours: Path) -> bool:
    """Whether a study has a run, and its counterpart with gates where it has none or without where it has some."""
    has_it = has_counterpart = False
    gated, settings, said = (
        bool(trained_model.load_description(ours).model.gates),
        recorded_identity(ours),
        read_predictions(ours),
    )
    for folder in _runs_of(study):
        try:
            is_it = not run_folder.differences(recorded_identity(folder), settings)
            of_other_kind = bool(trained_model.load_description(folder).model.gates) != gated
            is_counterpart = of_other_kind and other_settings(ours, folder) == []
            if (is_it or is_counterpart) and what_differs(said, read_predictions(folder)) is None:
                has_it, has_counterpart = has_it or is_it, has_counterpart or is_counterpart
        except RunError:
            continue  # its files are gone, or of an older version
    return has_it and has_counterpart


def _runs_of(study: Path) -> list[Path]:
    """Folders of the finished runs of a study, wherever it lies by now."""
    try:
        return [study / "runs" / Path(row["run"]).name for row in records.read_csv(study / "results.csv")]
    except (OSError, KeyError):
        return []


def read_figures(folder: Path, description: trained_model.Description) -> dict[str, Any]:
    """Read what `evaluate` found about the model.

    Raises:
        RunError: The model has not been evaluated.
    """
    figures = _read_json(folder / "metrics.json")
    if figures is None:
        msg = f"There are no metrics in {str(folder)!r}: run `pipeline evaluate` on this run first."
        raise RunError(msg)
    kept = (description.metrics["epoch"], description.metrics["val"]["auc"])
    if "positive" not in figures:
        msg = f"The metrics in {str(folder)!r} are of an older version: run `pipeline evaluate` on this run again."
        raise RunError(msg)
    if (figures["best_epoch"], figures["val_auc"]) != kept:
        msg = f"The metrics in {str(folder)!r} are those of another model: run `pipeline evaluate` again."
        raise RunError(msg)
    return figures


def _scan(dataset: Dataset, store: Path | None, workers: int, progress: Progress) -> Scan:
    """Digest all images, with the memory of stage one where there is one; a store knows the digests of its own."""
    if isinstance(dataset.source, StoredImages):
        recorded = [dataset.recorded_digest(index) or b"" for index in range(len(dataset))]
        digests = np.array([np.frombuffer(digest.ljust(32, b"\0"), np.uint8) for digest in recorded])
        return Scan(dataset, digests, np.asarray(digests.any(axis=1)))
    memory = None if store is None else store.with_name(store.name + ".seen.npz")
    if memory is not None and memory.is_file():
        return scan(dataset, memory, workers=workers, progress=progress)
    with tempfile.TemporaryDirectory() as scratch:
        return scan(dataset, Path(scratch) / "seen.npz", workers=workers, progress=progress)


def _look_at_store(
    path: Path, wanted: cache.Fingerprint, dataset: Dataset, seen: Scan, notes: list[str]
) -> tuple[cache.StoreInfo | None, int, frozenset[str] | None]:
    """Summarise the store of the run's features, count the rows whose images have changed since, and list its ids."""
    try:
        info = cache.info(path)
        if not info.complete or of_features(info.fingerprint).differences(wanted):
            notes.append(
                f"The store at {path} does not hold the features of this run any more, so it is not described."
            )
            return None, 0, None
        with cache.open_store(path) as store:
            digests = store.digests if len(store.digests) else np.zeros((len(store), 32), np.uint8)
            stored = dict(zip(store.ids, digests, strict=True))
    except cache.StoreError as error:
        notes.append(f"The store of the features is not described: {error}")
        return None, 0, None
    changed = sum(
        sample.id in stored and bool(stored[sample.id].any()) and bool((stored[sample.id] != digest).any())
        for sample, digest, readable in zip(dataset.samples, seen.digests, seen.readable, strict=True)
        if readable
    )
    return info, changed, frozenset(stored)


def _used(folder: Path, scored: Split, ids: Sequence[str]) -> dict[Split, list[str]]:
    """Ids that a run trained on, chose on and was scored on, by split."""
    used: dict[Split, list[str]] = {"train": [], "val": [], "test": []}
    try:
        with records.damage_named(folder / "samples.csv"):
            for row in records.read_csv(folder / "samples.csv"):
                used[cast(Split, row["split"])].append(row["id"])
    except OSError as error:
        msg = f"There is no list of images in {str(folder)!r} ({error.strerror}): train it again with this version."
        raise RunError(msg) from None
    return used | {scored: list(ids)}


def _elsewhere(folder: Path, own: Mapping[str, Any], notes: list[str]) -> dict[str, dict[str, Any]]:
    """Figures on external test sets, of this model and no other."""
    found = {}
    for file in sorted((folder / EXTERNAL).glob("*/metrics.json")):
        figures = _read_json(file)
        if figures is None or any(figures.get(key) != own[key] for key in ("best_epoch", "val_auc", "positive")):
            notes.append(
                f"The figures on the external test set {file.parent.name} are of another model or another positive "
                "class, so they are left out: run `pipeline evaluate --data` again."
            )
        else:
            found[file.parent.name] = figures
    return found


def _read_pictures(folder: Path, weights_sha256: str, notes: list[str]) -> Pictures | None:
    found = _read_json(folder / FOUND)
    if found is None or not (folder / found["sheet"]["file"]).is_file():
        return None
    if found["weights_sha256"] != weights_sha256:
        notes.append("The heat maps in the run's folder are of another model, so they are left out.")
        return None
    return Pictures(folder, found)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = records.read_json(path)
    except FileNotFoundError:
        return None
    return value
