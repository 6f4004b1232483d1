"""DICOM files as scanners write them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data import Reading, load_folder, read_image
from pipeline.errors import DataError

pydicom = pytest.importorskip("pydicom", reason="DICOM is an extra: pip install 'slca-pipeline[dicom]'")

STORED = np.array([[0, 1, 100, 1000], [2000, 3000, 4000, 4095]], np.uint16)


def write(path: Path, stored: npt.NDArray[Any], *, bits: int = 16, **tags: Any) -> Path:
    """A secondary capture of `stored`, (H, W), (H, W, 3) or (frames, H, W), with more tags."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = pydicom.Dataset()
    file.file_meta = meta
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    colour = stored.ndim == 3 and stored.shape[2] == 3
    file.SamplesPerPixel = 3 if colour else 1
    file.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        file.PlanarConfiguration = 0
    elif stored.ndim == 3:
        file.NumberOfFrames = len(stored)
    file.Rows, file.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    file.BitsAllocated, file.BitsStored, file.HighBit = stored.dtype.itemsize * 8, bits, bits - 1
    file.PixelRepresentation = int(stored.dtype.kind == "i")
    file.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    for tag, value in tags.items():
        setattr(file, tag, value)
    file.save_as(path, enforce_file_format=True)
    return path


def read(path: Path, reading: Reading | None = None) -> npt.NDArray[np.uint8]:
    """The grey of a grey file."""
    image = read_image(path, reading) if reading else read_image(path)
    assert (image == image[:, :, :1]).all()
    return image[:, :, 0]


def rounded(values: Any) -> npt.NDArray[np.uint8]:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 10), (np.uint16, 12), (np.uint16, 16)])
def test_without_a_window_the_range_of_the_stored_bits_counts(tmp_path: Path, dtype: Any, bits: int) -> None:
    stored = (STORED.astype(int) % 2**bits).astype(dtype)
    path = write(tmp_path / "a.dcm", stored, bits=bits)
    np.testing.assert_array_equal(read(path), rounded(stored / (2**bits - 1) * 255))


def test_signed_values_begin_at_the_lowest(tmp_path: Path) -> None:
    stored = np.array([[-2048, 0, 2047]], np.int16)
    assert read(write(tmp_path / "a.dcm", stored, bits=12)).tolist() == [[0, 128, 255]]


def test_the_files_own_first_window_is_applied_to_rescaled_values(tmp_path: Path) -> None:
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": [40, 500], "WindowWidth": [400, 2000]}
    path = write(tmp_path / "a.dcm", STORED, bits=12, **tags)
    hounsfield = STORED * 2.0 - 1000
    np.testing.assert_array_equal(read(path), rounded(((hounsfield - 39.5) / 399 + 0.5) * 255))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_every_window_function_agrees_with_pydicoms_own(tmp_path: Path, function: str) -> None:
    tags = {"WindowCenter": 1500, "WindowWidth": 2500, "VOILUTFunction": function}
    path = write(tmp_path / "a.dcm", STORED, bits=12, **tags)
    reference = pydicom.pixels.apply_voi_lut(STORED, pydicom.dcmread(path)) / 4095 * 255
    np.testing.assert_array_equal(read(path), rounded(reference))


