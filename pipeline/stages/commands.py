"""One function per command: turn the configuration into plain calls and the result into a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cache
from pipeline import clip, data, records
from pipeline.clip import is_clip
from pipeline.config.schema import Config, DemoData, StoreData, load_config, to_dict
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluate import adapt as adapters
from pipeline.evaluate import evaluate as test_set
from pipeline.evaluate import external, operating
from pipeline.evaluate import probe as features_alone
from pipeline.explain import explain as pictures
from pipeline.extract import extract as stage_one
from pipeline.extract.changes import Held
from pipeline.progress import Progress
from pipeline.report import evidence, reproduce
from pipeline.report import export as handing_on
from pipeline.report import report as report_page
from pipeline.stages import clocks
from pipeline.stages.arguments import augmentation, machine, model_options, train_options
from pipeline.stages.at_work import at_work
from pipeline.stages.inputs import class_texts, device, load_dataset, reading, workers
from pipeline.stages.loaded import Shared
from pipeline.stages.prepare import encoder_record, prepare_data, prepare_demo_clip, prepare_encoder
from pipeline.stages.store_check import check_images, check_plan, check_store
from pipeline.train import identity, provenance, run_folder, trained_model
from pipeline.train import train as stage_two
from pipeline.train.gate_spread import flat_gates
from pipeline.url import without_access
from pipeline.weights import download_imagenet

Report = dict[str, Any]

COMMANDS = ("prepare", "extract", "train", "evaluate", "explain", "report")
"""What gives a run and its page, in order."""


def prepare(config: Config, progress: Progress, *, encoder: bool = True) -> Report:
    """Make or fetch what the later stages read: the data set, the encoder's weights if wanted, the backbone's."""
    if is_clip(config.model.backbone) or (encoder and is_clip(config.encoder.name)):
        clip.import_open_clip()  # a missing extra is said now, not after minutes of making images and weights
    if encoder:
        with suppress(CheckpointError):  # of a CLIP that brings its own configuration, which is fetched below
            check_plan(config)
    report = {"data": prepare_data(config, progress)}
    if encoder:
        report["encoder"] = prepare_encoder(config, progress)
        slow = clocks.slow_precision(config.encoder.precision, device(config))
        report["data"]["notes"] = [*report["data"]["notes"], *filter(None, [slow])]
    if config.model.backbone == clip.DEMO and config.model.weights != "none":
        report["backbone"] = prepare_demo_clip(config, Path(config.model.weights), progress)
    elif is_clip(config.model.backbone):
        weights = clip.download(config.model.backbone, config.model.weights, progress=progress)
        report["backbone"] = {"weights": str(weights or "none")}
    elif config.model.weights == "imagenet":
        report["backbone"] = {"weights": str(download_imagenet(config.model.backbone))}
    return report


def extract(
    config: Config,
    progress: Progress,
    *,
    replace: bool = False,
    reuse: Sequence[Path] = (),
    strict: bool = False,
    recheck: bool = False,
    ray: str | None = None,
) -> Report:
    """Stage one: leave a complete store of features at `store.path`; see `inputs.finished` for when it is there.

    Args:
        config: The configuration.
        progress: Called as it goes on.
        replace: Swap out a store made with other settings.
        reuse: Older stores whose rows may be taken.
        strict: Stop at the first bad image.
        recheck: Read every image again.
        ray: Address of the cluster that does the work; None for this process.
    """
    check_plan(config)
    in_a_fold = config.fold is not None  # of which a store, its card and its name know nothing
    dataset, rules = load_dataset(config, only_test=in_a_fold), data.reading_rules(reading(config))
    leads = os.environ.get("RANK", "0") == "0"
    before = Held.by(config.store.path) if leads else Held()
    with at_work(config, progress, strict=strict, ray=ray) as (encoder, on):
        report = stage_one.extract(
            dataset,
            encoder,
            config.store.path,
            reading=rules,
            dtype=config.store.dtype,
            image_px=config.store.image_px,
            shard_mib=config.store.shard_mib,
            batch_size=config.resources.batch_size,
            workers=workers(config),
            reuse=reuse,
            replace=replace,
            strict=strict,
            recheck=recheck,
            provenance={
                "data_set": dataset.name,
                "license": config.store.license,
                "citation": config.store.citation,
                "software": provenance.versions(),
            },
            ranks=stage_one.Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))),
            on=on,
            progress=progress,
        )
    if report.encoded and "total" in report.seconds and leads:
        took: Report = {"encoded": report.encoded, "seconds": report.seconds["total"]}
        took["device"] = report.device if report.nodes else provenance.device_name(report.device)
        records.write_json(evidence.extraction_record(report.store), took)
    return {
        "store": str(report.store),
        "rows": report.rows,
        "encoded": report.encoded,
        "reused": report.reused,
        "changes": before.changes_to(Held.by(report.store)) if leads else {},
        "set_aside": dict(report.set_aside),
        "seconds": dict(report.seconds),
        "advice": report.advice,
        **({"nodes": list(report.nodes)} if report.nodes else {}),
    }


def kept_of_training(config: Config) -> str:
    """What a stopped training has finished, in words, for whoever stopped it."""
    try:
        epochs = len(run_folder.read_history(config.run))
    except (OSError, ValueError):
        epochs = 0
    if not epochs:
        return "no epoch is finished yet; the same command continues with the first"
    return f"{epochs} of {config.train.epochs} epochs are finished and kept; the same command continues from there"


def kept_of_extraction(config: Config) -> str:
    """What a stopped extraction has finished, in words, for whoever stopped it."""
    try:
        found = cache.info(config.store.path)
    except cache.StoreError:
        return "no shard is finished yet; the same command continues with the first"
    if found.complete:
        return "the store is as it was, and the same command continues"
    done = found.shards_done / max(found.shards, 1)
    return (
        f"{found.shards_done} of {found.shards} shards are finished and kept, about {done:.0%} of {found.rows} images; "
        f"the same command continues from there"
    )


def train(config: Config, progress: Progress, *, replace: bool = False, shared: Shared | None = None) -> Report:
    """Stage two: train the classifier of `model` in the folder `run`."""
    model, options, changes = model_options(config), train_options(config), augmentation(config)
    check_images(config, model)
    dataset = load_dataset(config) if shared is None else shared.dataset(config)
    with _features(config, bool(model.taps), shared) as store:
        if store is not None:
            check_store(config, store)
        report = stage_two.train(
            dataset,
            store,
            config.run,
            model=model,
            options=options,
            augmentation=changes,
            machine=machine(config),
            allow_missing=config.train.allow_missing,
            replace=replace,
            holdings=None if shared is None else shared.holdings,
            progress=progress,
        )
    flat = flat_gates(report.metrics)
    return {
        "run": str(report.folder),
        "data": list(report.feeds),
        **report.metrics,
        **({"flat_gates": flat} if flat else {}),
    }


def probe(
    config: Config,
    progress: Progress,
    *,
    folder: Path | None = None,
    taps: Sequence[str] = (),
    replace: bool = False,
    shared: Shared | None = None,
) -> Report:
    """What stored features are worth by themselves; the tap that val chooses becomes a run.

    Args:
        config: The configuration; its `model` plays no part.
        progress: Called as it goes on.
        folder: The run; beside the configured one by default, with `-probe` behind its name.
        taps: Those to look at; all by default, and with a method of CLIP none but its own.
        replace: Start over where the folder holds a run with other settings.
        shared: Data sets and stores that are open already.
    """
    dataset = load_dataset(config) if shared is None else shared.dataset(config)
    with _features(config, True, shared) as store:
        assert store is not None
        check_store(config, store)
        folder = folder or config.run.with_name(f"{config.run.name}-probe")
        fitting = features_alone.Fitting(
            train_options(config), allow_missing=config.train.allow_missing, replace=replace, progress=progress
        )
        method = config.probe.method
        if method == "linear":
            return features_alone.probe(dataset, store, folder, fitting, taps=taps)
        if tuple(taps) not in ((), (adapters.TAP,)):
            message = f"probe.method: {method!r} reads the tap {adapters.TAP!r} alone; leave --tap out"
            raise ConfigError(message)
        return adapters.adapt(dataset, store, folder, fitting, method=method, texts=class_texts(config, dataset))


def evaluate(
    config: Config, progress: Progress, *, points: Sequence[str] = operating.POINTS, shared: Shared | None = None
) -> Report:
    """Read the test set once and leave metrics, predictions and plots in the folder `run`."""
    description = trained_model.load_description(config.run)
    with _features(config, bool(description.model.taps), shared) as store:
        figures = test_set.evaluate(
            config.run,
            load_dataset(config) if shared is None else shared.dataset(config),
            store,
            points=points,
            machine=machine(config),
            allow_missing=config.train.allow_missing,
            holdings=None if shared is None else shared.holdings,
            progress=progress,
        )
    return {"run": str(config.run), **figures}


def evaluate_elsewhere(
    config: Config, progress: Progress, other: Path, *, named: Mapping[str, str], split: data.Split | None = None
) -> Report:
    """Score the run on the data and the store of another configuration, into files of their own.

    Args:
        config: Of the run.
        progress: Called while images are decoded.
        other: The configuration of the external test set, of which `data` and `store` are read.
        named: Which class of the run a class of the external data is, where they differ in name.
        split: Only this split of it; None for all.
    """
    description = trained_model.load_description(config.run)
    theirs = load_config(other)
    dataset = load_dataset(theirs, only_test=split is None)
    with _features(theirs, bool(description.model.taps)) as store:
        figures = external.evaluate_elsewhere(
            config.run,
            other.stem,
            dataset,
            store,
            named=named,
            split=split,
            machine=machine(config),
            allow_missing=theirs.train.allow_missing,
            progress=progress,
        )
    return {"run": str(config.run), "folder": str(config.run / external.FOLDER / other.stem), **figures}


def _features(config: Config, wanted: bool, shared: Shared | None = None) -> AbstractContextManager[cache.Store | None]:
    """The store, if the gates read any of it."""
    if not wanted:
        return nullcontext()
    return cache.open_store(config.store.path) if shared is None else nullcontext(shared.store(config))


def explain(
    config: Config,
    progress: Progress,
    *,
    names: Sequence[str] = (),
    split: data.Split = "test",
    count: int = 6,
    masks: Path | None = None,
) -> Report:
    """Draw where the run looks, and score it where masks are; everything is left in the folder `explain` of `run`."""
    description = trained_model.load_description(config.run)
    with _features(config, bool(description.model.taps)) as store:
        found = pictures.explain(
            config.run,
            load_dataset(config),
            store,
            split=split,
            names=names,
            count=count,
            masks=masks,
            machine=machine(config),
            allow_missing=config.train.allow_missing,
            progress=progress,
        )
    return {"run": str(config.run), "folder": str(config.run / pictures.FOLDER), **found}


def report(
    config: Config,
    progress: Progress,
    *,
    folder: Path | None,
    study: Path | None,
    author: str = "",
    arguments: Sequence[str],
) -> Report:
    """Write the page about a run, the configured one unless another is named, into its folder.

    Args:
        config: What the run was made with; what the run has otherwise is read from the run.
        progress: Called while images are read.
        folder: The run.
        study: Folder of a study to show beside it.
        author: Who answers for the page; nobody is named where it is empty.
        arguments: That named the configuration, for the commands on the page.
    """
    folder = folder or config.run
    settings = identity.recorded_identity(folder)
    points = evidence.read_figures(folder, trained_model.load_description(folder))["operating_points"]
    names = _that_made(settings, folder)
    if isinstance(config.data, StoreData):
        names.pop("extract", None)
    if tuple(points) != operating.POINTS:
        names["evaluate"] = [word for point in points for word in ("--point", point)]
    found = evidence.collect(
        folder,
        load_dataset(config),
        config.store.path,
        study=study,
        generated=isinstance(config.data, DemoData),
        untrained=config.encoder.training.steps == 0,
        encoder_made=encoder_record(config),
        commands=reproduce.commands(names, list(map(without_access, arguments)), to_dict(config), settings, folder),
        signed=evidence.Signature(_today(), author),
        workers=workers(config),
        progress=progress,
    )
    page = report_page.write(folder, found)
    return {"report": str(page), "bytes": page.stat().st_size, "leaks": len(found.leaks), "notes": list(found.notes)}


def _today() -> str:
    """The date, or that of `SOURCE_DATE_EPOCH` for who wants the same bytes tomorrow (reproducible-builds.org)."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    when = datetime.fromtimestamp(int(given), UTC) if given.isdecimal() and len(given) < 12 else datetime.now(UTC)
    return when.date().isoformat()


