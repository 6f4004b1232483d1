"""What a configuration says of stage two, as the plain arguments that classifiers and loops take."""

from __future__ import annotations

from typing import Any

from pipeline.clip import is_clip
from pipeline.config.schema import Config, to_dict
from pipeline.model.classifier import ModelOptions
from pipeline.model.clip_backbone import ClipOptions
from pipeline.model.overlay import OverlayOptions
from pipeline.stages.inputs import device, workers
from pipeline.train.augment import Augmentation
from pipeline.train.optimise import TrainOptions
from pipeline.train.train import Machine


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
    """What to build: the backbone, and what it does with taps."""
    model = config.model
    return ModelOptions(
        backbone=model.backbone,
        weights=model.weights,
        image_px=model.image_px,
        gates=tuple((gate.tap, gate.stage) for gate in model.gates),
        fuse=model.fuse,
        overlay=None if model.overlay is None else OverlayOptions(**to_dict(model.overlay)),
        clip=_clip_options(config) if is_clip(model.backbone) else None,
        **to_dict(model.slca),
    )


def _clip_options(config: Config) -> ClipOptions:
    asked = config.model.clip
    return ClipOptions(asked.templates, tuple(asked.words.items()), asked.lora)


def train_options(config: Config) -> TrainOptions:
    """How to train it."""
    values: dict[str, Any] = to_dict(config.train)
    del values["augment"], values["allow_missing"]
    return TrainOptions(**{**values, "milestones": tuple(values["milestones"]), "freeze": tuple(values["freeze"])})


def augmentation(config: Config) -> Augmentation:
    """What its training images go through."""
    values = to_dict(config.train.augment)
    return Augmentation(**{**values, "scale": tuple(values["scale"]), "views": tuple(values["views"])})
