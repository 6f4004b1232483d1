"""SAM's own preprocessing: resize on the CPU in uint8, normalise and pad on the device.

Equal to `SamPredictor.set_image`: the longest side becomes the input's side, colours are normalised on the 0-255
scale, and zeros are padded at the bottom and on the right after that. Batches travel to the device as bytes, a
quarter of what normalised pixels would take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from pipeline.errors import DataError

NAME = "sam-1"  # raise the number when the same image gives other pixels
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Prepared:
    """One image, resized and ready for a batch.

    Attributes:
        pixels: uint8 (3, S, S), zeros below and to the right of the image.
        size: Height and width of the image within `pixels`, px.
    """

    pixels: Tensor
    size: tuple[int, int]


def prepare(image: npt.NDArray[np.uint8], input_px: int) -> Prepared:
    """Resize an image so that its longest side is `input_px`.

    Args:
        image: uint8 (H, W, 3), RGB.
        input_px: Side S of the square input, px.

    Raises:
        DataError: The array is no RGB image, or is so long and thin that nothing of it would be left.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        message = f"got an image {image.dtype} {image.shape}; expected uint8 (H, W, 3)"
        raise DataError(message)
    height, width = image.shape[:2]
    resize = ResizeLongestSide(input_px)
    if 0 in (height, width) or 0 in resize.get_preprocess_shape(height, width, input_px):
        message = f"an image of {height}x{width} px has no pixel left at {input_px} px; crop it or leave it out"
        raise DataError(message)
    resized = torch.from_numpy(resize.apply_image(image)).permute(2, 0, 1)
    pixels = torch.zeros(3, input_px, input_px, dtype=torch.uint8)
    pixels[:, : resized.shape[1], : resized.shape[2]] = resized
    return Prepared(pixels, (resized.shape[1], resized.shape[2]))


def normalise(pixels: Tensor, sizes: Tensor) -> Tensor:
    """Normalise colours and set everything outside the images to zero.

    Args:
        pixels: uint8 (B, 3, S, S) on any device.
        sizes: int (B, 2), height and width of each image, px.

    Returns:
        float32 (B, 3, S, S) on the device of `pixels`.
    """
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    at = torch.arange(pixels.shape[-1], device=pixels.device)
    rows, columns = (at < sizes.to(pixels.device)[:, axis, None] for axis in (0, 1))  # (B, S) each
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return ((pixels - mean) / std).masked_fill_(~inside, 0.0)
