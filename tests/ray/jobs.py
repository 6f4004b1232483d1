"""Workers and images in other processes, found there by the name of this module; without torch, they begin sooner."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import Image
from pipeline.errors import DataError
from pipeline.process import sharing_machine
from tests.extract.pictures import Pictures, picture


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


class Counting(Squares):
    """Tells among how many workers it shares the memory of its machine, slowly."""

    def __call__(self, numbers: tuple[int, ...]) -> tuple[int, list[int]]:
        return super().__call__(numbers)[0], [sharing_machine()]


class Noting:
    """Notes that it began with a number, and gives so much of it that the result waits on its node to be fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, numbers: tuple[int, ...]) -> np.ndarray[Any, Any]:
        with (self.folder / str(numbers[0])).open("a") as file:
            file.write("begun\n")
        return np.full(2**18, numbers[0], np.float32)


class Refusing:
    """Cannot even begin."""

    def __init__(self) -> None:
        message = "no such mount"
        raise DataError(message)


class Dying:
    """Dies before it begins."""

    def __init__(self) -> None:
        os._exit(7)


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
