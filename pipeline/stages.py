"""One function per command: turn the configuration into plain calls and the result into a report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

import cache
from pipeline import data, encoders, evidence, oracle, provenance, reproduce, run
from pipeline import evaluate as test_set
from pipeline import explain as pictures
from pipeline import export as handing_on
from pipeline import extract as stage_one
from pipeline import predict as on_the_fly
from pipeline import report as report_page
from pipeline import train as stage_two
from pipeline.augment import Augmentation
from pipeline.classifier import ModelOptions
from pipeline.config import Config, DemoData, MedMnistData, to_dict
from pipeline.encoders.recipe import ARITHMETIC
from pipeline.errors import CheckpointError, ConfigError
from pipeline.holdings import Holdings
from pipeline.inputs import checkpoint, load_dataset, present_checkpoint, reading
from pipeline.optimise import TrainOptions
from pipeline.progress import Progress
from pipeline.unchanged import fingerprint
from pipeline.weights import download_imagenet

Report = dict[str, Any]


def prepare(config: Config, progress: Progress, *, encoder: bool = True) -> Report:
    """Make or fetch what the later stages read: the data set, the encoder's weights if wanted, the backbone's."""
    report = {"data": _prepare_data(config, progress)}
    if encoder:
        report["encoder"] = _prepare_encoder(config, progress)
    if config.model.weights == "imagenet":
        report["backbone"] = {"weights": str(download_imagenet(config.model.backbone))}
    return report


def _prepare_data(config: Config, progress: Progress) -> Report:
    match config.data:
        case DemoData() as demo:
            data.generate_demo(demo.path, count=demo.count, size_px=demo.size_px, seed=demo.seed, progress=progress)
        case MedMnistData() as archive if not archive.path.exists():
            fetched = data.fetch_medmnist(archive.name, archive.size_px, archive.path.parent, progress=progress)
            if fetched != archive.path:
                message = (
                    f"data.path is {str(archive.path)!r}; the official archive is now at {str(fetched)!r}: name it"
                )
                raise ConfigError(message)
        case _:
            pass  # the person's own files: loading them below is the check
    dataset = load_dataset(config)
    return {
        "path": str(config.data.path),
        "classes": list(dataset.class_names),
        **{split: len(dataset.indices(split)) for split in get_args(data.Split)},
    }


def _prepare_encoder(config: Config, progress: Progress) -> Report:
    if config.encoder.name == oracle.NAME:
        return {}  # the masks come with the data
    if config.encoder.training.steps == 0:
        return _prepare_untrained_encoder(config)
    if config.encoder.name == "sam_demo":
        return _prepare_demo_encoder(config, progress)
    published = str(config.encoder.checkpoint)
    path = (
        encoders.fetch_checkpoint(published, progress=progress)
        if published in encoders.PUBLISHED
        else checkpoint(config)
    )
    if not path.is_file():
        message = (
            f"encoder.checkpoint: there is no {str(path)!r}; put a checkpoint of {config.encoder.name} there, "
            f"or name a published one: {', '.join(encoders.PUBLISHED)}"
        )
        raise CheckpointError(message)
    return {"checkpoint": str(path), "sha256": encoders.weights_sha256(path)}


def _prepare_untrained_encoder(config: Config) -> Report:
    """Draw the encoder's weights from the seed, unless these very ones are there."""
    path, seed = config.encoder.checkpoint, config.encoder.training.seed
    record = path.with_suffix(".json")
    settings = {"encoder": config.encoder.name, "steps": 0, "seed": seed, "torch": torch.__version__}
    if path.is_file():
        known: Report = json.loads(record.read_text()) if record.is_file() else {}
        if known.get("settings") == settings and known["sha256"] == encoders.weights_sha256(path):
            return known
        if not known:
            message = f"{path}: holds weights that are not ours, and encoder.training.steps is 0: name another file"
            raise CheckpointError(message)
    parameters = encoders.write_untrained_encoder(config.encoder.name, path, seed=seed)
    report = {
        "checkpoint": str(path),
        "sha256": encoders.weights_sha256(path),
        "parameters": parameters,
        "settings": settings,
    }
    run.write_json(record, report)
    return report


