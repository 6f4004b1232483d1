"""The eight flips and quarter turns of an image, encoded in their own right where taps ask for them (`neck@rot90`).

A view is applied to the resized image before it is padded, so the padding of a view is at the bottom and on the right
like any other; views that are turned by a quarter swap the two extents of their grid. Resizing happens once for all
views: resizing the turned image instead differs by the rounding of a grey level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.encoders.recipe import VIEWS


def turned(pixels: Tensor, sizes: Tensor, view: str) -> tuple[Tensor, Tensor]:
    """Turn each image of a padded batch within its own borders.

    Args:
        pixels: (B, 3, S, S), zeros below and to the right of each image.
        sizes: int (B, 2), height and width of each image, px.
        view: One of `VIEWS`, named as in Pillow.

    Returns:
        The same for the turned images.
    """
    mirrored, quarter_turns = VIEWS[view]
    if view == "identity":
        return pixels, sizes
    out = torch.zeros_like(pixels)
    for image, (height, width), target in zip(pixels, sizes.tolist(), out, strict=True):
        inside = image[:, :height, :width]
        inside = torch.rot90(inside.flip(2) if mirrored else inside, quarter_turns, (1, 2))
        target[:, : inside.shape[1], : inside.shape[2]] = inside
    return out, sizes.flip(1) if quarter_turns % 2 else sizes
