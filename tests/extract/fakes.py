"""A data set in memory and an encoder that takes no time, both of which count what is asked of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.data import Dataset, Image, Mask, Sample
from pipeline.encoders.preprocessing import Prepared
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.encoders import Encoder

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


class CountingEncoder(nn.Module):
    """Features that say which pixels they come from; out of memory above `limit`, not finite for `poison`."""

    reads = "image"
    device = torch.device("cpu")

    def __init__(self, *, limit: int = 1000, poison: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.input_px = SIDE_PX
        self.taps = {"neck": (2, 4, 4), "early": (1, 2, 2)}
        self.limit = limit
        self.poison = poison
        self.encoded = 0
        self.batches: list[int] = []

    def fingerprint(self) -> dict[str, object]:
        return {"encoder": "counting"}

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        self.encoded += 1
        return Prepared(torch.from_numpy(image).permute(2, 0, 1), (SIDE_PX, SIDE_PX // 2))

    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        if len(pixels) > self.limit:
            message = "this device is too small"
            raise torch.OutOfMemoryError(message)
        self.batches.append(len(pixels))
        value = pixels[:, 0, 0, 0].float()
        value = torch.where(value == self.poison, torch.nan, value)
        return {tap: value[:, None, None, None].expand(-1, *shape).to(dtype) for tap, shape in self.taps.items()}


def as_encoder(fake: CountingEncoder) -> Encoder:
    return cast("Encoder", fake)