def _prepare_demo_encoder(config: Config, progress: Progress) -> Report:
    """Train the miniature SAM on images of another seed than the data set's, unless this very one is there."""
    wanted = config.encoder.training
    path = config.encoder.checkpoint
    record = path.with_suffix(".json")
    settings = {**to_dict(wanted), "arithmetic": ARITHMETIC, "torch": torch.__version__}
    if path.is_file() and record.is_file():
        known: Report = json.loads(record.read_text())
        if known["settings"] == settings and known["sha256"] == encoders.weights_sha256(path):
            return known
    images, masks, _ = data.demo_arrays(wanted.images, 128, seed=wanted.seed)
    held_out_images, held_out_masks, _ = data.demo_arrays(64, 128, seed=wanted.seed + 1000)
    trained = encoders.train_demo_encoder(
        images,
        masks,
        held_out_images,
        held_out_masks,
        path,
        seed=wanted.seed,
        steps=wanted.steps,
        progress=progress,
    )
    report = {
        "checkpoint": str(path),
        "sha256": encoders.weights_sha256(path),
        **asdict(trained),
        "settings": settings,
    }
    run.write_json(record, report)
    return report


def extract(
    config: Config,
    progress: Progress,
    *,
    replace: bool = False,
    reuse: Sequence[Path] = (),
    strict: bool = False,
    recheck: bool = False,
) -> Report:
    """Stage one: leave a complete store of features at `store.path`; see `inputs.finished` for when it is there."""
    dataset = load_dataset(config)
    making: dict[str, Any] = {
        "reading": data.reading_rules(reading(config)),
        "dtype": config.store.dtype,
        "shard_mib": config.store.shard_mib,
        "workers": workers(config),
        "replace": replace,
        "strict": strict,
        "recheck": recheck,
        "provenance": {
            "data_set": dataset.name,
            "license": config.store.license,
            "citation": config.store.citation,
            "software": provenance.versions(),
        },
        "progress": progress,
    }
    if config.encoder.name == oracle.NAME:
        grid = oracle.grid_cells(config.encoder.taps, config.encoder.input_px, config.encoder.pool)
        if config.store.image_px is not None:
            message = (
                f"store.image_px: the encoder {oracle.NAME!r} stores no images; "
                f"set it to null (--set store.image_px=null)"
            )
            raise ConfigError(message)
        report = oracle.extract_masks(dataset, config.store.path, grid=grid, **making)
    else:
        report = stage_one.extract(
            dataset,
            build_encoder(config),
            config.store.path,
            image_px=config.store.image_px,
            batch_size=config.resources.batch_size,
            reuse=reuse,
            ranks=stage_one.Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))),
            **making,
        )
    if report.encoded and "total" in report.seconds and os.environ.get("RANK", "0") == "0":
        took = {"encoded": report.encoded, "seconds": report.seconds["total"]}
        run.write_json(
            evidence.extraction_record(report.store), {**took, "device": provenance.device_name(device(config))}
        )
    return {
        "store": str(report.store),
        "rows": report.rows,
        "encoded": report.encoded,
        "reused": report.reused,
        "set_aside": dict(report.set_aside),
        "seconds": dict(report.seconds),
        "advice": report.advice,
    }


def build_encoder(config: Config) -> encoders.Encoder:
    """The frozen encoder that the configuration describes, on its device.

    Raises:
        ConfigError: It is the known mask, which new images do not have.
    """
    if config.encoder.name == oracle.NAME:
        message = (
            f"encoder.name: {oracle.NAME!r} reads the data set's own masks, so it encodes no other images: "
            f"only extract, train, evaluate and study take it; choose another encoder here"
        )
        raise ConfigError(message)
    return encoders.build_encoder(
        config.encoder.name,
        checkpoint=present_checkpoint(config),
        taps=config.encoder.taps,
        input_px=config.encoder.input_px,
        pool=config.encoder.pool,
        precision=config.encoder.precision,
        preprocessing=config.encoder.preprocessing,
        device=device(config),
    )


