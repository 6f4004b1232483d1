"""How values of more than 8 bits become 8 bits: by their whole range, by percentiles, or by a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import Image
from pipeline.errors import DataError

Depth = Literal["full", "percentile", "window"]


@dataclass(frozen=True)
class Reading:
    """How values of more than 8 bits become 8 bits, and which frame of several is meant.

    Attributes:
        depth: `full` maps 0..65535 to 0..255 by division by 257, rounded. `percentile` maps the image's own
            `percentiles` to 0 and 255. `window` maps `window` to 0..255 as DICOM does (PS3.3, C.11.2.1.2.1).
        percentiles: Lower and upper, in percent.
        window: Centre and width, in stored values.
        frame: Page of a TIFF or frame of a DICOM file, counted from 0.

    Raises:
        DataError: The values contradict each other.
    """

    depth: Depth = "full"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None
    frame: int = 0

    def __post_init__(self) -> None:
        if self.depth not in get_args(Depth):
            message = f"depth is one of {', '.join(get_args(Depth))}, not {self.depth!r}"
            raise DataError(message)
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            message = f"percentiles must ascend within 0 to 100, not {self.percentiles!r}"
            raise DataError(message)
        if (self.window is not None) != (self.depth == "window"):
            message = f"depth {self.depth!r} with window {self.window!r}: give a window exactly where depth is 'window'"
            raise DataError(message)
        if self.window is not None and self.window[1] <= 1:
            message = f"the width of a window must be more than 1, not {self.window[1]!r}"
            raise DataError(message)
        if self.frame < 0:
            message = f"frame must be 0 or more, not {self.frame!r}"
            raise DataError(message)


DEFAULT_READING = Reading()


def to_8_bit(values: npt.NDArray[Any], reading: Reading) -> Image:
    """Map grey values of any depth to 0..255 as `reading.depth` says.

    Args:
        values: Numbers (H, W).
        reading: The rule.

    Returns:
        uint8 (H, W). An image of one value is 0 everywhere under `percentile`.

    Raises:
        DataError: `full` is asked for and the values are not 16-bit integers; or a value is not finite.
    """
    if reading.depth == "full":
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
            message = (
                f"its {values.dtype} values run from {values.min():g} to {values.max():g}, and depth 'full' takes "
                f"integers from 0 to 65535: choose 'percentile' or 'window'"
            )
            raise DataError(message)
        rounded = (values.astype(np.uint32) + 128) // 257  # of v / 257; no ties, 257 is odd
        return np.asarray(rounded, np.uint8)
    if not np.isfinite(values).all():
        message = "it holds values that are not finite"
        raise DataError(message)
    if reading.window is not None:
        centre, width = reading.window
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    else:
        low, high = (float(v) for v in np.percentile(values, reading.percentiles))
    scaled = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0.0)
    return np.asarray(np.rint(scaled.clip(0, 255)), np.uint8)
