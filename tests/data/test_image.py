"""Files as other programs write them, read back as the pixels a person would see."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import Reading, pixel_digest, pixels_of, read_image, reading_rules
from pipeline.data.depth import to_8_bit
from pipeline.data.image import read_mask
from pipeline.errors import DataError

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def colour() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.fixture
def deep() -> npt.NDArray[np.uint16]:
    values = np.random.default_rng(1).integers(0, 65536, (5, 7), np.uint16)
    values[0, :6] = [0, 128, 129, 257, 65406, 65535]
    return values


def grey(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.repeat(values[:, :, None], 3, axis=2)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
def test_rgb_is_read_as_it_is(tmp_path: Path, colour: Pixels, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(colour).save(path, lossless=True)  # which WebP alone needs to be told
    read = read_image(path)
    assert read.dtype == np.uint8
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, colour)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_grey_gets_three_equal_channels(tmp_path: Path, colour: Pixels, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(colour[:, :, 0]).save(path)
    np.testing.assert_array_equal(read_image(path), grey(colour[:, :, 0]))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_dropped_and_the_stored_colour_kept(tmp_path: Path, colour: Pixels, suffix: str) -> None:
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7, 1) * 7
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / f"rgba{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"rgba{suffix}"), colour)
    Image.fromarray(np.dstack([colour[:, :, :1], alpha])).save(tmp_path / f"la{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"la{suffix}"), grey(colour[:, :, 0]))


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 255, 90, 255])])
def test_palette_colours_are_looked_up(tmp_path: Path, transparency: int | bytes | None) -> None:
    palette = np.array([[10, 20, 30], [200, 0, 5], [7, 255, 9], [1, 2, 3]], np.uint8)
    indices = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    with Image.open(tmp_path / "a.png") as written:
        assert ("transparency" in written.info) == (transparency is not None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), palette[indices])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_one_bit_is_black_and_white(tmp_path: Path, suffix: str) -> None:
    bits = np.array([[True, False, True], [False, False, True]])
    Image.fromarray(bits).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), grey(bits.astype(np.uint8) * 255))


def test_cmyk_jpeg_shows_the_colours_that_went_in(tmp_path: Path) -> None:
    shown = np.zeros((16, 32, 3), np.uint8)
    shown[:, :16] = [200, 30, 60]
    shown[:, 16:] = [20, 180, 240]
    Image.fromarray(shown).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    with Image.open(tmp_path / "a.jpg") as written:
        assert written.mode == "CMYK"
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - shown)[:, [4, 27]].max() <= 4


def test_scaled_decoding_of_jpeg_would_give_other_pixels(tmp_path: Path) -> None:
    y, x = np.mgrid[0:2048, 0:2048]
    waves = (128 + 100 * np.sin(x / 3) * np.cos(y / 5)).astype(np.uint8)
    Image.fromarray(waves).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as scaled:
        scaled.draft("L", (1024, 1024))
        assert scaled.size == (1024, 1024)
        half = np.asarray(scaled, np.int16)
    whole = Image.fromarray(read_image(tmp_path / "a.jpg")).resize((1024, 1024), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(whole, np.int16)[:, :, 0] - half).max() > 4


def test_jpeg_larger_than_the_encoder_is_decoded_at_full_size(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (1100, 1300), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as written:
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), grey(np.asarray(written)))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_divided_by_257_and_rounded(tmp_path: Path, deep: npt.NDArray[np.uint16], suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(deep).save(path)
    np.testing.assert_array_equal(read_image(path), grey(np.rint(deep / 257).astype(np.uint8)))


def test_16_bit_big_endian_tiff_is_read_alike(tmp_path: Path, deep: npt.NDArray[np.uint16]) -> None:
    Image.frombytes("I;16B", (7, 5), deep.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    assert (tmp_path / "a.tif").read_bytes()[:2] == b"MM"
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), grey(np.rint(deep / 257).astype(np.uint8)))


@pytest.mark.parametrize("deep_type", [np.uint8, np.uint16, np.float32])
def test_a_grey_tiff_in_which_0_is_white_is_turned_round(tmp_path: Path, deep: Any, deep_type: Any) -> None:
    values, path = (deep // 257).astype(deep_type), tmp_path / "a.tif"
    reading = Reading("percentile", percentiles=(0, 100))
    Image.fromarray(values).save(path)
    bright = read_image(path, reading)
    black_is_zero = struct.pack("<HHII", 262, 3, 1, 1)
    content = path.read_bytes()
    assert content.count(black_is_zero) == 1
    path.write_bytes(content.replace(black_is_zero, struct.pack("<HHII", 262, 3, 1, 0)))
    np.testing.assert_array_equal(read_image(path, reading), 255 - bright)


def test_16_bit_colour_keeps_its_high_byte(tmp_path: Path) -> None:
    deep = np.random.default_rng(3).integers(0, 65536, (5, 7, 3), np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(png(7, 5, deep.astype(">u2").tobytes(), row_bytes=42, depth=16, colour_type=2))
    read = read_image(path)
    np.testing.assert_array_equal(read, deep >> 8)
    assert np.abs(read - deep / 257).max() <= 1


def test_window_is_dicoms_linear_formula(tmp_path: Path, deep: npt.NDArray[np.uint16]) -> None:
    Image.fromarray(deep).save(tmp_path / "a.png")
    centre, width = 30000.0, 20000.0
    expected = np.empty(deep.shape)
    for at, x in np.ndenumerate(deep.astype(float)):
        if x <= centre - 0.5 - (width - 1) / 2:
            expected[at] = 0
        elif x > centre - 0.5 + (width - 1) / 2:
            expected[at] = 255
        else:
            expected[at] = ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255
    read = read_image(tmp_path / "a.png", Reading("window", window=(centre, width)))
    np.testing.assert_array_equal(read, grey(np.rint(expected).astype(np.uint8)))


def test_the_window_over_everything_is_the_full_range(deep: npt.NDArray[np.uint16]) -> None:
    over_all = Reading("window", window=(32768, 65536))
    np.testing.assert_array_equal(to_8_bit(deep, over_all), to_8_bit(deep, Reading()))


def test_percentiles_become_black_and_white(tmp_path: Path) -> None:
    ramp = np.arange(1000, 2001, dtype=np.uint16).reshape(7, 143)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", Reading("percentile", percentiles=(10, 90)))[:, :, 0].ravel()
    assert read[:101].max() == 0
    assert read[900:].min() == 255
    assert read[500] in (127, 128)
    assert (np.diff(read.astype(int)) >= 0).all()


def test_an_image_of_one_value_survives_the_percentiles() -> None:
    assert not to_8_bit(np.full((3, 3), 777, np.uint16), Reading("percentile")).any()


def test_float_tiff_needs_a_range(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*float32 values run from -1 to 1.*choose 'percentile' or 'window'"):
        read_image(tmp_path / "a.tif")
    stretched = read_image(tmp_path / "a.tif", Reading("percentile", percentiles=(0, 100)))
    np.testing.assert_array_equal(stretched, grey(np.rint((values.astype(float) + 1) * 127.5).astype(np.uint8)))
    values[2, 2] = np.nan
    Image.fromarray(values).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"b\.tif.*not finite"):
        read_image(tmp_path / "b.tif", Reading("percentile"))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    """The upright picture is dark but for a bright corner at the top left and half-bright at the top right."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255
    upright[:8, -8:] = 128
    stored = {  # how a camera held that way stores the picture: the inverse of what a viewer does
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    options: dict[str, Any] = {"quality": 100} if suffix == ".jpg" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    read = read_image(path)
    assert read.shape == (16, 32, 3)
    assert np.abs(read[:, :, 0].astype(int) - upright).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_exif_leaves_an_image_as_it_is(tmp_path: Path, colour: Pixels, suffix: str) -> None:
    options: dict[str, Any] = {"webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(colour).save(tmp_path / f"plain.{suffix}", **options)
    Image.fromarray(colour).save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0no directory of tags", **options)
    wanted = read_image(tmp_path / f"plain.{suffix}")
    assert (read_image(tmp_path / f"a.{suffix}") == wanted).all()
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        assert (pixels_of(opened) == wanted).all()


def test_orientation_of_16_bit_grey_is_applied(tmp_path: Path, deep: npt.NDArray[np.uint16]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(deep, 1))).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[:, :, 0], np.rint(deep / 257))


