"""Image and gate stay together under any affine map, for any shape of image."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.model.geometry import _sample_cells, identity, sample_gate, sample_image
from pipeline.train.augment import Augmentation

GRID = 16  # cells of the encoder's padded square
SHAPES = {"square": (1.0, 1.0), "wide": (0.5, 1.0), "tall": (1.0, 0.625), "ragged": (0.53, 1.0)}


def affine_of(linear, centre=(0.0, 0.0)):
    return torch.cat((torch.tensor(linear, dtype=torch.float32), torch.tensor(centre)[:, None]), dim=1)[None]


MOVES = {  # place in the result -> place in the raw image, and the same on an array (B, C, h, w)
    "flip x": (affine_of([[-1, 0], [0, 1]]), lambda a: a.flip(3)),
    "flip y": (affine_of([[1, 0], [0, -1]]), lambda a: a.flip(2)),
    "quarter": (affine_of([[0, -1], [1, 0]]), lambda a: a.rot90(1, (2, 3))),
    "half": (affine_of([[-1, 0], [0, -1]]), lambda a: a.rot90(2, (2, 3))),
    "three quarters": (affine_of([[0, 1], [-1, 0]]), lambda a: a.rot90(3, (2, 3))),
}


def random_images(side, count=2):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("side", [28, 97, 128, 224])
def test_flips_and_quarter_turns_move_pixels_and_change_none(move, side):
    affine, on_array = MOVES[move]
    images = random_images(side)
    assert torch.equal(sample_image(images, affine.expand(2, 2, 3), side), on_array(images).float())


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", [4, 7, 16, 56])
def test_flips_and_quarter_turns_are_exact_on_gates(move, shape, stage):
    affine, on_array = MOVES[move]
    gate, extents = torch.rand(2, 3, GRID, GRID), torch.tensor([SHAPES[shape]] * 2)
    plain = sample_gate(gate, None, extents, (stage, stage))
    moved = sample_gate(gate, affine.expand(2, 2, 3), extents, (stage, stage))
    torch.testing.assert_close(moved, on_array(plain), atol=2e-6, rtol=0)


@pytest.mark.parametrize("stage", [(4, 4), (7, 7), (16, 16), (56, 40)])
def test_the_identity_is_a_plain_resize_of_the_part_that_is_image(stage):
    gate = torch.rand(2, 3, GRID, GRID)
    for extents, part in (((1.0, 1.0), gate), ((0.5, 1.0), gate[:, :, :8]), ((1.0, 0.25), gate[:, :, :, :4])):
        expected = F.interpolate(part, size=stage, mode="bilinear", align_corners=False)
        rows = torch.tensor([extents] * 2)
        for affine in (None, identity(2, gate.device)):
            torch.testing.assert_close(sample_gate(gate, affine, rows, stage), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(sample_gate(gate, None, None, stage), F.interpolate(gate, size=stage, mode="bilinear"))


@pytest.mark.parametrize("size_px", [64, 128, 200])
def test_the_identity_resizes_images(size_px):
    images = random_images(128)
    expected = F.interpolate(images.float(), size=(size_px, size_px), mode="bilinear").round()
    assert torch.equal(sample_image(images, None, size_px), expected)
    by_grid = sample_image(images, identity(2, images.device), size_px)
    assert (by_grid - expected).abs().max() <= 1  # a half may round either way
    assert ((by_grid - expected) != 0).float().mean() < 0.01


def test_padding_never_reaches_a_gate():
    gate, extents = torch.rand(1, 2, GRID, GRID), torch.tensor([[0.5, 1.0]])
    augmentation = Augmentation(rotation_degrees=180, scale=(0.5, 2.0), shift=0.3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        affine = augmentation.draw_affine(1, generator)
        before = sample_gate(gate, affine, extents, (9, 9))
        spoilt = gate.clone()
        spoilt[:, :, 8:] = 1e6
        assert torch.equal(sample_gate(spoilt, affine, extents, (9, 9)), before)


def blob(height, width, x, y, radius):
    """Paint a soft marker at (x, y) in [-1, 1] on an image of height x width."""
    ys = ((torch.arange(height) + 0.5) / height * 2 - 1)[:, None]
    xs = ((torch.arange(width) + 0.5) / width * 2 - 1)[None, :]
    return torch.exp(-((ys - y) ** 2 + (xs - x) ** 2) / (2 * radius**2))


def centre_of_mass(weights):
    h, w = weights.shape
    y = (weights.sum(1) * (torch.arange(h) + 0.5)).sum() / weights.sum() / h * 2 - 1
    x = (weights.sum(0) * (torch.arange(w) + 0.5)).sum() / weights.sum() / w * 2 - 1
    return torch.stack((x, y))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(256, 256), (128, 256), (256, 160)]),
    x=st.floats(-0.4, 0.4),
    y=st.floats(-0.4, 0.4),
    seed=st.integers(0, 10_000),
)
def test_a_marker_in_image_and_feature_lands_in_the_same_place(shape, x, y, seed):
    height, width = shape
    longest = max(shape)
    raw = blob(height, width, x, y, radius=0.12)
    # The image's way: resized to the classifier's square. The feature's way: on the grid of the padded square.
    image = F.interpolate(raw[None, None], size=(128, 128), mode="bilinear", antialias=True) * 255
    padded = F.pad(raw, (0, longest - width, 0, longest - height))
    gate = F.avg_pool2d(padded[None, None], longest // GRID)
    extents = torch.tensor([[height / longest, width / longest]])

    augmentation = Augmentation(
        flip_horizontal=0.5, flip_vertical=0.5, quarter_turns=True, rotation_degrees=180, scale=(0.8, 1.2), shift=0.1
    )
    affine = augmentation.draw_affine(1, torch.Generator().manual_seed(seed))
    expected = torch.linalg.solve(affine[0, :, :2], torch.tensor([x, y]) - affine[0, :, 2])
    assume(expected.abs().max() < 0.6)  # a marker that the frame cuts has its centre elsewhere
    in_image = centre_of_mass(sample_image(image.round().byte().expand(1, 3, -1, -1), affine, 128)[0, 0])
    on_gate = centre_of_mass(sample_gate(gate, affine, extents, (56, 56))[0, 0])
    feature_cell = 2 / GRID / min(extents[0])  # in the image's coordinates, along its shorter side
    assert (in_image - on_gate).abs().max() < feature_cell / 2
    assert (in_image - expected).abs().max() < 0.03


def test_maps_are_drawn_within_their_limits():
    generator = torch.Generator().manual_seed(1)
    count = 4000
    rotation = Augmentation(rotation_degrees=30).draw_affine(count, generator)
    angles = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0])
    assert math.radians(29) < angles.abs().max() <= math.radians(30.001)
    torch.testing.assert_close(torch.linalg.det(rotation[:, :, :2]), torch.ones(count))

    scaled = Augmentation(scale=(0.5, 2.0)).draw_affine(count, generator)
    magnification = 1 / scaled[:, 0, 0]
    assert 0.499 < magnification.min() < 0.55
    assert 1.9 < magnification.max() < 2.001

    cropped = Augmentation(crop=0.6).draw_affine(count, generator)
    corners = cropped[:, :, :2].abs().sum(dim=2) + cropped[:, :, 2].abs()
    assert corners.max() <= 1 + 1e-6  # a window never leaves the image
    assert 0.6 <= cropped[:, 0, 0].min() < 0.62

    shifted = Augmentation(shift=0.1).draw_affine(count, generator)
    assert 0.19 < shifted[:, :, 2].abs().max() <= 0.2  # of a side that is two long

    flipped = Augmentation(flip_horizontal=0.25).draw_affine(count, generator)
    assert (flipped[:, 0, 0] == -1).float().mean() == pytest.approx(0.25, abs=0.03)
    turned = Augmentation(quarter_turns=True).draw_affine(count, generator)
    assert turned.unique(dim=0).shape == (4, 2, 3)


def test_light_changes_touch_no_place_and_nothing_is_drawn_for_no_change():
    assert Augmentation().draw_affine(3, torch.Generator()) is None
    assert Augmentation(brightness=0.2, noise=0.1).draw_affine(3, torch.Generator()) is None
    images = random_images(8, 4).float()
    assert Augmentation().relight(images, torch.Generator()) is images
    bright = Augmentation(brightness=0.5).relight(images, torch.Generator().manual_seed(0))
    ratio = (bright / images)[(images > 0) & (bright < 255)]
    assert bright.max() <= 255
    assert 0.5 <= ratio.min() < ratio.max() <= 1.5
    grey = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    saturated = Augmentation(saturation=1.0).relight(grey, torch.Generator().manual_seed(0))
    torch.testing.assert_close(saturated, grey, atol=0.01, rtol=0)


def test_the_same_generator_draws_the_same_maps():
    augmentation = Augmentation(rotation_degrees=20, noise=0.1)
    draws = [augmentation.draw_affine(5, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"flip_vertical": 1.5}, "flip_vertical is 1.5"), ({"crop": 0.0}, "crop is 0.0"), ({"scale": (2, 1)}, "scale is")],
)
def test_impossible_augmentation_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**wrong)


@given(
    cells=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_sampling_cell_by_cell_is_grid_sample(cells, size, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 5, *cells, generator=generator).requires_grad_()
    places = 3 * torch.rand(3, *size, 2, generator=generator) - 1.5  # some of them beyond the borders
    expected = F.grid_sample(maps, places, mode="bilinear", padding_mode="border", align_corners=False)
    found = _sample_cells(maps, places)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape, generator=generator)
    wanted, given_back = (torch.autograd.grad((out * weights).sum(), maps)[0] for out in (expected, found))
    torch.testing.assert_close(given_back, wanted, rtol=1e-5, atol=1e-5)


def test_places_keep_their_precision_where_the_model_computes_in_less():
    gate = torch.rand(2, 3, GRID, GRID)
    affine = affine_of([[0.9, 0.17], [-0.17, 0.9]], (0.05, -0.03)).expand(2, 2, 3)
    expected = sample_gate(gate, affine, None, (56, 56))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sample_gate(gate, affine, None, (56, 56)), expected)