def device(config: Config) -> str:
    """Where to compute: the configured device, or the best that this machine has.

    Raises:
        ConfigError: The configured device is not there.
    """
    wanted = config.resources.device
    if wanted == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        message = f"resources.device: {wanted!r} cannot be used here ({first_line}); try 'auto' or 'cpu'"
        raise ConfigError(message) from None
    return wanted


def workers(config: Config) -> int:
    """Decoding threads: as configured, else one per processor this process may use, at most 16."""
    return config.resources.workers or min(len(os.sched_getaffinity(0)), 16)


def train(config: Config, progress: Progress, *, replace: bool = False, shared: Shared | None = None) -> Report:
    """Stage two: train the classifier of `model` in the folder `run`."""
    model, options, augmentation = _model_options(config), _train_options(config), _augmentation(config)
    dataset = load_dataset(config) if shared is None else shared.dataset(config)
    with _features(config, bool(model.taps), shared) as store:
        report = stage_two.train(
            dataset,
            store,
            config.run,
            model=model,
            options=options,
            augmentation=augmentation,
            machine=_machine(config),
            allow_missing=config.train.allow_missing,
            replace=replace,
            holdings=None if shared is None else shared.holdings,
            progress=progress,
        )
    return {"run": str(report.folder), "data": list(report.feeds), **report.metrics}


def evaluate(config: Config, progress: Progress, *, shared: Shared | None = None) -> Report:
    """Read the test set once and leave metrics, predictions and plots in the folder `run`."""
    description = run.load_description(config.run)
    with _features(config, bool(description.model.taps), shared) as store:
        figures = test_set.evaluate(
            config.run,
            load_dataset(config) if shared is None else shared.dataset(config),
            store,
            machine=_machine(config),
            allow_missing=config.train.allow_missing,
            holdings=None if shared is None else shared.holdings,
            progress=progress,
        )
    return {"run": str(config.run), **figures}


def predict(config: Config, progress: Progress, paths: Sequence[Path]) -> Report:
    """Class probabilities of image files; features are made on the fly, as stage one would have."""
    description = run.load_description(config.run)
    encoder = identity = None
    if description.model.taps:
        encoder = build_encoder(config)
        identity = fingerprint(encoder.fingerprint(), data.reading_rules(reading(config)), config.store.dtype)
    probabilities = on_the_fly.predict(
        config.run,
        (data.read_image(path, reading(config)) for path in paths),
        encoder=encoder,
        fingerprint=identity,
        device=device(config),
    )
    predictions = _predictions(paths, probabilities, description.class_names, progress)
    return {"run": str(config.run), "predictions": predictions}


def _predictions(
    paths: Sequence[Path], probabilities: Iterable[Any], class_names: Sequence[str], progress: Progress
) -> list[Report]:
    """One report per image."""
    predictions = []
    for done, (path, row) in enumerate(zip(paths, probabilities, strict=True), start=1):
        progress("predict", done, len(paths))
        predictions.append(
            {
                "image": str(path),
                "predicted": class_names[int(row.argmax())],
                "probabilities": dict(zip(class_names, row.tolist(), strict=True)),
            }
        )
    return predictions


class Shared:
    """Data sets and stores that many runs in one process read, and what was loaded of them."""

    def __init__(self) -> None:
        self.holdings = Holdings()
        self._datasets: dict[str, data.Dataset] = {}
        self._stores: dict[Path, cache.Store] = {}

    def dataset(self, config: Config) -> data.Dataset:
        """The data set of a configuration, loaded once."""
        key = config.data.model_dump_json()
        if key not in self._datasets:
            self._datasets[key] = load_dataset(config)
        return self._datasets[key]

    def store(self, config: Config) -> cache.Store:
        """The store of a configuration, opened once."""
        path = config.store.path
        if path not in self._stores:
            self._stores[path] = cache.open_store(path)
        return self._stores[path]

    def close(self) -> None:
        """Close the stores."""
        for store in self._stores.values():
            store.close()


