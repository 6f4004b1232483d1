"""Captions of the demo's images, in varied words: outline, place, size and brightness of the lesion, as they are seen.

They are for the miniature CLIP, which learns words from them. All but the outline, which is the class, is measured on
the image and its mask, so an image that is mirrored or turned has the caption of what it shows then.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.data.layouts.demo_images import CLASS_NAMES, demo_arrays
from pipeline.progress import Progress, silent

_OUTLINES = {  # the class's own name first, which is drawn most often
    "lobed": ("lobed", "lobulated", "bulging"),
    "round": ("round", "smooth", "oval"),
    "spiked": ("spiked", "spiculated", "star-shaped"),
}
_SENTENCES = (
    "This is a photo of {outline}", "{outline} lesion", "a {outline} mass",
    "an ultrasound of a {size} {outline} lesion in the {place}", "a {outline} mass, {size}, {place}",
    "This is a photo of {outline}", "{outline} lesion", "{size} {outline} nodule, {brightness}, {place}",
    "ultrasound image with a {brightness} {outline} lesion",
)  # fmt: skip
_OWN_NAME = 0.6  # how often the outline is called by the class's own name
Pixel = TypeVar("Pixel", np.uint8, np.bool_)
TURNS = 8  # flips and quarter turns of an image


def captioned_arrays(
    count: int, size_px: int, seed: int, *, progress: Progress = silent
) -> tuple[npt.NDArray[np.uint8], list[str], npt.NDArray[np.int64]]:
    """Draw images in memory, each in two of its eight flips and quarter turns, with a caption of what each shows.

    Args:
        count: Number of scenes.
        size_px: Side of the square images.
        seed: Another seed, other patients and other words.
        progress: Called after each scene.

    Returns:
        Images uint8 (2 n, S, S), their captions, and labels int64 (2 n,).
    """
    images, masks, labels = demo_arrays(count, size_px, seed, progress=progress)
    rng = np.random.default_rng([seed, 3])
    shown, captions = [], []
    for image, mask, label in zip(images, masks, labels, strict=True):
        for turn in rng.choice(TURNS, 2, replace=False):
            turned, there = _turn(image, turn), _turn(mask, turn)
            shown.append(turned)
            captions.append(caption(turned, there, CLASS_NAMES[label], rng))
    return np.stack(shown), captions, labels.repeat(2)


def caption(image: npt.NDArray[np.uint8], lesion: npt.NDArray[np.bool_], outline: str, rng: np.random.Generator) -> str:
    """Say in words what an image shows.

    Args:
        image: Grey (S, S).
        lesion: Mask of the lesion (S, S).
        outline: Name of its class.
        rng: Of the choice of words.
    """
    y, x = (at.mean() / len(lesion) for at in np.nonzero(lesion))
    fall = image[~lesion].mean() - image[lesion].mean()
    words = {
        "outline": _OUTLINES[outline][0 if rng.random() < _OWN_NAME else rng.integers(len(_OUTLINES[outline]))],
        "place": f"{_third(y, 'upper', 'middle', 'lower')} {_third(x, 'left', 'centre', 'right')}",
        "size": "small" if lesion.mean() < 0.065 else "large" if lesion.mean() > 0.1 else "medium-sized",
        "brightness": "faint" if fall < 35 else "very dark" if fall > 60 else "dark",
    }
    return str(rng.choice(_SENTENCES)).format(**words)


def _turn(image: npt.NDArray[Pixel], turn: int) -> npt.NDArray[Pixel]:
    """One of the eight flips and quarter turns."""
    return np.rot90(image[:, ::-1] if turn >= TURNS // 2 else image, turn % 4)


def _third(at: float, low: str, middle: str, high: str) -> str:
    return low if at < 0.42 else high if at > 0.58 else middle
