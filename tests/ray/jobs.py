"""Workers in other processes, where they are found by the name of this module; without torch, they begin sooner."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.errors import DataError


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
