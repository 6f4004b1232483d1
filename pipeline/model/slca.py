"""SLCA: turn a map of a frozen encoder into a gate for a stage of a classifier.

The pool has no parameters and comes first, so it may as well run before the store (k = 1 here, k times k fewer numbers
on disk) with the same result. The price is that k is then fixed by the store.

A gate acts only if it differs from place to place, so its layers must see features of a known scale. Those of frozen
encoders have none: the standard deviation of a tap lies between .09 (the neck of LiteMedSAM) and 10 (a late block of a
ViT), and most of what a LayerNorm over channels leaves of 1 is a pattern that is the same in every cell of every image
(80 to 85 % in blocks of the miniature SAM, whose gates then varied by 1 %). So each channel is standardised by what the
training images say of it, and the layers start so that the gate varies by about .2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ConfigError

Mix = Literal["residual", "multiply"]
Norm = Literal["standardise", "layer", "layer_on_blocks", "none"]

_NOISE = 1e-3  # of a channel's size: a smaller spread is float16's rounding


class Moments:
    """Mean and spread of each channel over the cells that it has been given so far."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0.0, torch.zeros(1), torch.zeros(1)

    def add(self, cells: Tensor, shares: Tensor | None) -> None:
        """Take in cells (B, n, C), and the share (B, n) of each that is image; None where all of them are.

        They are merged as Chan, Golub and LeVeque (1983) do.
        """
        cells, weights = cells.flatten(0, 1).float(), None if shares is None else shares.flatten()[:, None].float()
        number = float(len(cells) if weights is None else weights.sum())
        if not number:
            return
        here = cells.mean(0) if weights is None else (cells * weights).sum(0) / number
        apart = (cells - here).square()
        spread = (apart if weights is None else apart * weights).sum(0).double().cpu()
        step = here.double().cpu() - self._mean
        total = self._count + number
        self._mean = self._mean + step * number / total
        self._squares = self._squares + spread + step.square() * self._count * number / total
        self._count = total

    def found(self) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of each channel: (C,) float64 on the CPU."""
        return self._mean, (self._squares / max(self._count, 1.0)).sqrt()


class Standardise(nn.Module):
    """Each channel less its mean, over its standard deviation; both are fixed before training, by `fit`.

    A channel that does not vary becomes 0: what it would say of another image is not known. That and the whole way of
    scaling features are ours.

    Attributes:
        shift: (C,), minus the mean over the standard deviation.
        scale: (C,), one over the standard deviation.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    def forward(self, cells: Tensor) -> Tensor:
        """Standardise cells (B, n, C)."""
        return torch.addcmul(self.shift, cells, self.scale)

    @torch.no_grad()
    def learn(self, moments: Moments) -> None:
        """Take the mean and the standard deviation of each channel."""
        mean, deviation = moments.found()
        varies = deviation > _NOISE * mean.abs()
        scale = torch.where(varies, 1 / deviation, 0.0)
        self.scale.copy_(scale)
        self.shift.copy_(-mean * scale)


