"""DICOM files to uint8 RGB, through the optional pydicom.

| stored | becomes |
| --- | --- |
| MONOCHROME2, 8 to 16 bit, signed or not | rescaled (slope and intercept, or modality table), then 8 bits as below |
| MONOCHROME1 | the same, then inverted, so that low values are dark in every sample |
| RGB, YBR, palette | RGB; 16-bit colours are divided by 257, rounded |
| several frames | the frame `Reading.frame` |

`Reading.depth` of rescaled values (Hounsfield units in CT): `full` applies the file's own first VOI table or window
(LINEAR, LINEAR_EXACT or SIGMOID, PS3.3 C.11.2.1), or without one maps the whole range of its stored bits to 0..255;
`percentile` and `window` set the file's own view aside. Overlays and padding values get no special treatment.
Compressed pixel data need the decoder that pydicom names in its message.
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import Image
from pipeline.data.depth import Reading, to_8_bit
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset as Dicom

SUFFIXES = (".dcm", ".dicom")
_MAGIC_AT = 128


def is_dicom(stream: IO[bytes]) -> bool:
    """Whether a file begins like DICOM; the stream is left at its start."""
    start = stream.read(_MAGIC_AT + 4)
    stream.seek(0)
    return start[_MAGIC_AT:] == b"DICM"


def open_dicom(stream: IO[bytes]) -> Dicom:
    """Parse a DICOM file.

    Raises:
        ModuleNotFoundError: pydicom is not installed.
    """
    import pydicom

    return pydicom.dcmread(stream)


def frame_size(dicom: Dicom, frame: int) -> tuple[int, int]:
    """Width and height of a frame.

    Raises:
        DataError: There is no such frame, or the file holds no image.
    """
    if "PixelData" not in dicom:
        message = "the DICOM file holds no image"
        raise DataError(message)
    frames = int(dicom.get("NumberOfFrames") or 1)
    if frame >= frames:
        message = f"it has {frames} frames and frame {frame} is asked for"
        raise DataError(message)
    return int(dicom.Columns), int(dicom.Rows)


def dicom_pixels(dicom: Dicom, reading: Reading) -> Image:
    """Pixels of one frame, uint8 (H, W, 3), by the rules above.

    Args:
        dicom: A parsed file that holds such a frame.
        reading: The frame, and how values become 8 bits.
    """
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array

    stored = pixel_array(dicom, index=reading.frame)
    interpretation = dicom.PhotometricInterpretation
    if interpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dicom)[:, :, :3]
    if stored.ndim == 3:
        return np.asarray(stored if stored.dtype == np.uint8 else to_8_bit(stored, Reading()), np.uint8)
    values = _rescaled(stored, dicom)
    grey = to_8_bit(values, reading) if reading.depth != "full" else _own_view(values, dicom)
    if interpretation == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey[:, :, None], 3, axis=2)


def _rescaled(stored: npt.NDArray[Any], dicom: Dicom) -> npt.NDArray[Any]:
    """Stored values (H, W) in the modality's unit, by its table or its slope and intercept (PS3.3 C.11.1)."""
    if dicom.get("ModalityLUTSequence"):
        return _looked_up(stored, dicom.ModalityLUTSequence[0])
    slope, intercept = _rescale(dicom)
    return np.asarray(stored * slope + intercept)


def _rescale(dicom: Dicom) -> tuple[float, float]:
    """Slope and intercept; an element without a value, as anonymisers leave it, counts as absent."""
    slope, intercept = dicom.get("RescaleSlope"), dicom.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _looked_up(values: npt.NDArray[Any], table: Dicom) -> npt.NDArray[Any]:
    """Values (H, W) through a table of 16-bit entries; those beyond its ends get its first or last one.

    Not pydicom's `apply_voi`, which indexes an 8-bit table of more than 256 entries with 8-bit numbers.
    """
    data = table.LUTData
    entries = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data)
    first = int(table.LUTDescriptor[1])
    return np.asarray(entries[(np.rint(values).astype(np.int64) - first).clip(0, len(entries) - 1)])


def _own_view(values: npt.NDArray[Any], dicom: Dicom) -> Image:
    """Rescaled values (H, W) as the file itself wants them shown, uint8 (H, W)."""
    if dicom.get("VOILUTSequence"):
        table = dicom.VOILUTSequence[0]
        share = _looked_up(values, table) / (2.0 ** table.LUTDescriptor[2] - 1)
    elif dicom.get("WindowCenter") is not None and dicom.get("WindowWidth") is not None:
        share = _windowed(values, _first(dicom.WindowCenter), _first(dicom.WindowWidth), dicom.get("VOILUTFunction"))
    else:
        low, high = _range(dicom)
        share = (values - low) / (high - low)
    return np.asarray(np.rint(share.clip(0, 1) * 255), np.uint8)


def _windowed(values: npt.NDArray[Any], centre: float, width: float, function: str | None) -> npt.NDArray[np.float64]:
    """Share of the output's range, by PS3.3 C.11.2.1.2 and C.11.2.1.3; may leave 0..1."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(-4 * (values - centre) / width)), np.float64)
    if function == "LINEAR_EXACT":
        return np.asarray((values - centre) / width + 0.5, np.float64)
    if width <= 1:  # a threshold
        return np.asarray(values > centre - 0.5, np.float64)
    return np.asarray((values - (centre - 0.5)) / (width - 1) + 0.5, np.float64)


def _range(dicom: Dicom) -> tuple[float, float]:
    """Smallest and largest rescaled value that the stored bits can express."""
    if dicom.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** dicom.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    bits, signed = int(dicom.BitsStored), int(dicom.PixelRepresentation)
    low = -(2 ** (bits - 1)) if signed else 0
    slope, intercept = _rescale(dicom)
    ends = low * slope + intercept, (low + 2**bits - 1) * slope + intercept
    return min(ends), max(ends)


def _first(value: Any) -> float:
    """The first of one or several views."""
    try:
        return float(value)
    except TypeError:
        return float(value[0])
