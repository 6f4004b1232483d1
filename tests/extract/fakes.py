"""An encoder that takes no time and counts what is asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.encoders.preprocessing import Prepared
from tests.extract.pictures import SIDE_PX

if TYPE_CHECKING:
    from pipeline.encoders import Encoder


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
        return Prepared(torch.tensor(image).permute(2, 0, 1), (SIDE_PX, SIDE_PX // 2))

    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        if len(pixels) > self.limit:
            message = "this device is too small"
            raise torch.OutOfMemoryError(message)
        self.batches.append(len(pixels))
        value = pixels[: len(sizes), 0, 0, 0].float()
        value = torch.where(value == self.poison, torch.nan, value)
        return {tap: value[:, None, None, None].expand(-1, *shape).to(dtype) for tap, shape in self.taps.items()}


def as_encoder(fake: CountingEncoder) -> Encoder:
    return cast("Encoder", fake)
