"""SLCA: turn a map of a frozen encoder into a gate for a stage of a classifier.

The pool has no parameters and comes first, so it may as well run before the store (k = 1 here, k times k fewer numbers
on disk) with the same result. The price is that k is then fixed by the store.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ConfigError

Mix = Literal["residual", "multiply"]


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
    pool; the gain; the identity start; and leaving SAM's padding out of the mean when k covers the grid.

    Args:
        channels: C, channels of the tap.
        stage_channels: C_stage, channels of the stage that is gated.
        pool: k in cells of the tap's grid; 1 where the store is pooled already.
        reduction: r, so that the hidden layer has max(1, C // r) channels.
        normalise: LayerNorm over the channels of each pooled cell, with its own scale and shift.
        gain: Factor on W1 at the start. torch's own start (1) gives gates that are flat to some hundredths whatever the
            feature, and a short training leaves them so; a larger one starts them as clear maps of random sign.
        identity_start: Start with W2 and its bias at 0, so A = 1/2 everywhere: no change, to `factor`.

    Raises:
        ConfigError: A size is below one, or the gain is not above 0.
    """

    def __init__(
        self,
        channels: int,
        stage_channels: int,
        *,
        pool: int = 4,
        reduction: int = 16,
        normalise: bool = True,
        gain: float = 1.0,
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
        if not gain > 0:
            msg = f"SLCA's gain is {gain!r}: give a number above 0."
            raise ConfigError(msg)
        self.pool = pool
        hidden = max(1, channels // reduction)
        self.norm = nn.LayerNorm(channels) if normalise else None
        self.squeeze = nn.Conv2d(channels, hidden, kernel_size=1)
        self.excite = nn.Conv2d(hidden, stage_channels, kernel_size=1)
        with torch.no_grad():
            self.squeeze.weight *= gain
        if identity_start:
            nn.init.zeros_(self.excite.weight)
            nn.init.zeros_(_bias(self.excite))

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


def normalised_by_default(tap: str) -> bool:
    """Say whether a tap gets SLCA's LayerNorm unless asked: block outputs do, for a ViT's have outlier channels."""
    return tap in {"early", "middle", "late"} or tap.startswith("block:")


def _image_mean(feature: Tensor, extents: Tensor | None) -> Tensor:
    """Average a feature (B, C, h, w) over the cells that are image, each by its share: (B, C, 1, 1)."""
    if extents is None:
        return feature.mean(dim=(-2, -1), keepdim=True)
    h, w = feature.shape[-2:]
    rows = _cell_shares(extents[:, 0], h)  # (B, h)
    columns = _cell_shares(extents[:, 1], w)  # (B, w)
    weights = (rows[:, None, :, None] * columns[:, None, None, :]).to(feature.dtype)  # (B, 1, h, w)
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