def _features(config: Config, wanted: bool, shared: Shared | None = None) -> AbstractContextManager[cache.Store | None]:
    """The store, if the gates read any of it."""
    if not wanted:
        return nullcontext()
    return cache.open_store(config.store.path) if shared is None else nullcontext(shared.store(config))


def _machine(config: Config) -> stage_two.Machine:
    return stage_two.Machine(
        device=device(config),
        place=config.resources.features,
        workers=workers(config),
        channels_last=config.resources.channels_last,
        compiled=config.resources.compile,
        tensorboard=config.resources.tensorboard,
    )


def _model_options(config: Config) -> ModelOptions:
    model = config.model
    return ModelOptions(
        backbone=model.backbone,
        weights=model.weights,
        image_px=model.image_px,
        gates=tuple((gate.tap, gate.stage) for gate in model.gates),
        **to_dict(model.slca),
    )


def _train_options(config: Config) -> TrainOptions:
    values: dict[str, Any] = to_dict(config.train)
    del values["augment"], values["allow_missing"]
    return TrainOptions(**{**values, "milestones": tuple(values["milestones"]), "freeze": tuple(values["freeze"])})


def _augmentation(config: Config) -> Augmentation:
    values = to_dict(config.train.augment)
    return Augmentation(**{**values, "scale": tuple(values["scale"]), "views": tuple(values["views"])})


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
    description = run.load_description(config.run)
    with _features(config, bool(description.model.taps)) as store:
        found = pictures.explain(
            config.run,
            load_dataset(config),
            store,
            split=split,
            names=names,
            count=count,
            masks=masks,
            machine=_machine(config),
            allow_missing=config.train.allow_missing,
            progress=progress,
        )
    return {"run": str(config.run), "folder": str(config.run / pictures.FOLDER), **found}


def report(
    config: Config, progress: Progress, *, folder: Path | None, study: Path | None, arguments: Sequence[str]
) -> Report:
    """Write the page about a run, the configured one unless another is named, into its folder.

    Args:
        config: What the run was made with; what the run has otherwise is read from the run.
        progress: Called while images are read.
        folder: The run.
        study: Folder of a study to show beside it.
        arguments: That named the configuration, for the commands on the page.
    """
    folder = folder or config.run
    settings = evidence.settings_of(folder)
    names = ["prepare", *(["extract"] if settings["features"] else []), "train", "evaluate", "explain", "report"]
    found = evidence.collect(
        folder,
        load_dataset(config),
        config.store.path,
        study=study,
        generated=isinstance(config.data, DemoData),
        untrained=config.encoder.training.steps == 0,
        commands=reproduce.commands(names, arguments, to_dict(config), settings, folder),
        workers=workers(config),
        progress=progress,
    )
    page = report_page.write(folder, found)
    return {"report": str(page), "bytes": page.stat().st_size, "leaks": len(found.leaks), "notes": list(found.notes)}


def export(config: Config, progress: Progress, folder: Path, target: Path, *, onnx: bool = False) -> Report:
    """Write an evaluated run as a folder to hand on; the configuration tells of its data."""
    dataset = load_dataset(config)
    evidence.check_samples(folder, dataset)
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


def predict_exported(progress: Progress, folder: Path, checkpoint: Path | None, paths: Sequence[Path]) -> Report:
    """Class probabilities of image files by a model that was handed on; needs no configuration."""
    model = handing_on.load_export(folder, checkpoint=checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    return {"model": str(folder), "predictions": _predictions(paths, model.predict(paths), model.class_names, progress)}
