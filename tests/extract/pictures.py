"""A data set in memory that counts what is asked of it; without torch, so that processes that only read begin soon."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import numpy.typing as npt

from pipeline.data import Dataset, Image, Mask, Sample
from pipeline.errors import DataError

SIDE_PX = 8


class Pictures:
    """Named images in memory; `bytes` under a name stand for a file that cannot be read."""

    def __init__(self, images: dict[str, npt.NDArray[np.uint8] | bytes]) -> None:
        self.images = images
        self.reads: Counter[str] = Counter()

    def read(self, index: int) -> Image:
        name = list(self.images)[index]
        self.reads[name] += 1
        image = self.images[name]
        if isinstance(image, bytes):
            message = f"{name}: not an image"
            raise DataError(message)
        return image

    def stamp(self, index: int) -> str | None:
        name, image = list(self.images.items())[index]
        return f"{name} {hashlib.sha256(bytes(image)).hexdigest()}"

    def mask(self, index: int) -> Mask | None:
        return None

    def dataset(self) -> Dataset:
        samples = tuple(Sample(name, i % 2, "train", name) for i, name in enumerate(self.images))
        return Dataset("pictures", samples, ("even", "odd"), "binary", self)


def picture(value: int) -> npt.NDArray[np.uint8]:
    """An image whose pixels are told apart by `value` and nothing else."""
    return np.full((SIDE_PX, SIDE_PX, 3), value, np.uint8)


def pictures(count: int) -> Pictures:
    return Pictures({f"{i:03d}.png": picture(i) for i in range(count)})
