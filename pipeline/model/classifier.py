"""A classifier of raw images, put together from a backbone and its uses of taps; without any, it is the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import clip as clips
from pipeline.clip import Architecture, is_clip
from pipeline.errors import ConfigError
from pipeline.mask_tap import others_of
from pipeline.model.backbones import NONE, STAGES, Backbone, Tokens, build_backbone
from pipeline.model.cached import CachedCosine
from pipeline.model.clip_backbone import ClipOptions, build_clip
from pipeline.model.geometry import sample_image
from pipeline.model.overlay import Overlay, OverlayOptions
from pipeline.model.pooled import Pooled
from pipeline.model.slca import Mix, Norm
from pipeline.model.uses import OWN, Gates, Seen, Shape, Use
from pipeline.weights import imagenet_file


@dataclass(frozen=True)
class ModelOptions:
    """What a classifier is made of; without `gates`, `fuse` and `overlay` it is the plain classifier.

    Attributes:
        backbone: A name that `build_backbone` knows; `"none"` for a classifier of pooled features alone.
        weights: `"none"`, `"imagenet"` or a local file.
        image_px: Side of the square image that the backbone sees.
        gates: Pairs (tap, stage); the tap `"own"` is the stage itself. The gates of several taps on one stage are
            averaged, which keeps them in (0, 1); that is ours.
        pool: SLCA's k, in cells of the *stored* grid: 1 where the store is pooled already.
        reduction: SLCA's r.
        norm: What features go through before a gate's layers: `"standardise"` by the training images, `"layer"` for
            LayerNorm over channels, `"layer_on_blocks"` for that on block taps only, `"none"`.
        mix: `"residual"` for x + x * A, `"multiply"` for x * A.
        identity_start: Start as the plain classifier, bit for bit.
        head: `"cosine"` compares with class prompts and a cache of images (see `cached`), instead of a linear layer;
            only without a backbone, and for one tap of a single cell, which `pipeline.evaluate.adapt` fills it for.
        cached: How many images that cache has.
        fuse: Late fusion: taps whose pooled features the head reads beside the backbone's embedding (see `Pooled`).
        overlay: Masks to paint over the images; None for none.
        clip: Prompts and adapters of a CLIP; None for another backbone, and for what CLIP does by default.
    """

    backbone: str = "resnet18"
    weights: str = "none"
    image_px: int = 224
    gates: tuple[tuple[str, str], ...] = (
        ("patch", "stem"), ("early", "stage1"), ("middle", "stage2"), ("late", "stage3"), ("neck", "stage4"),
    )  # fmt: skip
    pool: int = 1
    reduction: int = 16
    norm: Norm = "standardise"
    mix: Mix = "residual"
    identity_start: bool = False
    fuse: tuple[str, ...] = ()
    head: Literal["linear", "cosine"] = "linear"
    cached: int = 0
    overlay: OverlayOptions | None = None
    clip: ClipOptions | None = None

    @property
    def feature_taps(self) -> tuple[str, ...]:
        """The taps whose features have to move with the image: those of the gates in their order, those of `fuse`."""
        return tuple(dict.fromkeys([*(tap for tap, _ in self.gates if tap != OWN), *self.fuse]))

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps that must come from a store, each once: `feature_taps`, then those of `overlay`."""
        return tuple(dict.fromkeys([*self.feature_taps, *(() if self.overlay is None else self.overlay.taps)]))

    @property
    def weights_file(self) -> Path | None:
        """The file that the backbone starts from, there or not; None where its weights are drawn.

        Raises:
            ConfigError: There are no such weights for the backbone.
        """
        if is_clip(self.backbone):
            return clips.weights_file(self.backbone, self.weights)
        if self.weights == "imagenet":
            return imagenet_file(self.backbone)
        return None if self.weights == "none" else Path(self.weights)

    @property
    def reads_images(self) -> bool:
        """Whether the classifier looks at images at all."""
        return self.backbone != NONE


