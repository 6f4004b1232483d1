"""Image files to uint8 RGB: PNG, JPEG, TIFF, BMP, WebP, DICOM; 8 to 16 bit; upright; refused if damaged.

Every rule that turns what a file stores into the pixels of a sample (those of DICOM are in `pipeline.data.dicom`):

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
| grey TIFF in which 0 is white | turned round after these rules, so that white is bright |
| RGB, 16 bit | the high byte, which is all that Pillow decodes: within 1 of division by 257 |
| EXIF or TIFF orientation | applied: the pixels are upright; damaged EXIF is passed over |
| several pages (TIFF, moving WebP) | the page `Reading.frame` |

JPEG is always decoded at full size: the decoder's scaled modes (Pillow's `draft`) are faster for large images but give
other pixels than decoding followed by the encoder's own resize.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from pipeline.data import dicom
from pipeline.data.dataset import Image, Mask
from pipeline.data.depth import DEFAULT_READING, Reading, to_8_bit
from pipeline.errors import DataError, needs_extra
from pipeline.url import AnyPath, Url, any_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", *dicom.SUFFIXES)
MAX_PIXELS = 1 << 26  # 8192 x 8192; below the size at which Pillow itself warns of a decompression bomb
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
UNREADABLE = "cannot be read as an image"
_ORIENTATION = 0x0112
_PHOTOMETRIC, _WHITE_IS_ZERO = 0x0106, 0  # of TIFF
_LOSSY = (".jpg", ".jpeg")
_ANY_VALUE = Reading("window", window=(1.0, 2.0))  # of 16 bits, too: 0 is 0, and 1 and more is 255


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


def read_image(path: AnyPath, reading: Reading = DEFAULT_READING) -> Image:
    """Read an image file upright as uint8 RGB (H, W, 3).

    Args:
        path: A PNG, JPEG, TIFF, BMP, WebP or DICOM file, here or behind a URL; its content counts, not its suffix.
        reading: How values of more than 8 bits become 8 bits, and which page or frame is read.

    Raises:
        DataError: The file is missing, empty, damaged, truncated, of another format, without pixels, larger than
            `MAX_PIXELS`, or DICOM without pydicom; the message names it and the reason.
        UnreachableError: The server behind a URL does not answer.
    """
    fetched = path.read_bytes() if isinstance(path, Url) else None
    try:
        if not (path.stat().st_size if isinstance(path, Path) else fetched):
            message = "the file is empty"
            raise DataError(message)
        with path.open("rb") if fetched is None else io.BytesIO(fetched) as stream:
            pixels = _dicom_pixels(stream, reading) if dicom.is_dicom(stream) else _pillow_pixels(stream, reading)
    except ModuleNotFoundError:
        raise DataError(needs_extra(f"{path}: this is DICOM, which", "dicom")) from None
    except MemoryError:
        raise
    except Exception as error:  # parsers raise what the damage happens to hit: OSError, SyntaxError, struct.error, ...
        message = f"{path}: {UNREADABLE} ({_reason(error)}); replace the file, or leave it out"
        raise DataError(message) from error
    return np.ascontiguousarray(pixels)


def read_mask(path: AnyPath) -> Mask:
    """Read where a finding is, bool (H, W): what is not zero in some channel of a mask file.

    In a JPEG file, which is not exact, it is what is above 127.

    Raises:
        DataError: See `read_image`.
    """
    least = 128 if path.suffix.lower() in _LOSSY else 1
    return np.asarray((read_image(path, _ANY_VALUE) >= least).any(axis=2))


def pixels_of(image: object) -> Image:
    """Give the pixels of whatever an image may be in a notebook, by the rules above: uint8 (H, W, 3).

    Args:
        image: A file or its URL, an image of Pillow's, or an array: uint8 (H, W) or (H, W, 3).

    Raises:
        DataError: It is none of these, or cannot be read.
    """
    if isinstance(image, str | os.PathLike | Url):
        return read_image(image if isinstance(image, Url) else any_path(os.fspath(image)))
    if isinstance(image, Pillow.Image):
        try:
            _check_size(*image.size)
            colours = _colours(image, DEFAULT_READING)  # reads the file of one that was only opened
        except (OSError, SyntaxError) as error:
            message = f"the image cannot be read ({_reason(error)}): open another file"
            raise DataError(message) from error
        return np.ascontiguousarray(_turn(colours, _orientation(image)))
    if not isinstance(image, np.ndarray):
        message = f"this is no image but a {type(image).__name__}: give a path, an image of Pillow's or a numpy array"
        raise DataError(message)
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        message = (
            f"an array of {image.dtype} with shape {image.shape} is no image: give uint8, grey (H, W) or RGB (H, W, 3)"
        )
        raise DataError(message)
    _check_size(image.shape[1], image.shape[0])
    return np.ascontiguousarray(np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image)


def _dicom_pixels(stream: IO[bytes], reading: Reading) -> Image:
    """Pixels of a DICOM file, uint8 (H, W, 3)."""
    file = dicom.open_dicom(stream)
    _check_size(*dicom.frame_size(file, reading.frame))
    return dicom.dicom_pixels(file, reading)


def _pillow_pixels(stream: IO[bytes], reading: Reading) -> Image:
    """Pixels of a file in one of Pillow's formats, upright, uint8 (H, W, 3).

    Pillow gets the stream and not the name: it maps an uncompressed TIFF file that it opens itself and then mistakes
    the sides of one that lies turned.
    """
    with Pillow.open(stream, formats=FORMATS) as file:
        _check_size(*file.size)
        _seek(file, reading.frame)
        file.load()
        return _turn(_colours(file, reading), _orientation(file))


def _reason(error: Exception) -> str:
    """One short clause about an exception from reading."""
    if isinstance(error, UnidentifiedImageError):
        return f"not one of {', '.join(FORMATS)}, DICOM, or damaged in its first bytes"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_size(width: int, height: int) -> None:
    """Refuse images without pixels and those whose decoding could exhaust the memory."""
    if not 0 < width * height <= MAX_PIXELS:
        message = f"it is {width} x {height}, and between 1 and {MAX_PIXELS} pixels are allowed"
        raise DataError(message)


def _seek(file: Pillow.Image, frame: int) -> None:
    """Choose a page."""
    frames = getattr(file, "n_frames", 1)
    if frame >= frames:
        message = f"it has {frames} pages and page {frame} is asked for"
        raise DataError(message)
    if frame:
        file.seek(frame)
        _check_size(*file.size)


def _colours(file: Pillow.Image, reading: Reading) -> Image:
    """Decoded pixels as uint8 (H, W, 3), not yet turned upright."""
    if file.mode in ("I", "F") or file.mode.startswith("I;16"):
        grey = to_8_bit(np.asarray(file), reading)
        if getattr(file, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow turns round what has 8 bits alone
            grey = 255 - grey
        return np.repeat(grey[:, :, None], 3, axis=2)
    if file.mode == "P" and "transparency" in file.info:
        return np.asarray(file.convert("RGBA"))[:, :, :3]
    return np.asarray(file.convert("RGB"))


def _orientation(file: Pillow.Image) -> int:
    """The EXIF orientation of an image; upright where its EXIF is damaged, as viewers take it."""
    try:
        return int(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # parsers raise what the damage happens to hit
        return 1


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