def test_a_page_is_chosen(tmp_path: Path, colour: Pixels) -> None:
    pages = [Image.fromarray(colour), Image.fromarray(255 - colour)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), colour)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", Reading(frame=1)), 255 - colour)
    with pytest.raises(DataError, match=r"a\.tif.*it has 2 pages and page 2 is asked for"):
        read_image(tmp_path / "a.tif", Reading(frame=2))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp"])
def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), np.uint8)
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(noise).save(whole)
    content = whole.read_bytes()
    for length in (1, 9, 40, len(content) // 2, len(content) - 300):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=rf"cut\{suffix}: cannot be read as an image \(.+\); replace the file"):
            read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "not one of PNG, JPEG, TIFF, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of PNG, JPEG, TIFF, BMP"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png: cannot be read as an image \({reason}"):
        read_image(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: .*no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"is a directory"):
        read_image(tmp_path)


def png(width: int, height: int, content: bytes, *, row_bytes: int, depth: int, colour_type: int) -> bytes:
    """A PNG file, row filter 0, written by hand because Pillow writes neither 16-bit colour nor lies about sizes."""
    rows = b"".join(b"\0" + content[i : i + row_bytes] for i in range(0, len(content), row_bytes))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (10000, 10000), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_an_absurdly_large_image_is_refused_before_it_is_decoded(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, b"\0" * 64, row_bytes=64, depth=8, colour_type=0))
    with pytest.raises(DataError, match=r"bomb\.png: cannot be read as an image"):
        read_image(path)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height, b"", row_bytes=1, depth=8, colour_type=0))
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image"):
        read_image(path)


