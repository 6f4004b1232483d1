"""Images to squares of the training size, in the one way that both stages share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data import Image


def squared(image: Image, size_px: int) -> Tensor:
    """Resize a decoded image (H, W, 3) uint8 to (3, size_px, size_px) uint8."""
    return resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), size_px)


def resize(image: Tensor, size_px: int) -> Tensor:
    """Resize an image (3, H, W) uint8 to a square, bilinear with smoothing: (3, size_px, size_px) uint8."""
    if image.shape[-2:] == (size_px, size_px):
        return image
    return F.interpolate(image[None], size=(size_px, size_px), mode="bilinear", antialias=True)[0]