def test_a_window_of_width_one_is_a_threshold(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", STORED, bits=12, WindowCenter=1000, WindowWidth=1)
    assert read(path).tolist() == [[0, 0, 0, 255], [255, 255, 255, 255]]


def test_the_configured_view_sets_the_files_own_aside(tmp_path: Path) -> None:
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    path = write(tmp_path / "a.dcm", STORED, bits=12, **tags)
    lung = Reading("window", window=(-600, 1500))
    np.testing.assert_array_equal(read(path, lung), rounded(((STORED - 1024.0 + 600.5) / 1499 + 0.5) * 255))
    stretched = read(path, Reading("percentile", percentiles=(0, 100)))
    np.testing.assert_array_equal(stretched, rounded(STORED / 4095 * 255))


def test_a_table_goes_before_the_window(tmp_path: Path) -> None:
    item = pydicom.Dataset()
    item.LUTDescriptor = [4096, 0, 8]
    item.LUTData = (255 - np.arange(4096) // 16).astype(np.uint16).tobytes()
    item["LUTData"].VR = "OW"
    tags = {"VOILUTSequence": [item], "WindowCenter": 40, "WindowWidth": 400}
    np.testing.assert_array_equal(read(write(tmp_path / "a.dcm", STORED, bits=12, **tags)), 255 - STORED // 16)


def test_a_modality_table_replaces_slope_and_intercept(tmp_path: Path) -> None:
    item = pydicom.Dataset()
    item.LUTDescriptor = [3, 1, 16]
    item.LUTData = [500, 40000, 65535]
    item["LUTData"].VR = "US"
    tags = {"ModalityLUTSequence": [item], "ModalityLUTType": "US"}
    path = write(tmp_path / "a.dcm", np.array([[0, 1, 2, 3, 4]], np.uint16), bits=12, **tags)
    np.testing.assert_array_equal(read(path)[0], rounded(np.array([500, 500, 40000, 65535, 65535]) / 257))


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    plain = read(write(tmp_path / "a.dcm", STORED, bits=12, WindowCenter=2000, WindowWidth=3000))
    tags = {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 2000, "WindowWidth": 3000}
    inverted = write(tmp_path / "b.dcm", STORED, bits=12, **tags)
    np.testing.assert_array_equal(read(inverted), 255 - plain)
    percentile = Reading("percentile")
    np.testing.assert_array_equal(read(inverted, percentile), 255 - read(tmp_path / "a.dcm", percentile))


def test_colour_stays_colour(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    path = write(tmp_path / "a.dcm", colour, bits=8)
    np.testing.assert_array_equal(read_image(path), colour)
    full = write(tmp_path / "b.dcm", np.full((2, 2, 3), [81, 90, 240], np.uint8), bits=8)
    file = pydicom.dcmread(full)
    file.PhotometricInterpretation = "YBR_FULL"
    file.save_as(full)
    assert np.abs(read_image(full)[0, 0].astype(int) - [238, 14, 14]).max() <= 2


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    tables = {"Red": [0, 65535], "Green": [257 * 7, 0], "Blue": [257 * 9, 257 * 200]}
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, table in tables.items():
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = np.array(table, np.uint16).tobytes()
    path = write(tmp_path / "a.dcm", np.array([[0, 1]], np.uint8), bits=8, **tags)
    assert read_image(path).tolist() == [[[0, 7, 9], [255, 0, 200]]]


def test_a_frame_is_chosen(tmp_path: Path) -> None:
    frames = np.stack([STORED, STORED[::-1], STORED[:, ::-1]])
    path = write(tmp_path / "a.dcm", frames, bits=12)
    for i in range(3):
        np.testing.assert_array_equal(read(path, Reading(frame=i)), rounded(frames[i] / 4095 * 255))
    with pytest.raises(DataError, match=r"a\.dcm: cannot be read as an image \(it has 3 frames and frame 3 is asked"):
        read_image(path, Reading(frame=3))


def test_the_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    for name in ("x/IM001.dcm", "x/IM002.DICOM", "y/IM003.dcm", "y/IM004.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, STORED, bits=12)
    made = load_folder(tmp_path, fractions={})
    assert len(made) == 4
    assert all((made.read(i) == made.read(0)).all() for i in range(4))


def test_damage_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "a.dcm", STORED, bits=12).read_bytes()
    for length in (140, 300, len(content) - 6):
        (tmp_path / "cut.dcm").write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cut\.dcm: cannot be read as an image \(.+\); replace the file"):
            read_image(tmp_path / "cut.dcm")
    large = write(tmp_path / "b.dcm", STORED, bits=12, Rows=60000, Columns=60000)
    with pytest.raises(DataError, match=r"b\.dcm: .*it is 60000 x 60000"):
        read_image(large)
    report = pydicom.dcmread(tmp_path / "a.dcm")
    del report.PixelData
    report.save_as(tmp_path / "c.dcm")
    with pytest.raises(DataError, match=r"c\.dcm: .*the DICOM file holds no image"):
        read_image(tmp_path / "c.dcm")


def test_without_pydicom_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.dcm", STORED, bits=12)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(
        DataError, match=r"a\.dcm: this is DICOM, which needs the extra 'dicom', .* pip install 'slca-pip"
    ):
        read_image(path)


@pytest.mark.parametrize("value", [None, ""])
def test_elements_without_a_value_count_as_absent(tmp_path: Path, value: str | None) -> None:
    wanted = read(write(tmp_path / "plain.dcm", STORED, bits=12))
    emptied = dict.fromkeys(("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"), value)
    assert (read(write(tmp_path / "emptied.dcm", STORED, bits=12, **emptied)) == wanted).all()
    half = {"WindowCenter": value, "WindowWidth": "400"}
    assert (read(write(tmp_path / "half.dcm", STORED, bits=12, **half)) == wanted).all()