def _that_made(settings: Report, folder: Path) -> dict[str, list[str]]:
    """The commands that gave a run and its page, in order, each with options of its own."""
    names: dict[str, list[str]] = {name: [] for name in COMMANDS if settings["features"] or name != "extract"}
    if settings["model"]["backbone"] == "none":
        del names["explain"]  # there is no image to explain
    if not reproduce.made_by_probe(settings):
        return names
    taps = [word for tap in settings["train"]["candidates"] for word in ("--tap", tap)]
    own = {"train": ("probe", ["--run", str(folder), *taps])}
    return dict(own.get(name, (name, options)) for name, options in names.items())


def export(config: Config, progress: Progress, folder: Path, target: Path, *, onnx: bool = False) -> Report:
    """Write an evaluated run as a folder to hand on; the configuration tells of its data."""
    dataset = load_dataset(config)
    identity.check_samples(folder, dataset)
    progress("export", 0, 1)
    found = handing_on.export(
        folder,
        target,
        provenance.data_in_numbers(dataset),
        reading=reading(config),
        license_name=config.store.license,
        citation=config.store.citation,
        generated=isinstance(config.data, DemoData),
        untrained=config.encoder.training.steps == 0,
        onnx=onnx,
    )
    progress("export", 1, 1)
    return found
