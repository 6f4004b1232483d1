"""Uses of taps: how a classifier takes what a frozen encoder saw. SLCA's gates are the first; each is useful alone.

A use has a hook for each place where it may act: the image as it was decoded (an overlay), the output of a stage (a
gate), and the vector that the head reads (late fusion). `pipeline.model.classifier` puts a backbone and its uses
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.model.gating import gate_stage
from pipeline.model.geometry import sample_gate
from pipeline.model.slca import SLCA, Mix, Norm, Standardise, factor, fit_together, integrate, is_block

OWN = "own"  # a gate made from the stage itself: what is left of SLCA without the encoder
Shape = tuple[int, int, int]  # (C, h, w) of a tap


@dataclass(frozen=True)
class Seen:
    """What is known of a batch of images beside their pixels.

    Attributes:
        features: Tap to (B, C, h, w), of the images before `affine`.
        extents: (B, 2) float32, the part of the features' grid that is image; None where all of it is.
        affine: (B, 2, 3) float32, the map that the images went through (`pipeline.model.geometry`); None for none.
    """

    features: Mapping[str, Tensor]
    extents: Tensor | None = None
    affine: Tensor | None = None


class Use:
    """One use of taps; each hook changes nothing unless it is overridden."""

    def on_images(self, images: Tensor, seen: Seen) -> Tensor:
        """Change decoded images (B, 3, H, W) of whole numbers in 0..255, which nothing has moved yet."""
        return images

    def on_stage(self, stage: str, x: Tensor, seen: Seen) -> Tensor:
        """Change the output (B, C_stage, H, W) of a stage."""
        return x

    def on_embedding(self, embedding: Tensor | None, seen: Seen) -> Tensor | None:
        """Change the vector (B, E) that the head's linear layer reads; None where there is no backbone to give one."""
        return embedding


class Gates(nn.ModuleList, Use):
    """SLCA's gates on the stages of a classifier, one `SLCA` per pair.

    Args:
        pairs: (tap, stage) of each gate; the tap `"own"` is the stage itself. The gates of several taps on one stage
            are averaged, which keeps them in (0, 1); that is ours.
        taps: (C, h, w) of each stored tap.
        widths: Channels of each stage.
        mix: `"residual"` for x + x * A, `"multiply"` for x * A.
        norm: What features go through before a gate's layers, see `SLCA`; `"layer_on_blocks"` is LayerNorm on block
            taps and nothing on others. The stage itself is never standardised: its scale is that of its own norms, and
            moves with training.
        identity_start: Start as the plain classifier, bit for bit.
        options: The others of `SLCA`: `pool`, `reduction`.

    Raises:
        ConfigError: An option is impossible.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        taps: Mapping[str, Shape],
        widths: Mapping[str, int],
        *,
        mix: Mix = "residual",
        norm: Norm = "standardise",
        identity_start: bool = False,
        **options: Any,
    ) -> None:
        for name, value, known in (("mix", mix, get_args(Mix)), ("norm", norm, get_args(Norm))):
            if value not in known:
                msg = f"The {name} of the gates is {value!r}: choose one of {', '.join(map(repr, known))}."
                raise ConfigError(msg)
        super().__init__(
            SLCA(
                widths[stage] if tap == OWN else taps[tap][0],
                widths[stage],
                norm=_norm_of(tap, norm),
                identity_start=identity_start,
                **options,
            )
            for tap, stage in pairs
        )
        self._pairs, self._mix, self._identity_start = tuple(pairs), mix, identity_start

    @property
    def fitted(self) -> tuple[str, ...]:
        """The taps whose features `fit` has to see, each once."""
        return tuple(dict.fromkeys(tap for tap, _ in self._standardising()))

    def fit(self, batches: Iterable[Seen]) -> None:
        """Let the norms of stored taps see features of training images, once, before the training."""
        learning = self._standardising()
        fit_together(
            [slca for _, slca in learning],
            ([(seen.features[tap], seen.extents) for tap, _ in learning] for seen in batches),
        )

    def _standardising(self) -> list[tuple[str, SLCA]]:
        """The gates that have to know the scale of their features, each with its tap."""
        gates = zip(self._pairs, self, strict=True)
        return [
            (tap, slca) for (tap, _), slca in gates if isinstance(slca, SLCA) and isinstance(slca.norm, Standardise)
        ]

    def on_stage(self, stage: str, x: Tensor, seen: Seen) -> Tensor:
        """Gate the output `x` (B, C_stage, H, W) of a stage by its taps; without any it stays as it is."""
        added = 0
        laid = []  # (what to resize, affine, extents) of each gate
        for (tap, place), slca in zip(self._pairs, self, strict=True):
            if place != stage:
                continue
            own = tap == OWN  # moved with the image already, and without padding
            gate, visible = slca(x, None) if own else slca(seen.features[tap], seen.extents)
            part, added = factor(gate, self._mix, identity_start=self._identity_start)
            laid.append((part, None if own else seen.affine, visible))
        if not laid:
            return x
        if len(laid) == 1:
            return gate_stage(x, added, *laid[0])
        maps = [sample_gate(*gate, (x.shape[-2], x.shape[-1])) for gate in laid]
        return integrate(x, torch.stack(maps).mean(dim=0), added)

    def maps(self, seen: Seen, size: tuple[int, int]) -> list[Tensor]:
        """Compute the gates of stored taps over the images, for a person to look at.

        Args:
            seen: Features, and how much of them is image.
            size: (height, width) of the maps.

        Returns:
            One (B, C_stage, height, width) per pair whose tap is stored, in their order.
        """
        found = []
        for (tap, _), slca in zip(self._pairs, self, strict=True):
            if tap != OWN:
                gate, visible = slca(seen.features[tap], seen.extents)
                found.append(sample_gate(gate, None, visible, size))
        return found


def _norm_of(tap: str, norm: Norm) -> Literal["standardise", "layer", "none"]:
    """The norm of one gate."""
    if norm == "layer_on_blocks":
        return "layer" if is_block(tap) else "none"
    return "none" if norm == "standardise" and tap == OWN else norm
