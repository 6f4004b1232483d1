"""One function per command: turn the configuration into plain calls and the result into a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import cache
from pipeline import data, encoders
from pipeline import extract as stage_one
from pipeline.config import Config, CsvData, DemoData, FolderData, MedMnistData, SplitRule, to_dict
from pipeline.errors import ConfigError, DataError
from pipeline.progress import Progress

Report = dict[str, Any]


def prepare(config: Config, progress: Progress) -> Report:
    """Make or fetch what the later stages read: the data set, then the encoder's weights."""
    report: Report = {"data": _prepare_data(config, progress)}
    report["encoder"] = _prepare_encoder(config, progress)
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
    """Stage one: leave a complete store of features at `store.path`."""
    dataset = load_dataset(config)
    encoder = build_encoder(config)
    report = stage_one.extract(
        dataset,
        encoder,
        config.store.path,
        reading=data.reading_rules(),
        dtype=config.store.dtype,
        shard_mib=config.store.shard_mib,
        batch_size=config.resources.batch_size or 8,
        workers=workers(config),
        reuse=reuse,
        replace=replace,
        strict=strict,
        recheck=recheck,
        provenance={"data": dataset.name, "software": versions()},
        progress=progress,
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


def load_dataset(config: Config) -> data.Dataset:
    """The data set that the configuration describes."""
    match config.data:
        case DemoData(path=path):
            return data.load_demo(path)
        case MedMnistData(path=path):
            return data.load_medmnist(path)
        case FolderData(path=path, group_pattern=pattern, split=split):
            return data.load_folder(path, group_pattern=pattern, **_split(split))
        case CsvData() as table:
            return data.load_csv(
                table.path,
                root=table.images,
                path_column=table.path_column,
                label_column=table.label_column,
                label_columns=table.label_columns,
                rest_class=table.rest_class,
                split_column=table.split_column,
                group_column=table.group_column,
                suffix=table.suffix,
                **_split(table.split),
            )


def build_encoder(config: Config) -> encoders.Encoder:
    """The frozen encoder that the configuration describes, on its device."""
    return encoders.build_encoder(
        config.encoder.name,
        checkpoint=config.encoder.checkpoint,
        taps=config.encoder.taps,
        input_px=config.encoder.input_px,
        pool=config.encoder.pool,
        precision=config.encoder.precision,
        device=device(config),
    )


def device(config: Config) -> str:
    """Where to compute: the configured device, or the best that this machine has.

    Raises:
        ConfigError: The configured device is not there.
    """
    wanted = config.resources.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
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


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    names = ("slca-pipeline", "torch", "torchvision", "numpy", "pillow", "segment-anything")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def train(config: Config, progress: Progress, *, replace: bool = False) -> Report:
    """Stage two: train the classifier of `model` in the folder `run`."""
    model, options, augmentation = _model_options(config), _train_options(config), _augmentation(config)
    dataset = load_dataset(config)
    with _features(config, model) as store:
        report = stage_two.train(
            dataset,
            store,
            config.run,
            model=model,
            options=options,
            augmentation=augmentation,
            device=device(config),
            place=config.resources.features,
            workers=workers(config),
            channels_last=config.resources.channels_last,
            compiled=config.resources.compile,
            allow_missing=config.train.allow_missing,
            replace=replace,
            progress=progress,
        )
    return {
        "run": str(report.folder),
        "best_epoch": report.best_epoch,
        "val": report.metrics,
        "data": list(report.feeds),
    }


def _features(config: Config, model: ModelOptions) -> AbstractContextManager[cache.Store | None]:
    """The store, if the gates read any of it."""
    return cache.open_store(config.store.path) if model.taps else nullcontext()


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
    values = to_dict(config.train)
    del values["augment"], values["allow_missing"]
    return TrainOptions(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _augmentation(config: Config) -> Augmentation:
    values = to_dict(config.train.augment)
    return Augmentation(**{**values, "scale": tuple(values["scale"])})


def _split(rule: SplitRule) -> dict[str, Any]:
    return {"fractions": {"val": rule.val, "test": rule.test}, "seed": rule.seed}
