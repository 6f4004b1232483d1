"""What a configuration says, as the plain arguments that encoders, classifiers and loops take."""

from __future__ import annotations

import os
from typing import Any

import torch

from pipeline import encoders
from pipeline.config.schema import Config, to_dict
from pipeline.data import Dataset
from pipeline.encoders.known_mask_recipe import MaskRecipe
from pipeline.errors import ConfigError
from pipeline.extract.known_mask import known_mask
from pipeline.model.classifier import ModelOptions
from pipeline.progress import Progress
from pipeline.stages.inputs import present_checkpoint, recipe
from pipeline.train.augment import Augmentation
from pipeline.train.optimise import TrainOptions
from pipeline.train.train import Machine


def build_encoder(config: Config) -> encoders.Encoder:
    """The frozen encoder that the configuration describes, on its device.

    Raises:
        ConfigError: It is the known mask, which new images do not have.
    """
    if encoders.family_of(config.encoder.name).reads == "mask":
        message = (
            f"encoder.name: {config.encoder.name!r} reads the data set's own masks, so it encodes no other images: "
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


def extraction_encoder(
    config: Config, dataset: Dataset, progress: Progress, *, strict: bool, recheck: bool
) -> encoders.Encoder:
    """The encoder that fills the configured store, which may know the data set's own masks.

    Raises:
        ConfigError: Images are to be stored beside masks, or see `build_encoder`.
    """
    asked = recipe(config)
    if not isinstance(asked, MaskRecipe):
        return build_encoder(config)
    if config.store.image_px is not None:
        message = (
            f"store.image_px: the encoder {config.encoder.name!r} stores no images; "
            f"set it to null (--set store.image_px=null)"
        )
        raise ConfigError(message)
    threads = workers(config)
    return known_mask(
        dataset, config.store.path, asked, workers=threads, strict=strict, recheck=recheck, progress=progress
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


def machine(config: Config) -> Machine:
    """What stage two computes on."""
    return Machine(
        device=device(config),
        place=config.resources.features,
        workers=workers(config),
        channels_last=config.resources.channels_last,
        compiled=config.resources.compile,
        tensorboard=config.resources.tensorboard,
    )


def model_options(config: Config) -> ModelOptions:
    """What to build: the backbone, and its gates."""
    model = config.model
    return ModelOptions(
        backbone=model.backbone,
        weights=model.weights,
        image_px=model.image_px,
        gates=tuple((gate.tap, gate.stage) for gate in model.gates),
        **to_dict(model.slca),
    )


def train_options(config: Config) -> TrainOptions:
    """How to train it."""
    values: dict[str, Any] = to_dict(config.train)
    del values["augment"], values["allow_missing"]
    return TrainOptions(**{**values, "milestones": tuple(values["milestones"]), "freeze": tuple(values["freeze"])})


def augmentation(config: Config) -> Augmentation:
    """What its training images go through."""
    values = to_dict(config.train.augment)
    return Augmentation(**{**values, "scale": tuple(values["scale"]), "views": tuple(values["views"])})
