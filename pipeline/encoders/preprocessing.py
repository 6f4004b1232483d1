"""Preprocessing as each family's own code has it: resize on the CPU in uint8, turn, normalise and pad on the device.

`sam` equals `SamPredictor.set_image`: the longest side becomes the input's side, colours are normalised on the 0-255
scale, and zeros are padded at the bottom and on the right after that. `medsam` is how MedSAM's weights were trained
(Ma et al. 2024, their inference script): the image is squeezed to a square, bicubically, and scaled to [0, 1] by its
own smallest and largest value; it resizes with Pillow where theirs does with scikit-image, so it is close, not equal.
`lite_medsam` is LiteMedSAM's inference script: the longest side becomes the input's side (`area_resize`), the image is
scaled to [0, 1] by its own extremes, and zeros follow at the bottom and on the right. `sam2` equals transformers'
`Sam2ImageProcessor`: squeezed to a square, colours normalised, nothing padded, so that every cell is image.

Taps may ask for one of the eight flips and quarter turns of an image (`neck@rot90`). A view is applied to the resized
image before it is padded, so the padding of a view is at the bottom and on the right like any other; views that are
turned by a quarter swap the two extents of their grid. Resizing happens once for all views: resizing the turned image
instead differs by the rounding of a grey level. Batches travel to the device as bytes, a quarter of what normalised
pixels would take.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.encoders.area_resize import resize_area
from pipeline.encoders.family import Prepared
from pipeline.encoders.recipe import MEAN, MEAN_OF_1, STD, STD_OF_1, VIEWS
from pipeline.errors import DataError

if TYPE_CHECKING:
    from segment_anything.utils.transforms import ResizeLongestSide


def prepare(image: npt.NDArray[np.uint8], input_px: int, preprocessing: str = "sam") -> Prepared:
    """Resize an image so that its longest side is `input_px`, or both are.

    Args:
        image: uint8 (H, W, 3), RGB.
        input_px: Side S of the square input, px.
        preprocessing: Whose.

    Raises:
        DataError: The array is no RGB image, or is so long and thin that nothing of it would be left.
    """
    require_rgb(image)
    height, width = image.shape[:2]
    if preprocessing == "sam2" and image.size:
        return Prepared(_squeezed(image, input_px), (input_px, input_px))
    resize = _resize(input_px)
    if 0 in (height, width) or 0 in resize.get_preprocess_shape(height, width, input_px):
        message = f"an image of {height}x{width} px has no pixel left at {input_px} px; crop it or leave it out"
        raise DataError(message)
    if preprocessing == "sam":
        array = resize.apply_image(image)
    elif preprocessing == "lite_medsam":
        array = resize_area(image, *resize.get_preprocess_shape(height, width, input_px))
    else:
        array = np.array(Image.fromarray(image).resize((input_px, input_px), Image.Resampling.BICUBIC))
    resized = torch.from_numpy(array).permute(2, 0, 1)
    pixels = torch.zeros(3, input_px, input_px, dtype=torch.uint8)
    pixels[:, : resized.shape[1], : resized.shape[2]] = resized
    return Prepared(pixels, (resized.shape[1], resized.shape[2]))


def _squeezed(image: npt.NDArray[np.uint8], side_px: int) -> Tensor:
    """Resize an image (H, W, 3) to a square (3, S, S) in bytes, bilinearly and smoothed."""
    pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
    if pixels.shape[1:] == (side_px, side_px):
        return pixels
    return F.interpolate(pixels[None], (side_px, side_px), mode="bilinear", antialias=True, align_corners=False)[0]


def require_rgb(image: npt.NDArray[np.uint8]) -> None:
    """Refuse what is no image.

    Raises:
        DataError: The array is no RGB image.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        message = f"got an image {image.dtype} {image.shape}; expected uint8 (H, W, 3)"
        raise DataError(message)


@cache
def _resize(input_px: int) -> ResizeLongestSide:
    """SAM's own resize, imported when the first image comes: it brings torchvision, which takes seconds."""
    from segment_anything.utils.transforms import ResizeLongestSide

    return ResizeLongestSide(input_px)


def normalise(pixels: Tensor, sizes: Tensor, preprocessing: str = "sam") -> Tensor:
    """Normalise colours and set everything outside the images to zero.

    Args:
        pixels: uint8 (B, 3, S, S) on any device.
        sizes: int (B, 2), height and width of each image, px.
        preprocessing: Whose.

    Returns:
        float32 (B, 3, S, S) on the device of `pixels`.
    """
    if preprocessing == "medsam":  # every pixel is image
        low, high = pixels.amin((1, 2, 3), keepdim=True).float(), pixels.amax((1, 2, 3), keepdim=True).float()
        return (pixels - low) / (high - low).clamp(min=1e-8)
    if preprocessing == "sam2":
        of_1 = (torch.tensor(of).view(3, 1, 1) for of in (MEAN_OF_1, STD_OF_1))
        mean, std = ((255 * of).to(pixels.device, non_blocking=True) for of in of_1)
        return (pixels - mean) / std
    # No copy waits for the device, else a batch would be launched only when the one before is done.
    mean, std = (torch.tensor(of).view(3, 1, 1).to(pixels.device, non_blocking=True) for of in (MEAN, STD))
    sizes = sizes.to(pixels.device, non_blocking=True)
    at = torch.arange(pixels.shape[-1], device=pixels.device)
    rows, columns = (at < sizes[:, axis, None] for axis in (0, 1))  # (B, S) each
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    if preprocessing == "lite_medsam":
        low = pixels.masked_fill(~inside, 255).amin((1, 2, 3), keepdim=True).float()
        high = pixels.amax((1, 2, 3), keepdim=True).float()  # outside there are zeros
        return ((pixels - low) / (high - low).clamp(min=1e-8)).masked_fill_(~inside, 0.0)
    return ((pixels - mean) / std).masked_fill_(~inside, 0.0)


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