def test_digest_is_sha256_of_shape_and_bytes() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    expected = hashlib.sha256(struct.pack("<3Q", 2, 4, 3) + bytes(range(24))).digest()
    assert pixel_digest(image) == expected
    assert pixel_digest(np.asfortranarray(image)) == expected
    assert pixel_digest(image.reshape(4, 2, 3)) != expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": "window"}, "give a window exactly where depth is 'window'"),
        ({"window": (40.0, 400.0)}, "give a window exactly where depth is 'window'"),
        ({"depth": "window", "window": (40.0, 1.0)}, "width of a window must be more than 1"),
        ({"depth": "percentile", "percentiles": (99.0, 1.0)}, "percentiles must ascend"),
        ({"frame": -1}, "frame must be 0 or more"),
        ({"depth": "whole"}, "depth is one of full, percentile, window, not 'whole'"),
    ],
)
def test_contradictory_rules_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Reading(**arguments)


def test_rules_name_what_changes_pixels_and_nothing_else() -> None:
    assert reading_rules() == {"version": 1, "depth": "full", "frame": 0}
    assert reading_rules(Reading("full", percentiles=(1, 99))) == reading_rules()
    assert reading_rules(Reading("percentile")) == {
        "version": 1,
        "depth": "percentile",
        "percentiles": [0.5, 99.5],
        "frame": 0,
    }
    window = reading_rules(Reading("window", window=(40.0, 400.0), frame=2))
    assert window == {"version": 1, "depth": "window", "window": [40.0, 400.0], "frame": 2}


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50), st.sampled_from(["full", "percentile", "window"]))
def test_brighter_stays_brighter(values: list[int], depth: Any) -> None:
    reading = Reading(depth, window=(1000.0, 300.0) if depth == "window" else None)
    mapped = to_8_bit(np.sort(np.array([values], np.uint16)), reading)
    assert (np.diff(mapped[0].astype(int)) >= 0).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA", "LA", "P", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_an_image_in_memory_has_the_pixels_of_its_file(
    tmp_path: Path, colour: Pixels, deep: npt.NDArray[np.uint16], mode: str, orientation: int
) -> None:
    image = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(colour).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    image.save(path, exif=exif.tobytes())
    wanted = read_image(path)
    assert wanted.shape == ((5, 7, 3) if orientation == 1 else (7, 5, 3))
    with Image.open(path) as opened:
        np.testing.assert_array_equal(pixels_of(opened), wanted)
    np.testing.assert_array_equal(pixels_of(str(path)), wanted)


def test_arrays_are_grey_or_rgb(colour: Pixels) -> None:
    np.testing.assert_array_equal(pixels_of(colour), colour)
    np.testing.assert_array_equal(pixels_of(colour[:, :, 0]), grey(colour[:, :, 0]))
    assert pixels_of(colour[:, ::-1]).flags.c_contiguous


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 4)), "an array of float64 with shape \\(4, 4\\)"),
        (np.zeros((4, 4, 4), np.uint8), "grey \\(H, W\\) or RGB \\(H, W, 3\\)"),
        (np.zeros((0, 4), np.uint8), "4 x 0"),
        ([[1]], "no image but a list"),
        ("nowhere.png", "nowhere.png: cannot be read"),
    ],
    ids=repr,
)
def test_what_is_nothing_of_these_is_refused(image: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        pixels_of(image)


def test_an_opened_image_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with Image.open(tmp_path / "b.png") as opened, pytest.raises(DataError, match="cannot be read"):
        pixels_of(opened)


def test_a_mask_is_what_is_not_zero_whatever_its_depth_and_colour(tmp_path: Path) -> None:
    finding = np.zeros((9, 12), bool)
    finding[3:6, 4:8] = True
    labels = finding.astype(np.uint16)
    green = np.zeros((9, 12, 3), np.uint8)
    green[finding, 1] = 200
    Image.fromarray(labels).save(tmp_path / "one.png")
    Image.fromarray(labels * 128).save(tmp_path / "low.tif")
    Image.fromarray(green).save(tmp_path / "green.png")
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "grey.png")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_mask(path), finding)
    big = np.kron(finding, np.ones((16, 16), bool))
    Image.fromarray(np.where(big, 255, 0).astype(np.uint8)).save(tmp_path / "lossy.jpg", quality=40)
    np.testing.assert_array_equal(read_mask(tmp_path / "lossy.jpg"), big)