class SLCA(nn.Module):
    """Spatially localised channel attention: squeeze-and-excitation whose pool is local.

    With the feature F (B, C, h, w) of a tap, P the average pool of k x k cells with stride k, and W1, W2 convolutions
    of 1 x 1,

        A = sigmoid(W2 relu(W1 norm(P(F))))        (B, C_stage, ceil(h / k), ceil(w / k)), each value in (0, 1)

    which `geometry.sample_gate` then resizes to the stage's grid and `integrate` mixes into the stage. When k covers
    the grid, P is the mean over the whole image and A is squeeze-and-excitation (Hu et al., CVPR 2018).

    Source: the idea (attention weights of a frozen SAM gate a classifier) is Gu et al., CBMS 2025, arXiv 2505.06217.
    The skeleton, k = 4 and r = 16 are inferred from re-implementations of its ancestor, not from the paper's text.
    Ours: C_stage outputs, so that every channel of the stage has a map of its own; the norm and its place after the
    pool; the start; and leaving SAM's padding out of the mean when k covers the grid.

    The start keeps the variance, as He et al. (ICCV 2015) derive it. Where the channels of a cell have mean 0 and
    variance 1, W1 with variance 2 / C gives sums of variance 2; their part above 0 has variance 1 - 1 / pi; and W2 with
    variance 1 / ((1 - 1 / pi) C / r) makes that of the sigmoid's argument 1. Biases are 0. Torch's own start loses most
    of it: a standard deviation of .06 to .14 over the cells of an image was measured in the place of that 1.

    Args:
        channels: C, channels of the tap.
        stage_channels: C_stage, channels of the stage that is gated.
        pool: k in cells of the tap's grid; 1 where the store is pooled already.
        reduction: r, so that the hidden layer has max(1, C // r) channels.
        norm: `"standardise"` for `Standardise`, which `fit` has to see features for; `"layer"` for LayerNorm over the
            channels of each pooled cell, with its own scale and shift; `"none"`.
        identity_start: Start with W2 and its bias at 0, so A = 1/2 everywhere: no change, to `factor`.

    Raises:
        ConfigError: A size is below one.
    """

    def __init__(
        self,
        channels: int,
        stage_channels: int,
        *,
        pool: int = 4,
        reduction: int = 16,
        norm: Literal["standardise", "layer", "none"] = "standardise",
        identity_start: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("stage_channels", stage_channels)):
            if value < 1:
                msg = f"SLCA needs at least one channel, but {name} is {value!r}: check the taps of the store."
                raise ConfigError(msg)
        for name, value in (("pool", pool), ("reduction", reduction)):
            if value < 1:
                msg = f"SLCA's {name} is {value!r}: give a whole number of at least 1."
                raise ConfigError(msg)
        self.pool = pool
        hidden = max(1, channels // reduction)
        norms = {"standardise": Standardise, "layer": nn.LayerNorm}
        self.norm = norms[norm](channels) if norm in norms else None
        self.squeeze = nn.Conv2d(channels, hidden, kernel_size=1)
        self.excite = nn.Conv2d(hidden, stage_channels, kernel_size=1)
        nn.init.normal_(self.squeeze.weight, std=math.sqrt(2 / channels))
        nn.init.normal_(self.excite.weight, std=0 if identity_start else 1 / math.sqrt((1 - 1 / math.pi) * hidden))
        for layer in (self.squeeze, self.excite):
            nn.init.zeros_(_bias(layer))

    def fit(self, parts: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Let the norm see features, where it is `Standardise`.

        Args:
            parts: Features F (B, C, h, w), and the part (B, 2) of their grid that is image, or None.
        """
        if isinstance(self.norm, Standardise):
            fit_together([self], ([part] for part in parts))

    def forward(self, feature: Tensor, extents: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute the gate on its own coarse grid.

        Args:
            feature: F (B, C, h, w), any floating dtype.
            extents: (B, 2) float32, the part of the grid's height and width that is image and not padding; None where
                all of it is.

        Returns:
            A (B, C_stage, ceil(h / k), ceil(w / k)), and the part of *its* grid that is image.
        """
        pooled, extents = self._pooled(feature.to(self.squeeze.weight.dtype), extents)
        cells = pooled.flatten(2).transpose(1, 2)  # (B, h' w', C)
        if self.norm is not None:
            cells = self.norm(cells)
        hidden = torch.relu(_on_cells(self.squeeze, cells))  # (B, h' w', C // r)
        gate = _on_cells(self.excite, hidden).sigmoid_()  # (B, h' w', C_stage)
        return gate.transpose(1, 2).view(len(gate), -1, *pooled.shape[-2:]), extents

    def cells(self, feature: Tensor, extents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The pooled cells (B, h' w', C) of a feature, and the share (B, h' w') of each that is image."""
        pooled, extents = self._pooled(feature.float(), extents)
        shares = None if extents is None else image_shares(extents, pooled.shape[-2], pooled.shape[-1]).flatten(1)
        return pooled.flatten(2).transpose(1, 2), shares

    def _pooled(self, feature: Tensor, extents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        h, w = feature.shape[-2:]
        if self.pool >= max(h, w):
            return _image_mean(feature, extents), None
        if self.pool == 1:
            return feature, extents
        # A last window that sticks out of the grid averages the cells it has, and is image only as far as they reach.
        pooled = F.avg_pool2d(feature, self.pool, ceil_mode=True)
        covered = (h / (self.pool * pooled.shape[-2]), w / (self.pool * pooled.shape[-1]))
        if covered != (1.0, 1.0):
            whole = torch.ones(len(feature), 2, device=feature.device) if extents is None else extents
            extents = whole * torch.tensor(covered, device=feature.device)
        return pooled, extents


@torch.no_grad()
def fit_together(gates: Sequence[SLCA], batches: Iterable[Sequence[tuple[Tensor, Tensor | None]]]) -> None:
    """Let the norms of several gates, each `Standardise`, see features in one pass: bit for bit as one after the other.

    Args:
        gates: Their n gates.
        batches: Of each batch n pairs: features F (B, C, h, w), and the part (B, 2) of their grid that is image.
    """
    moments = [Moments() for _ in gates]
    for batch in batches:
        for gate, seen, part in zip(gates, moments, batch, strict=True):
            seen.add(*gate.cells(*part))
    for gate, seen in zip(gates, moments, strict=True):
        assert isinstance(gate.norm, Standardise)
        gate.norm.learn(seen)


def factor(gate: Tensor, mix: Mix = "residual", *, identity_start: bool = False) -> tuple[Tensor, int]:
    """Turn a gate A into what a stage is multiplied by, in two parts: one to resize, and a number to add to it then.

    The residual mix is x + x * A, as PHG-Net gates the same classifiers; the other is x * A. With the identity start
    they are x + x * (A - 1/2) and x * 2A, which is ours. The number is added last because a resized 0 is 0, bit for
    bit, while a resized 1 is 1 to rounding.

    Args:
        gate: A (B, C_stage, h, w) in (0, 1).
        mix: How gate and stage are joined.
        identity_start: Whether A = 1/2 means no change.

    Returns:
        (B, C_stage, h, w) and the number: for `integrate`, once the first is on the stage's grid.
    """
    if mix == "residual":
        return (gate - 0.5 if identity_start else gate), 1
    return (2 * gate - 1, 1) if identity_start else (gate, 0)


def integrate(stage: Tensor, resized: Tensor, added: int) -> Tensor:
    """Let a gate change a stage: x times its factor.

    Args:
        stage: x (B, C_stage, H, W).
        resized: (B, C_stage, H, W), what `factor` gave, on the stage's grid.
        added: The number that `factor` gave.

    Returns:
        (B, C_stage, H, W) in the dtype of `stage`.
    """
    return stage * (resized + added if added else resized).to(stage.dtype)


def is_block(tap: str) -> bool:
    """Say whether a tap is the output of a block, of which a ViT's have outlier channels."""
    return tap in {"early", "middle", "late"} or tap.startswith("block:")


def spread(gate: Tensor, extents: Tensor | None) -> Tensor:
    """Compute how much gates differ over their images: the standard deviation over cells, its mean over channels.

    Args:
        gate: A (B, C_stage, h, w).
        extents: (B, 2), the part of the grid that is image, the rest of which is left out; None where all of it is.

    Returns:
        (B,) float32, from 0 for a flat gate to 1/2 for one of zeros and ones in equal parts.
    """
    gate = gate.float()
    if extents is None:
        return gate.flatten(2).std(dim=2, correction=0).mean(dim=1)
    apart = (gate - _image_mean(gate, extents)).square()
    return _image_mean(apart, extents).sqrt().flatten(1).mean(dim=1)


def image_shares(extents: Tensor, height: int, width: int) -> Tensor:
    """Give the share of each cell of a grid that is image, from the part (B, 2) of its sides: (B, height, width)."""
    rows, columns = _cell_shares(extents[:, 0], height), _cell_shares(extents[:, 1], width)
    return rows[:, :, None] * columns[:, None, :]


def _image_mean(feature: Tensor, extents: Tensor | None) -> Tensor:
    """Average a feature (B, C, h, w) over the cells that are image, each by its share: (B, C, 1, 1)."""
    if extents is None:
        return feature.mean(dim=(-2, -1), keepdim=True)
    weights = image_shares(extents, feature.shape[-2], feature.shape[-1])[:, None].to(feature.dtype)  # (B, 1, h, w)
    return (feature * weights).sum(dim=(-2, -1), keepdim=True) / weights.sum(dim=(-2, -1), keepdim=True)


def _cell_shares(extent: Tensor, cells: int) -> Tensor:
    """Give the share of each of `cells` cells that is image, from the part (B,) of the axis that is: (B, cells)."""
    return (extent[:, None] * cells - torch.arange(cells, device=extent.device)).clamp(0, 1)


def _on_cells(layer: nn.Conv2d, cells: Tensor) -> Tensor:
    """Apply a convolution of 1 x 1 to cells (B, h w, C) whose channels lie together: (B, h w, its channels)."""
    return F.linear(cells, layer.weight.flatten(1), layer.bias)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
