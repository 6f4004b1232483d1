"""An encoder for other processes, where it is found by the name of this module."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.encoders.preprocessing import Prepared
from pipeline.errors import DataError
from tests.extract.fakes import CountingEncoder


@dataclass(frozen=True)
class Paint:
    """An encoder in plain words, as `on_node.Plain` is: it takes its time, and dies of one colour or refuses it.

    With a `home`, it is another one in other processes.
    """

    seconds: float = 0.0
    deadly: int = -1
    refused: int = -1
    reason: str = ""
    limit: int = 1000
    home: int = 0
    weights: None = None
    device: str = "cpu"

    reads = "image"
    taps: ClassVar = {"neck": (256, 16, 16)}  # 8 rows of 128 KiB in a shard of 1 MiB

    def fingerprint(self) -> dict[str, object]:
        return {"encoder": "counting" if self.home in (0, os.getpid()) else "adding"}

    def build(self, weights: Path | None, device: str) -> Painted:
        return Painted(self)


class Painted(CountingEncoder):
    """What `Paint` describes."""

    def __init__(self, paint: Paint) -> None:
        super().__init__(limit=paint.limit)
        self.paint, self.taps = paint, dict(paint.taps)

    def fingerprint(self) -> dict[str, object]:
        return self.paint.fingerprint()

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        colour = int(image[0, 0, 0])
        if colour == self.paint.deadly:
            os._exit(7)
        if colour == self.paint.refused:
            raise DataError(self.paint.reason)
        return super().prepare(image)

    def encode(self, *batch):  # type: ignore[no-untyped-def]
        time.sleep(self.paint.seconds)
        return super().encode(*batch)
