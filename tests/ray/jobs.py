"""What works in other processes, where it is found by the name of this module: workers, encoders, images."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.data import Image
from pipeline.encoders.preprocessing import Prepared
from pipeline.errors import DataError
from tests.extract.fakes import CountingEncoder, Pictures, picture


class Squares:
    """Squares numbers, slowly if asked to; negative ones kill it, and so does a number whose file is there."""

    def __init__(self, seconds: float = 0.0, fatal: Path | None = None) -> None:
        self.seconds, self.fatal = seconds, fatal

    def __call__(self, numbers: tuple[int, ...]) -> tuple[int, list[int]]:
        time.sleep(self.seconds)
        for number in numbers:
            if number < 0:
                os._exit(7)
            if self.fatal is not None and (self.fatal / str(number)).exists():
                (self.fatal / str(number)).unlink()
                os._exit(7)
            if number == 40404:
                message = "there is no square of 40404"
                raise DataError(message)
        return os.getpid(), [number**2 for number in numbers]


class Refusing:
    """Cannot even begin."""

    def __init__(self) -> None:
        message = "no such mount"
        raise DataError(message)


class Dying:
    """Dies before it begins."""

    def __init__(self) -> None:
        os._exit(7)


@dataclass(frozen=True)
class Paint:
    """An encoder in plain words, as `on_ray.Plain` is: it takes its time, and dies of one colour or refuses it."""

    seconds: float = 0.0
    deadly: int = -1
    refused: int = -1
    reason: str = ""
    limit: int = 1000
    weights: None = None
    device: str = "cpu"

    reads = "image"
    taps: ClassVar = {"neck": (256, 16, 16)}  # 8 rows of 128 KiB in a shard of 1 MiB

    def fingerprint(self) -> dict[str, object]:
        return {"encoder": "counting"}

    def build(self, weights: Path | None, device: str) -> Painted:
        return Painted(self)


class Painted(CountingEncoder):
    """What `Paint` describes."""

    def __init__(self, paint: Paint) -> None:
        super().__init__(limit=paint.limit)
        self.paint, self.taps = paint, dict(paint.taps)

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


class OnlyHere(Pictures):
    """Images that lie on one machine: other processes do not see one of them, or die of it."""

    def __init__(self, count: int, *, unseen: int = -1, deadly: int = -1) -> None:
        super().__init__({f"{i:03d}.png": picture(i) for i in range(count)})
        self.home, self.unseen, self.deadly = os.getpid(), unseen, deadly

    def read(self, index: int) -> Image:
        if os.getpid() != self.home:
            if index == self.deadly:
                os._exit(7)
            if index == self.unseen:
                message = f"/mnt/scans/{index:03d}.png: there is no such file"
                raise DataError(message)
        return super().read(index)
