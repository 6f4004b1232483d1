"""How weights move: optimiser, learning rate as a function of the step, running average of weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.model.classifier import Classifier
from pipeline.model.tasks import Loss


@dataclass(frozen=True)
class TrainOptions:
    """How to train; every field changes the result.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Samples a step, over all processes; a last batch of one sample joins the batch before it.
        optimiser: `"adamw"`, `"adam"` or `"sgd"` (with Nesterov momentum 0.9).
        lr: Peak learning rate.
        gate_lr: What the learning rate is multiplied by for the gates, which are few and start from nothing: at the
            backbone's own rate they hardly move. Ours.
        weight_decay: On matrices and kernels, the gates' too; biases and norms are left free.
        schedule: `"cosine"` to zero, `"step"` times `gamma` at each milestone, `"poly"` with power 0.9, `"constant"`.
        warmup_epochs: Epochs over which the learning rate rises from zero; may be a fraction.
        milestones: Epochs of the step schedule.
        gamma: Factor of the step schedule.
        clip_norm: Largest norm of the gradient; 0 clips nothing.
        label_smoothing: Share of the target spread over all classes.
        loss: `"auto"`, or `"cross_entropy"` to train ordered grades as plain classes.
        class_weights: `"balanced"` weighs a class by how rare it is.
        sampling: `"shuffle"`, or `"balanced"` to draw classes equally often, with replacement.
        patience: Epochs without a better val AUC after which to stop; 0 never stops.
        ema_decay: Decay per step of a running average of the weights, which is then scored and kept; 0 for none.
        freeze: Parts of the backbone that stay as they start, `"stem"` to `"stage4"`; `"backbone"` names all of them.
        precision: `"auto"` is bfloat16 or float16 on a GPU that has it and float32 elsewhere.
        seed: Of weights, order, augmentation, dropout, and the choice of `fraction` and `shots`.
        fraction: Share of the training split to train on, in (0, 1]: class by class, whole groups, and of one seed a
            smaller share within each larger one (see `pipeline.data.splits.stratified_part`).
        shots: Images of each class to train on instead of a share, nested alike (see `pipeline.data.splits.few_shots`);
            None takes the share.
        alignment: Share 1 - lambda of the image-text contrast in the objective lambda L_classification + (1 - lambda)
            L_alignment (see `pipeline.model.tasks.alignment_losses`), which only CLIP has. None is .5 for CLIP, as
            MedFocusCLIP's lambda likely is, and 0 for others.
        text_lr: What the learning rate is multiplied by for CLIP's text tower; 0 leaves it as it starts, and its
            embeddings of the classes are computed once. That this is the default is ours.
    """

    epochs: int = 100
    batch_size: int = 32
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-4
    gate_lr: float = 10.0
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step", "poly", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    loss: Loss = "auto"
    class_weights: Literal["none", "balanced"] = "none"
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    patience: int = 0
    ema_decay: float = 0.0
    freeze: tuple[str, ...] = field(default=())
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    fraction: float = 1.0
    shots: int | None = None
    alignment: float | None = None
    text_lr: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                msg = f"train's {name} is {getattr(self, name)!r}: give a whole number of at least 1."
                raise ConfigError(msg)
        if self.seed < 0:
            msg = f"train's seed is {self.seed!r}: give a whole number of at least 0."
            raise ConfigError(msg)
        if not self.lr > 0:
            msg = f"train's lr is {self.lr!r}: give a learning rate above 0."
            raise ConfigError(msg)
        if not self.gate_lr > 0:
            msg = f"train's gate_lr is {self.gate_lr!r}: give what lr is multiplied by for the gates, above 0."
            raise ConfigError(msg)
        if not 0 < self.fraction <= 1:
            msg = f"train's fraction is {self.fraction!r}: give a share of the training split above 0 and at most 1."
            raise ConfigError(msg)
        if self.shots is not None and (self.shots < 1 or self.fraction < 1):
            msg = (
                f"train's shots are {self.shots!r} and its fraction is {self.fraction!r}: give a number of images of "
                f"each class, or a share of all, and not both."
            )
            raise ConfigError(msg)
        if self.text_lr < 0:
            msg = f"train's text_lr is {self.text_lr!r}: give what lr is multiplied by for CLIP's text tower, or 0."
            raise ConfigError(msg)
        if self.alignment is not None and not 0 <= self.alignment <= 1:
            msg = f"train's alignment is {self.alignment!r}: give its share of the objective, from 0 to 1."
            raise ConfigError(msg)
        for name in ("label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                msg = f"train's {name} is {getattr(self, name)!r}: give a number from 0 to below 1."
                raise ConfigError(msg)


def learning_rate(options: TrainOptions, step: int, steps_per_epoch: int) -> float:
    """Compute the learning rate of a step, counted from zero over the whole training.

    A pure function of the step, so that continuing a run needs no state of a scheduler.
    """
    epoch = step / steps_per_epoch
    if epoch < options.warmup_epochs:
        return options.lr * (step + 1) / math.ceil(options.warmup_epochs * steps_per_epoch)
    if options.schedule == "constant":
        return options.lr
    if options.schedule == "step":
        passed = sum(epoch >= milestone for milestone in options.milestones)
        return options.lr * math.pow(options.gamma, passed)
    done = (epoch - options.warmup_epochs) / max(options.epochs - options.warmup_epochs, 1 / steps_per_epoch)
    if options.schedule == "poly":
        return options.lr * math.pow(1 - done, 0.9)
    return options.lr * (1 + math.cos(math.pi * done)) / 2


def build_optimiser(options: TrainOptions, classifier: Classifier) -> torch.optim.Optimizer:
    """Build the optimiser over the parameters that train, with decay on those of two dimensions and more.

    Each of its groups has a `times`, by which `set_learning_rate` multiplies.
    """
    of_gates = {id(parameter) for parameter in classifier.gates.parameters()}
    of_text = {id(parameter) for parameter in classifier.backbone.text_parameters()}
    of_rest = {id(parameter) for parameter in classifier.parameters()} - of_gates - of_text
    groups: list[dict[str, Any]] = []
    for times, these in ((1.0, of_rest), (options.gate_lr, of_gates), (options.text_lr, of_text)):
        training = [p for p in classifier.parameters() if p.requires_grad and id(p) in these]
        for decay, matrices in ((options.weight_decay, True), (0.0, False)):
            chosen = [p for p in training if (p.ndim > 1) == matrices]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "times": times})
    if options.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if options.optimiser == "adamw" else torch.optim.Adam
    return kind(groups, lr=options.lr, fused=True)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Let an optimiser of `build_optimiser` take its next steps at a rate, gates and text at their multiple of it."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["times"]


class Average:
    """An exponential running average of a model's weights; its buffers (batch norm) are the latest.

    Early on the decay is (1 + step) / (10 + step), as in TensorFlow, so that the random start is soon forgotten.
    """

    def __init__(self, classifier: Classifier, decay: float) -> None:
        self.classifier = copy.deepcopy(classifier).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, classifier: Classifier, step: int) -> None:
        """Move towards the weights after `step`, counted from zero."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = list(self.classifier.parameters())
        torch._foreach_lerp_(ours, list(classifier.parameters()), 1 - decay)
        for mine, theirs in zip(self.classifier.buffers(), classifier.buffers(), strict=True):
            mine.copy_(theirs)
