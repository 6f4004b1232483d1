"""Resize an image as OpenCV does with `INTER_AREA`, in numpy: how LiteMedSAM's images were made.

A smaller image has the mean of the area that each pixel covers, in float32, rounded to the nearest level (ties to
even; halves of exactly 2 x 2 pixels upwards). A larger one is interpolated between pixels in fixed point of 11 bits.
Equal to `cv2.resize`, byte for byte, which is the oracle of the tests and no dependency.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

_BITS = 11
_NEGLIGIBLE = 1e-3  # of a pixel


def resize_area(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Make an image smaller on both sides, or larger on both.

    Args:
        image: uint8 (H, W, 3).
        height: Wanted, px.
        width: Wanted, px.
    """
    if image.shape[:2] == (height, width):
        return image
    if image.shape[0] >= height and image.shape[1] >= width:
        return _averaged(image, height, width)
    return _interpolated(image, height, width)


def _averaged(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    across = _weighed(image.astype(np.float32).transpose(1, 0, 2), width).transpose(1, 0, 2)  # (H, width, 3)
    means = _weighed(across, height)
    halved = image.shape[:2] == (2 * height, 2 * width)
    return _bytes(np.floor(means + 0.5) if halved else np.rint(means))


def _weighed(lines: npt.NDArray[np.float32], new: int) -> npt.NDArray[np.float32]:
    """Mean lines (new, ...) of (old, ...), added up one after the other as there: another order rounds ties apart."""
    at, shares = _covered(len(lines), new)
    means = np.zeros((new, *lines.shape[1:]), np.float32)
    for which, share in zip(at.T, shares.T, strict=True):
        means += share[:, None, None] * lines[which]
    return means


def _interpolated(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    before, after, first, second = _neighbours(image.shape[1], width)
    levels = image.astype(np.int64)
    across = levels[:, before] * first[:, None] + levels[:, after] * second[:, None]
    before, after, first, second = _neighbours(image.shape[0], height)
    above, below = (
        weight[:, None, None] * (across[at] >> 4) >> 16 for at, weight in ((before, first), (after, second))
    )
    return _bytes((above + below + 2) >> 2)


def _bytes(levels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    whole: npt.NDArray[np.uint8] = levels.clip(0, 255).astype(np.uint8)
    return whole


@lru_cache(64)
def _covered(old: int, new: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The old lines that each new one covers, and what each weighs, both (new, most that one covers)."""
    scale = old / new
    most = int(np.ceil(scale)) + 1
    at, shares = np.zeros((new, most), np.int64), np.zeros((new, most), np.float32)
    for line in range(new):
        start, end = line * scale, line * scale + scale
        whole = min(scale, old - start)
        last = min(int(end), old - 1)
        first = min(int(np.ceil(start)), last)
        covered = [(first - 1, (first - start) / whole)] if first - start > _NEGLIGIBLE else []
        covered += [(middle, 1 / whole) for middle in range(first, last)]
        covered += [(last, min(end - last, 1.0, whole) / whole)] if end - last > _NEGLIGIBLE else []
        for place, (which, share) in enumerate(covered):
            at[line, place], shares[line, place] = which, share
    return at, shares


@lru_cache(64)
def _neighbours(old: int, new: int) -> tuple[npt.NDArray[np.int64], ...]:
    """For each new pixel the two old ones between which it lies, and their weights, which sum to 2048."""
    pixels = np.arange(new)
    before = np.floor(pixels * (old / new)).astype(np.int64)
    part = ((pixels + 1) - (before + 1) * (new / old)).astype(np.float32)
    part = np.where(part <= 0, np.float32(0), part - np.floor(part))
    part[before >= old - 1] = 0
    first, second = (np.rint(share * 2**_BITS).astype(np.int64) for share in (1 - part, part))
    return before, np.minimum(before + 1, old - 1), first, second
