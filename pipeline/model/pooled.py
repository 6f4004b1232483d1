"""Features pooled into one vector an image: late fusion beside a backbone's embedding, or all that a classifier reads.

Of each channel the mean, the maximum and the standard deviation over the cells that are image, standardised by what the
training samples have. Where things are is lost, which is what a gate keeps; what is there costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.model.uses import Seen, Shape, Use

STATISTICS = 3  # numbers a channel


class Pooled(nn.Module, Use):
    """Pooled features of some taps, joined to what the head reads.

    Args:
        taps: (C, h, w) of each tap, in the order of the vector.

    Attributes:
        taps: Their names.
        mean: (D,), what is subtracted: of each number its mean over the training samples.
        scale: (D,), what is divided by: its standard deviation over them, and 1 where it never varies.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, taps: Mapping[str, Shape]) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.size = STATISTICS * sum(channels for channels, _, _ in taps.values())
        self.register_buffer("mean", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))

    def forward(self, features: Mapping[str, Tensor], extents: Tensor | None = None) -> Tensor:
        """Pool and standardise features (B, C, h, w) by tap: (B, D) float32."""
        pooled = torch.cat([pool(features[tap], extents) for tap in self.taps], dim=1)
        return (pooled - self.mean) / self.scale

    def on_embedding(self, embedding: Tensor | None, seen: Seen) -> Tensor:
        """Give the head (B, E + D) in place of the backbone's embedding (B, E); without a backbone (B, D)."""
        pooled = self(seen.features, seen.extents)
        return pooled if embedding is None else torch.cat([embedding, pooled.to(embedding.dtype)], dim=1)

    def fit(self, pooled: Tensor) -> None:
        """Take mean and scale from the pooled features (n, D) of the training samples."""
        mean, scale = standard(pooled)
        self.mean.copy_(mean)
        self.scale.copy_(scale)


def pool(feature: Tensor, extents: Tensor | None = None) -> Tensor:
    """Pool a feature over the cells that are image.

    A cell is image if at least half of it is, along either axis; the first one always is.

    Args:
        feature: (B, C, h, w), any floating dtype.
        extents: (B, 2) float32, the part of the grid's height and width that is image; None where all of it is.

    Returns:
        (B, 3 C) float32: the means of all channels, their maxima, their standard deviations (of the whole, not of a
        sample: a single cell has 0).
    """
    cells = feature.float().flatten(2)  # (B, C, h w)
    if extents is None:
        parts = (cells.mean(dim=2), cells.amax(dim=2), cells.var(dim=2, correction=0).sqrt())
        return torch.cat(parts, dim=1)
    h, w = feature.shape[-2:]
    image = (_inside(extents[:, 0], h)[:, :, None] & _inside(extents[:, 1], w)[:, None, :]).flatten(1)[:, None]
    count = image.sum(dim=2)  # (B, 1)
    mean = cells.where(image, 0).sum(dim=2) / count
    variance = (cells - mean[:, :, None]).where(image, 0).square().sum(dim=2) / count
    return torch.cat((mean, cells.where(image, -torch.inf).amax(dim=2), variance.sqrt()), dim=1)


def standard(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of each number over samples (n, D), in float64; 1 where it does not vary."""
    deviation, mean = torch.std_mean(pooled.double(), dim=0, correction=0)
    varies = deviation > 1e-6 * mean.abs().clamp(min=1e-30)  # else rounding alone
    return mean, deviation.where(varies, 1.0)


def _inside(extent: Tensor, cells: int) -> Tensor:
    """Which of `cells` cells are image, from the part (B,) of the axis that is: (B, cells) of yes and no."""
    whole = (extent * cells + 0.5).floor().clamp(min=1)
    return torch.arange(cells, device=extent.device) < whole[:, None]