class Classifier(nn.Module):
    """A backbone and its uses of taps.

    Args:
        options: What to build.
        taps: (C, h, w) of each stored tap that its uses name.
        outputs: Numbers per image (see `pipeline.model.tasks`).
        classes: Names of the classes, which CLIP is asked about; None where its weights are to be loaded.
        architecture: What a CLIP is built from; None is what its name means.
        trains_text: Whether CLIP's text tower is to train.

    Attributes:
        options: What was built.
        taps: (C, h, w) of each stored tap that its uses read.
        backbone: The classifier without them.
        gates: One `SLCA` per pair of `options.gates`.
        overlay: What paints masks over images; None without `options.overlay`.
        pooled: What the head reads beside the embedding; None without `options.fuse`.

    Raises:
        ConfigError: A use names a stage or a tap that does not exist, or the same twice, or nothing is left to read.
        CheckpointError: The backbone's weights are not its own.
    """

    def __init__(
        self,
        options: ModelOptions,
        taps: Mapping[str, Shape],
        outputs: int,
        *,
        classes: Sequence[str] | None = None,
        architecture: Architecture | None = None,
        trains_text: bool = False,
    ) -> None:
        super().__init__()
        if options.image_px < 1:
            msg = f"image_px is {options.image_px!r}: give the side of the classifier's image in pixels."
            raise ConfigError(msg)
        _check_gates(options, taps)
        _check_fused(options, taps)
        self.options = options
        self.overlay = None if options.overlay is None else Overlay(options.overlay, taps, options.image_px)
        self.taps = {tap: taps[tap] for tap in options.taps}
        self.pooled = Pooled({tap: taps[tap] for tap in options.fuse}) if options.fuse else None
        beside = 0 if self.pooled is None else self.pooled.size
        if is_clip(options.backbone):
            self.backbone: Backbone = build_clip(
                options.backbone,
                outputs,
                options.weights,
                options.clip or ClipOptions(),
                image_px=options.image_px,
                classes=classes,
                architecture=architecture,
                beside=beside,
                trains_text=trains_text,
            )
        else:
            self.backbone = build_backbone(options.backbone, outputs, options.weights, beside=beside)
        if options.head == "cosine":
            self.backbone.head = nn.Sequential(CachedCosine(taps[options.fuse[0]][0], outputs, options.cached))
        widths = dict(zip(STAGES, self.backbone.widths, strict=False))
        if options.gates and not widths:
            msg = (
                f"The image tower of {options.backbone!r} is not cut into stages here, so the gates "
                f"{list(options.gates)!r} have no place to sit on: leave them out, or choose another backbone."
            )
            raise ConfigError(msg)
        self.gates = Gates(
            options.gates,
            taps,
            widths,
            mix=options.mix,
            norm=options.norm,
            identity_start=options.identity_start,
            pool=options.pool,
            reduction=options.reduction,
        )

    @property
    def uses(self) -> tuple[Use, ...]:
        """What the classifier does with taps, in the order in which it is done."""
        return tuple(use for use in (self.overlay, self.gates, self.pooled) if use is not None)

    def see(self, images: Tensor, seen: Seen, relight: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Turn decoded images into what the backbone takes: the one way there, of training and of all else.

        Args:
            images: (B, 3, H, W), uint8 or whole numbers in 0..255, as they were decoded.
            seen: Their features and extents; and the map that the images are to go through, which may be more than the
                features' own.
            relight: What changes the light of the moved images, (B, 3, image_px, image_px) in 0..255.

        Returns:
            (B, 3, image_px, image_px) float32, painted, moved, relit and normalised.
        """
        for use in self.uses:
            images = use.on_images(images, seen)
        drawn = sample_image(images, seen.affine, self.options.image_px)
        return self.backbone.standardise(drawn if relight is None else relight(drawn))

    def forward(
        self,
        images: Tensor | None,
        features: Mapping[str, Tensor],
        extents: Tensor | None = None,
        affine: Tensor | None = None,
    ) -> Tensor:
        """Classify images, with what each use makes of the taps.

        Args:
            images: (B, 3, image_px, image_px) float32, as `see` gives them; drawn through `affine` already. None
                without a backbone.
            features: Tap to (B, C, h, w), of the images before `affine`.
            extents: (B, 2) float32, the part of the features' grid that is image; None where all of it is.
            affine: (B, 2, 3) float32, the map that the images went through (`pipeline.model.geometry`); None for none.

        Returns:
            (B, outputs) logits.
        """
        return self._classify(images, Seen(features, extents, affine), self.uses)

    def plain_state(self) -> dict[str, Tensor]:
        """What a finished model keeps, by name: what only training needed is folded into the rest."""
        beside = {key: value for key, value in self.state_dict().items() if not key.startswith("backbone.")}
        return {**{f"backbone.{key}": value for key, value in self.backbone.plain_state().items()}, **beside}

    def head(self, last_stage: Tensor | Tokens | None, seen: Seen) -> Tensor:
        """Turn what the last stage gave, (B, C_4, H, W), into logits (B, outputs); None without a backbone."""
        embedding = None if last_stage is None else self.backbone.embed(last_stage)
        for use in self.uses:
            embedding = use.on_embedding(embedding, seen)
        assert embedding is not None, "checked when it was built"
        return self.backbone.classify(embedding)

    def _classify(self, images: Tensor | None, seen: Seen, uses: Sequence[Use]) -> Tensor:
        """What `forward` does, with some of the uses on stages."""
        x: Tensor | Tokens | None = images
        if x is not None:
            for name, stage in zip(STAGES, self.backbone.stages, strict=False):
                x = stage(x)
                assert x is not None
                placed = x.map if isinstance(x, Tokens) else x
                for use in uses:
                    placed = use.on_stage(name, placed, seen)
                x = x._replace(map=placed) if isinstance(x, Tokens) else placed
        return self.head(x, seen)

    def gate_maps(self, features: Mapping[str, Tensor], extents: Tensor | None, size: tuple[int, int]) -> list[Tensor]:
        """Compute the gates of stored taps over the images, for a person to look at.

        Args:
            features: Tap to (B, C, h, w).
            extents: (B, 2) float32, or None.
            size: (height, width) of the maps.

        Returns:
            One (B, C_stage, height, width) per pair of `options.gates` whose tap is stored, in their order.
        """
        return self.gates.maps(Seen(features, extents), size)

    def parameter_counts(self) -> dict[str, int]:
        """Count the parameters: `backbone` (its head included, whatever that reads), `slca`, of these `trainable`."""
        return {
            "backbone": sum(p.numel() for p in self.backbone.parameters()),
            "slca": sum(p.numel() for p in self.gates.parameters()),
            "trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
        }

    @torch.no_grad()
    def flop_counts(self) -> dict[str, int]:
        """Count the operations of classifying one image: `backbone` and `slca`.

        A multiplication and its addition are two; convolutions, matrix products and attention count, the rest does not.
        """
        device = next(self.parameters()).device
        training = self.training
        self.eval()
        side = self.options.image_px
        image = torch.zeros(1, 3, side, side, device=device) if self.options.reads_images else None
        seen = Seen({tap: torch.zeros(1, *shape, device=device) for tap, shape in self.taps.items()})
        counts = []
        for uses in ([use for use in self.uses if use is not self.gates], self.uses):
            with FlopCounterMode(display=False) as counter:
                self._classify(image, seen, uses)
            counts.append(int(counter.get_total_flops()))
        self.train(training)
        return {"backbone": counts[0], "slca": counts[1] - counts[0]}


def _check_gates(options: ModelOptions, taps: Mapping[str, Shape]) -> None:
    for tap, stage in options.gates:
        if stage not in STAGES:
            msg = f"The gate ({tap!r}, {stage!r}) names no stage: choose one of {', '.join(STAGES)}."
            raise ConfigError(msg)
        _refuse_masks(tap, "gates")
        if tap != OWN and tap not in taps:
            known = ", ".join(taps) or "none"
            msg = f"The gate ({tap!r}, {stage!r}) needs a tap that the store does not hold; it holds: {known}."
            raise ConfigError(msg)
    if len(set(options.gates)) != len(options.gates):
        msg = f"The gates {list(options.gates)!r} name a pair twice: list each (tap, stage) once."
        raise ConfigError(msg)


def _refuse_masks(tap: str, use: str) -> None:
    """Refuse masks as features: numbers of masks have no mean."""
    if others_of([tap]):
        msg = f"{use} names the tap {tap!r}, which holds masks and no features: paint it with model.overlay."
        raise ConfigError(msg)


def _check_fused(options: ModelOptions, taps: Mapping[str, Shape]) -> None:
    for tap in options.fuse:
        _refuse_masks(tap, "fuse")
        if tap not in taps:
            known = ", ".join(taps) or "none"
            msg = f"fuse names the tap {tap!r}, which the store does not hold; it holds: {known}."
            raise ConfigError(msg)
    if len(set(options.fuse)) != len(options.fuse):
        msg = f"fuse names a tap twice ({', '.join(options.fuse)}): list each once."
        raise ConfigError(msg)
    if options.head == "cosine" and (options.reads_images or [taps[tap][1:] for tap in options.fuse] != [(1, 1)]):
        msg = "A cosine head reads one tap of a single cell, such as CLIP's embedding, and no image."
        raise ConfigError(msg)
    if options.reads_images:
        return
    if options.gates or options.overlay or options.weights != "none":
        what = f"there is nothing to load {options.weights!r} into"
        if options.gates:
            what = "gates have no stage to sit on"
        elif options.overlay:
            what = "there is no image to paint an overlay on"
        msg = f"The backbone is 'none', so {what}: leave them out, or choose a backbone."
        raise ConfigError(msg)
    if not options.fuse:
        msg = "The backbone is 'none' and fuse is empty, so there is nothing to classify: name taps in fuse."
        raise ConfigError(msg)
