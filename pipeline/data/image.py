"""Image files to uint8 RGB: PNG, JPEG, TIFF and BMP of any depth, upright, refused with the reason where damaged.

Every rule that turns what a file stores into the pixels of a sample:

| stored | becomes |
| --- | --- |
| grey, 8 bit | three equal channels |
| 1 bit | 0 or 255, three equal channels |
| RGB, 8 bit | as it is |
| RGBA, grey with alpha | the stored colour; alpha is dropped, not blended |
| palette, with transparency or without | the palette's colour; transparency is dropped |
| CMYK, YCbCr, HSV | Pillow's conversion to RGB (no colour profile is applied) |
| grey, 16 bit | by `Reading.depth`: whole range, percentiles of the image, or a window |
| grey, 32 bit integer | as 16 bit if every value fits into 16 bits; percentile and window take any value |
| grey, floating point | percentile or window; `full` is refused, because a float has no range of its own |
| RGB, 16 bit | the high byte, which is all that Pillow decodes: within 1 of division by 257 |
| EXIF or TIFF orientation | applied: the pixels are upright |
| several pages (TIFF) | the page `Reading.frame` |

JPEG is always decoded at full size: the decoder's scaled modes (Pillow's `draft`) are faster for large images but give
other pixels than decoding followed by the encoder's own resize.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from pipeline.data.dataset import Image
from pipeline.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MAX_PIXELS = 1 << 26  # 8192 x 8192; below the size at which Pillow itself warns of a decompression bomb
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Reading:
    """How values of more than 8 bits become 8 bits, and which frame of several is meant.

    Attributes:
        depth: `full` maps 0..65535 to 0..255 by division by 257, rounded. `percentile` maps the image's own
            `percentiles` to 0 and 255. `window` maps `window` to 0..255 as DICOM does (PS3.3, C.11.2.1.2.1).
        percentiles: Lower and upper, in percent.
        window: Centre and width, in stored values.
        frame: Page of a TIFF, counted from 0.

    Raises:
        DataError: The values contradict each other.
    """

    depth: Literal["full", "percentile", "window"] = "full"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None
    frame: int = 0

    def __post_init__(self) -> None:
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


def reading_rules(reading: Reading = DEFAULT_READING) -> dict[str, Any]:
    """The rules above as JSON for a store's fingerprint: `version` changes when this module's pixels change."""
    unused = {"full": ("percentiles", "window"), "percentile": ("window",), "window": ("percentiles",)}[reading.depth]
    used = {key: value for key, value in asdict(reading).items() if key not in unused}
    return {"version": 1, **{key: list(value) if isinstance(value, tuple) else value for key, value in used.items()}}


def pixel_digest(image: Image) -> bytes:
    """The identity of pixels: sha256 over height, width, channels (little-endian 64 bit) and the bytes, row by row."""
    assert image.dtype == np.uint8
    digest = hashlib.sha256(np.array(image.shape, "<u8").tobytes())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def read_image(path: Path, reading: Reading = DEFAULT_READING) -> Image:
    """Read an image file upright as uint8 RGB (H, W, 3).

    Args:
        path: A PNG, JPEG, TIFF or BMP file.
        reading: How 16-bit values become 8 bits, and which page is read.

    Raises:
        DataError: The file is missing, empty, damaged, truncated, of another format, without pixels, or larger than
            `MAX_PIXELS`; the message names it and the reason.
    """
    try:
        if not path.stat().st_size:
            raise _Unreadable("the file is empty")  # noqa: EM101
        # opened here and not by Pillow, which maps uncompressed TIFF files by name and then garbles turned ones
        with path.open("rb") as stream, Pillow.open(stream, formats=_FORMATS) as file:
            _check_size(*file.size)
            _seek(file, reading.frame)
            file.load()
            upright = _turn(_pixels(file, reading), file.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's parsers raise what the damage happens to hit: OSError, SyntaxError, struct.error
        message = f"{path}: cannot be read as an image ({_reason(error)}); replace the file or remove its sample"
        raise DataError(message) from error
    return np.ascontiguousarray(upright)


class _Unreadable(Exception):
    """Why a file that Pillow would take is refused."""


def _reason(error: Exception) -> str:
    """One short clause about an exception from reading."""
    if isinstance(error, UnidentifiedImageError):
        return f"not one of {', '.join(_FORMATS)}, or damaged in its first bytes"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__


def _check_size(width: int, height: int) -> None:
    """Refuse images without pixels and those whose decoding could exhaust the memory."""
    if not 0 < width * height <= MAX_PIXELS:
        message = f"it is {width} x {height}, and between 1 and {MAX_PIXELS} pixels are allowed"
        raise _Unreadable(message)


def _seek(file: Pillow.Image, frame: int) -> None:
    """Choose a page."""
    frames = getattr(file, "n_frames", 1)
    if frame >= frames:
        message = f"it has {frames} pages and page {frame} is asked for"
        raise _Unreadable(message)
    if frame:
        file.seek(frame)
        _check_size(*file.size)


def _pixels(file: Pillow.Image, reading: Reading) -> Image:
    """Decoded pixels as uint8 (H, W, 3), not yet turned upright."""
    if file.mode in ("I", "F") or file.mode.startswith("I;16"):
        grey = to_8_bit(np.asarray(file), reading)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if file.mode == "P" and "transparency" in file.info:
        return np.asarray(file.convert("RGBA"))[:, :, :3]
    return np.asarray(file.convert("RGB"))


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


def _turn(pixels: Image, orientation: int) -> Image:
    """Undo an EXIF orientation (1 to 8; anything else is taken as upright, as viewers do).

    Args:
        pixels: (H, W, 3) as stored.
        orientation: EXIF tag 0x0112.

    Returns:
        A view, (H, W, 3) or (W, H, 3).
    """
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
