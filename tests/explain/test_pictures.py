"""Figures of awkward samples: names too long or with signs that mean something, flat maps, images of any shape."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pipeline.explain.pictures import Case, HeatMap, _fitting, draw_case, draw_sheet, draw_strip, gate_maps, varies


def case(height, width, kinds, **changes):
    random = np.random.default_rng(0)
    image = random.integers(80, 160, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    maps = [HeatMap(f"tap{k} → stage{k}", random.random((6, 8)) * 1e-4 + 0.5, 0.5, 0.5001) for k in range(kinds)]
    values = {
        "name": "a$ward/of_a/hospital_with_a_long_name/patient_000123_visit_2_left.dcm",
        "image": image,
        "mask": mask,
        "true": "melanoma in situ|naevus",
        "predicted": "seborrhoeic keratosis of some kind",
        "probability": 0.99999,
        "maps": (*maps, HeatMap("Grad-CAM", np.zeros((4, 4)), 0.0, 0.0)),
    }
    return Case(**(values | changes))


@pytest.mark.parametrize(
    ("one", "shape"),
    [(case(40, 120, 6), (2, 4)), (case(120, 48, 1), (1, 3)), (case(64, 64, 3), (2, 3)), (case(9, 9, 0), (1, 2))],
)
def test_panels_fill_rows_whatever_the_shape(tmp_path, one, shape):
    draw_case(tmp_path / "x.png", one)
    with Image.open(tmp_path / "x.png") as picture:
        ink = (np.asarray(picture.convert("L")) < 250).mean(axis=1)
        assert picture.width == int(shape[1] * 2.1 * 130)
    filled = np.flatnonzero(np.diff((ink > 0.45).astype(int)) == 1)  # rows of panels begin where a line is mostly ink
    assert len(filled) >= shape[0]


def test_a_mask_is_outlined_on_every_panel(tmp_path):
    draw_case(tmp_path / "with.png", case(64, 64, 1))
    draw_case(tmp_path / "without.png", case(64, 64, 1, mask=None))
    with Image.open(tmp_path / "with.png") as a, Image.open(tmp_path / "without.png") as b:
        differing = (np.asarray(a.convert("L")).astype(int) - np.asarray(b.convert("L")) != 0)[150:].any(axis=0)
    assert [part.any() for part in np.array_split(differing, 3)] == [True] * 3


def test_an_empty_block_says_so(tmp_path):
    draw_sheet(tmp_path / "both.png", {"Hits": [case(20, 30, 1)], "Misses": []}, columns=1, empty="None.")
    draw_sheet(tmp_path / "none.png", {"Hits": [], "Misses": []}, columns=0, empty="None.")
    with Image.open(tmp_path / "both.png") as both, Image.open(tmp_path / "none.png") as none:
        assert both.height > none.height > 100


def test_long_names_keep_what_tells_them_apart():
    assert _fitting("short", 8, 1.45) == "short"
    long = "x" * 100 + "_2.png"
    assert _fitting(long, 8, 1.45, keep_end=True) == "…" + "x" * 13 + "_2.png"
    assert len(_fitting(long, 8, 1.45)) == 20


@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 1.0])
def test_the_fixed_scale_gives_a_gate_the_colour_of_its_value_whatever_its_range(tmp_path, level):
    grey = np.full((32, 32, 3), 100, np.uint8)
    values = np.full((4, 4), level)
    values[:, 2:] = min(1.0, level + 0.01)
    fixed, stretched = gate_maps("gate", values, level, level + 0.01)
    draw_strip(tmp_path / "strip.png", case(32, 32, 0, image=grey, mask=None, maps=(fixed, stretched)))
    with Image.open(tmp_path / "strip.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    inferno = matplotlib.colormaps["inferno"]
    parts = np.array_split(pixels, 3)  # the image, the gate from 0 to 1, the gate stretched
    for part, low, high in ((parts[1], 0.0, 1.0), (parts[2], level, level + 0.01)):
        for side, value in ((0.25, level), (0.75, min(1.0, level + 0.01))):
            seen = part[part.shape[0] // 2, int(side * part.shape[1])]
            wanted = 0.6 * 255 * np.array(inferno((value - low) / (high - low))[:3]) + 0.4 * 100
            np.testing.assert_allclose(seen, wanted, atol=4)
    across = [np.abs(np.diff(part[part.shape[0] // 2].sum(axis=1))).max() for part in parts[1:]]
    assert across[0] < 20  # a difference of 1 % is hardly seen on the scale from 0 to 1
    assert across[1] > 60 or level == 1.0


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.4930, 0.5025, "varies by 1 %"),
        (0.2, 0.43, "varies by 23 %"),
        (0.5, 0.504, "varies by 0.4 %"),
        (0.5, 0.5, "varies by less than 0.1 %"),
    ],
)
def test_a_range_is_said_in_words(low, high, said):
    assert varies(low, high) == said
