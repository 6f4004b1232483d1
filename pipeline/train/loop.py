"""One epoch of training: the inner loop, with nothing of files and folders."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.clip import is_clip
from pipeline.errors import ConfigError, RunError
from pipeline.model.backbones import STAGES
from pipeline.model.classifier import Classifier
from pipeline.model.tasks import Head, alignment_losses, balancing_weights, losses
from pipeline.model.uses import Seen
from pipeline.progress import Progress
from pipeline.train.augment import Augmentation, DrawnViews, draw_views
from pipeline.train.feeding.feed import Batch, Feed
from pipeline.train.forward import amp_dtype, autocast
from pipeline.train.optimise import Average, TrainOptions, build_optimiser, learning_rate, set_learning_rate
from pipeline.train.parallel import Team


@dataclass(frozen=True)
class _Draws:
    """Sources of an epoch's random numbers: affine maps, drawn alike by the whole team, and light, by each alone."""

    place: torch.Generator
    light: torch.Generator


class Loop:
    """A classifier in training.

    Args:
        classifier: On its device; changed in place.
        head: What its outputs mean.
        feed: The training samples.
        options: How to train.
        augmentation: What images and gates go through.
        team: The processes that share the work; None for this one alone.
        channels_last: Lay images out as (B, H, W, C).
        compiled: Use `torch.compile`.

    Attributes:
        classifier: The classifier in training.
        step: Steps taken.
    """

    def __init__(
        self,
        classifier: Classifier,
        head: Head,
        feed: Feed,
        options: TrainOptions,
        augmentation: Augmentation,
        *,
        team: Team | None = None,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        self.team = team or Team()
        self.classifier, self.head, self.feed, self.step = classifier, head, feed, 0
        check_sampling(options, head)
        self._options, self._augmentation = options, augmentation
        self._frozen = _freeze(classifier, options.freeze)
        self._alignment = share_of_alignment(options, classifier.options.backbone)
        if channels_last:
            classifier.to(memory_format=torch.channels_last)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        shared = self.team.wrap(classifier, feed.device)
        self._forward: nn.Module = torch.compile(shared) if compiled else shared  # type: ignore[assignment]
        self._optimiser = build_optimiser(options, classifier)
        self._average = Average(classifier, options.ema_decay) if options.ema_decay else None
        self._scaler = torch.amp.GradScaler(
            feed.device.type, enabled=amp_dtype(options.precision, feed.device) == torch.float16
        )
        weights = balancing_weights(head, feed.labels, feed.classes)
        self._class_weights = torch.from_numpy(weights).to(feed.device) if options.class_weights == "balanced" else None
        self.steps_per_epoch = len(self._batches(torch.arange(len(feed))))

    @property
    def best_guess(self) -> Classifier:
        """The classifier to score and keep: the running average of the weights if there is one."""
        return self.classifier if self._average is None else self._average.classifier

    def run_epoch(self, epoch: int, progress: Progress) -> dict[str, float]:
        """Train for one epoch, counted from zero.

        Returns:
            `lr` of its last step, mean `train_loss`, `seconds`, and `wait_share`: the part of them spent on data.

        Raises:
            RunError: The loss is not finite.
        """
        device, total = self.feed.device, self._options.epochs * self.steps_per_epoch
        torch.manual_seed(self._seed(epoch, f"dropout of rank {self.team.rank}"))
        draws = _Draws(
            place=torch.Generator(device).manual_seed(self._seed(epoch, "place")),
            light=torch.Generator(device).manual_seed(self._seed(epoch, f"light of rank {self.team.rank}")),
        )
        whole = self._batches(self._order(epoch))
        order = [positions[self.team.share(positions)] for positions in whole]
        self._set_training()
        started, waited = time.perf_counter(), self.feed.waited_seconds
        sum_of_losses, previous = torch.zeros((), device=device), None
        for batch, positions in zip(self.feed.batches(order), whole, strict=True):
            loss = self._take_step(batch, positions, draws)
            sum_of_losses += loss.sum()
            if previous is not None:  # one step late: the device is not kept waiting for the number
                progress("train", previous[0], total, epoch=epoch + 1, loss=self._checked(*previous))
            previous = (self.step, loss, batch)
        if previous is not None:
            progress("train", previous[0], total, epoch=epoch + 1, loss=self._checked(*previous))
        seconds = time.perf_counter() - started
        return {
            "lr": learning_rate(self._options, self.step - 1, self.steps_per_epoch),
            "train_loss": sum(self.team.gather(sum_of_losses.item())) / sum(len(positions) for positions in whole),
            "seconds": seconds,
            "wait_share": (self.feed.waited_seconds - waited) / seconds,
        }

    def state(self) -> dict[str, Any]:
        """Give everything that continuing needs, as tensors and plain values."""
        return {
            "step": self.step,
            "classifier": self.classifier.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.classifier.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.step = state["step"]
        self.classifier.load_state_dict(state["classifier"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.classifier.load_state_dict(state["average"])

    def _take_step(self, batch: Batch, whole: Tensor, draws: _Draws) -> Tensor:
        """Learn from this process's part of a batch; returns the loss of each of its samples, (B,)."""
        options, augmentation = self._options, self._augmentation
        set_learning_rate(self._optimiser, learning_rate(options, self.step, self.steps_per_epoch))
        affine, views = self._draw(whole, draws)
        features, extents, on_image = batch.features, batch.extents, affine
        if views is not None:
            features, extents = views.features(features, self.classifier.options.feature_taps), views.extents(extents)
            on_image = views.on_image(affine)
        images = batch.images
        if images is not None:
            relight = partial(augmentation.relight, generator=draws.light)
            images = self.classifier.see(images, Seen(batch.features, batch.extents, on_image), relight)
            images = images.contiguous(memory_format=self._layout)
        try:
            with autocast(options.precision, self.feed.device):
                logits = self._forward(images, features, extents, affine)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            msg = (
                f"Batch norm needs more than one number of each channel, and a batch of {len(batch.labels)} at "
                f"{self.classifier.options.image_px} px leaves one: set train.batch_size to 2 or more, or enlarge "
                f"model.image_px."
            )
            raise ConfigError(msg) from error
        loss = losses(
            self.head, logits, batch.labels, class_weights=self._class_weights, smoothing=options.label_smoothing
        )
        if self._alignment:  # of this process's part of the batch
            loss = (1 - self._alignment) * loss + self._alignment * alignment_losses(logits, batch.labels)
        self._optimiser.zero_grad(set_to_none=True)
        mean = loss.sum() * self.team.size / len(whole)  # what the team's mean makes the mean over the whole batch
        self._scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
        if options.clip_norm:
            self._scaler.unscale_(self._optimiser)
            nn.utils.clip_grad_norm_(self.classifier.parameters(), options.clip_norm)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._average is not None:
            self._average.update(self.classifier, self.step)
        self.step += 1
        return loss.detach()

    def _draw(self, whole: Tensor, draws: _Draws) -> tuple[Tensor | None, DrawnViews | None]:
        """Draw for the whole batch, so that a team draws as one process would, and keep this process's share."""
        mine, augmentation = self.team.share(whole), self._augmentation
        affine = augmentation.draw_affine(len(whole), draws.place)
        if affine is not None:
            affine = affine[mine]
        if not augmentation.views:
            return affine, None
        drawn = draw_views(augmentation.views, len(whole), draws.place)
        return affine, DrawnViews(drawn.views, drawn.chosen[mine])

    def _checked(self, step: int, loss: Tensor, batch: Batch) -> float:
        """Return the mean loss of a step's batch if it is finite."""
        mean = loss.mean().item()
        if math.isfinite(mean):
            return mean
        bad = batch.positions[~loss.isfinite().cpu()].tolist()
        names = ", ".join(repr(self.feed.ids[position]) for position in bad[:5])
        broken = [tap for tap, feature in batch.features.items() if not feature.isfinite().all()]
        if broken:
            cause = f"the stored features of tap {broken[0]!r} are not finite: extract them again"
        elif amp_dtype(self._options.precision, self.feed.device) is not None:
            cause = "numbers too large for the reduced precision: set precision to 'float32', or lower lr"
        else:
            cause = f"a learning rate of {self._options.lr:g} that is too high: lower lr, or set clip_norm"
        msg = (
            f"The loss is {mean} at step {step} on {len(bad)} of {len(loss)} samples ({names}"
            f"{', ...' if len(bad) > 5 else ''}). Likely cause: {cause}. The checkpoint of the last whole epoch stays."
        )
        raise RunError(msg)

    def _order(self, epoch: int) -> Tensor:
        """Draw the epoch's samples: each once, or as many with classes equally likely."""
        generator = torch.Generator().manual_seed(self._seed(epoch, "order"))
        if self._options.sampling == "shuffle":
            return torch.randperm(len(self.feed), generator=generator)
        weights = balancing_weights(self.head, self.feed.labels, self.feed.classes)[self.feed.labels]
        return torch.multinomial(torch.from_numpy(weights), len(self.feed), replacement=True, generator=generator)

    def _batches(self, order: Tensor) -> list[Tensor]:
        return batches_of(order, self._options.batch_size, smallest=max(2, self.team.size))

    def _seed(self, epoch: int, purpose: str) -> int:
        """Give each epoch and purpose numbers of their own."""
        return int(np.random.SeedSequence([self._options.seed, epoch, *purpose.encode()]).generate_state(1)[0])

    def _set_training(self) -> None:
        """Switch to training, but leave frozen parts as they are in use: their batch norm does not move."""
        self.classifier.train()
        for part in self._frozen:
            part.eval()


def batches_of(order: Tensor, batch_size: int, *, smallest: int = 2) -> list[Tensor]:
    """Cut an order into batches; a last one below `smallest` joins the batch before: batch norm needs two samples."""
    batches = list(torch.split(order, batch_size))
    if len(batches) > 1 and len(batches[-1]) < smallest:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def check_sampling(options: TrainOptions, head: Head) -> None:
    """Refuse to draw classes equally often where a sample has several.

    Raises:
        ConfigError: That is asked for.
    """
    if options.sampling == "balanced" and head == "sigmoid":
        msg = "Balanced sampling needs one class per sample, and this task has several: set sampling to 'shuffle'."
        raise ConfigError(msg)


def share_of_alignment(options: TrainOptions, backbone: str) -> float:
    """The share of the image-text contrast in the objective.

    Raises:
        ConfigError: It is asked of a backbone that knows no texts, or a text tower is.
    """
    if is_clip(backbone):
        return 0.5 if options.alignment is None else options.alignment
    for key in ("alignment", "text_lr"):
        if getattr(options, key):
            msg = (
                f"train's {key} is {getattr(options, key)!r}, and {backbone!r} reads no texts: leave it out, or choose "
                f"a backbone 'clip:NAME'."
            )
            raise ConfigError(msg)
    return 0.0


def _freeze(classifier: Classifier, names: tuple[str, ...]) -> list[nn.Module]:
    """Stop the named parts of the backbone from training, and return them."""
    known = (*STAGES, "backbone")
    for name in names:
        if name not in known:
            msg = f"freeze names {name!r}: choose from {', '.join(known)}."
            raise ConfigError(msg)
    parts = classifier.backbone.frozen_parts(names)
    for part in parts:
        part.requires_grad_(False)
    return parts
