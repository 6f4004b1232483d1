"""Masks are painted as a slow painter would, as SAM's notebooks do, and move with the image that they lie on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.geometry import sample_image
from pipeline.model.overlay import Overlay, OverlayOptions, image_colours, lay, rank_colour
from pipeline.model.uses import Seen
from pipeline.report.onnx_file import TOLERANCE, Served, _exported, _largest_difference

SIDE = 24
TAPS = {"masks": (1, SIDE, SIDE), "mask_scores": (2, 255, 1)}
RANDOM = np.random.default_rng(0)


def some_ranks(count: int) -> torch.Tensor:
    """Rectangles, the largest first: (count, 1, S, S) uint8; the last image has none."""
    ranks = np.zeros((count, 1, SIDE, SIDE), np.uint8)
    for number in range(count - 1):
        for rank, side in enumerate((14, 9, 7, 4), start=1):
            top, left = RANDOM.integers(0, SIDE - side, 2)
            ranks[number, 0, top : top + side, left : left + side] = rank
    return torch.from_numpy(ranks)


def some_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def paint(options: OverlayOptions, images: torch.Tensor, **seen: object) -> torch.Tensor:
    return Overlay(options, TAPS, 32).on_images(images, Seen(**seen))  # type: ignore[arg-type]


def paint_slowly(image, ranks, extent, options, colours):
    """Paint (3, H, W) pixel by pixel; `colours` are (255, 3)."""
    _, height, width = image.shape
    if not ranks.any():
        return image
    rows, columns = (int(np.ceil(part * SIDE - 1e-3)) for part in extent)
    cell = lambda place, pixels, part, last: min(int((place + 0.5) / pixels * part * SIDE), last - 1)  # noqa: E731
    over = [
        [ranks[cell(y, height, extent[0], rows), cell(x, width, extent[1], columns)] for x in range(width)]
        for y in range(height)
    ]
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            rank = int(over[y][x])
            around = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            inside = [int(over[a][b]) for a, b in around if 0 <= a < height and 0 <= b < width]
            for channel in range(3):
                old = float(image[channel, y, x])
                if options.palette == "binary":
                    new = 255.0 if rank else 0.0
                elif options.palette == "cutout":
                    new = old if rank else 0.0
                elif not rank:
                    new = old
                elif options.contour and any(other < rank for other in inside):
                    new = 0.6 * old + 0.4 * (255.0 if channel == 2 else 0.0)
                else:
                    new = (1 - options.opacity) * old + options.opacity * float(colours[rank - 1][channel])
                result[channel, y, x] = round(new)
    return result


@pytest.mark.parametrize("extents", [None, [[1.0, 0.6], [0.5, 1.0], [1.0, 1.0]]])
@pytest.mark.parametrize("palette", ["rank", "random", "binary", "cutout"])
@pytest.mark.parametrize("contour", [True, False])
def test_the_fast_painter_is_the_slow_one(palette, contour, extents):
    options = OverlayOptions(palette=palette, contour=contour, opacity=0.35)
    images, ranks = some_images(3, 17, 29), some_ranks(3)
    parts = torch.ones(3, 2) if extents is None else torch.tensor(extents)
    found = paint(options, images, features={"masks": ranks}, extents=None if extents is None else parts)
    assert found.dtype == torch.uint8
    fixed = [rank_colour(rank) for rank in range(1, 256)]
    own = image_colours(ranks[:, 0])
    for number in range(3):
        colours = own[number].tolist() if palette == "random" else fixed
        expected = paint_slowly(
            images[number].numpy(), ranks[number, 0].numpy(), parts[number].tolist(), options, colours
        )
        difference = np.abs(expected.astype(int) - found[number].numpy().astype(int))
        assert difference.max() <= 1  # a half may round up or down
        assert (difference > 0).mean() < 0.01
    assert torch.equal(found[-1], images[-1])  # no mask: the plain image, whatever the palette
    assert not torch.equal(found[0], images[0])


def test_random_colours_are_drawn_as_sams_notebooks_draw_them():
    image, ranks = some_images(1, SIDE, SIDE), some_ranks(2)[:1]
    found = paint(OverlayOptions(palette="random", contour=False), image, features={"masks": ranks})
    colours = image_colours(ranks[:, 0])[0].numpy() / 255
    # `show_anns` of segment-anything's notebooks: each mask's colour and opacity over an RGBA layer, the largest first
    layer = np.ones((SIDE, SIDE, 4))
    layer[:, :, 3] = 0
    for rank in range(1, 5):
        layer[ranks[0, 0].numpy() == rank] = np.concatenate([colours[rank - 1], [0.5]])
    shown = image[0].permute(1, 2, 0).numpy() * (1 - layer[:, :, 3:]) + 255 * layer[:, :, :3] * layer[:, :, 3:]
    assert np.abs(shown - found[0].permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-4


def test_an_images_colours_are_its_own_whatever_lies_beside_it():
    ranks = some_ranks(5)[:4]
    colours = image_colours(ranks[:, 0])
    assert torch.equal(image_colours(ranks[[2], 0])[0], colours[2])
    assert len({tuple(one.flatten().tolist()) for one in colours}) == 4
    everything = torch.cat([image_colours(some_ranks(9)[:8, 0]) for _ in range(4)]).flatten()
    assert (everything.min(), everything.max()) == (0, 255)
    assert everything.mean() == pytest.approx(127.5, abs=2)
    assert everything.std() == pytest.approx(255 / 12**0.5, abs=2)
    fixed = torch.tensor([rank_colour(rank) for rank in range(1, 21)], dtype=torch.float32)
    distances = torch.cdist(fixed, fixed) + 1e3 * torch.eye(20)
    assert distances.min() > 20


def test_image_and_masks_move_as_one():
    torch.manual_seed(0)
    ranks, images = some_ranks(4), some_images(4, 32, 32)
    model = ModelOptions(backbone="resnet18", image_px=32, gates=(), overlay=OverlayOptions())
    classifier = Classifier(model, TAPS, 2).eval()
    plain = Classifier(dataclasses.replace(model, overlay=None), {}, 2)
    painted = paint(OverlayOptions(), images, features={"masks": ranks})
    angle = torch.tensor(0.3)
    turned = torch.tensor([[angle.cos(), -angle.sin(), 0.1], [angle.sin(), angle.cos(), -0.2]]).expand(4, 2, 3)
    for affine in (None, torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3), turned):
        seen = Seen({"masks": ranks}, None, affine)
        assert torch.equal(classifier.see(images, seen), plain.see(painted, Seen({}, None, affine)))
    mirrored = paint(OverlayOptions(), images.flip(3), features={"masks": ranks.flip(3)})
    flipped = sample_image(painted, torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3), 32)
    different = (mirrored.float() != flipped).any(dim=1)  # 32 pixels on 24 cells: a centre may lie on a border
    assert not different[:, :, [0, 1, 2, 29, 30, 31]].any() or different.float().mean() < 0.1


def test_light_changes_after_the_painting():
    ranks, images = some_ranks(3), some_images(3, 32, 32)
    overlay = Classifier(ModelOptions(backbone="resnet18", image_px=32, gates=(), overlay=OverlayOptions()), TAPS, 2)
    told = []

    def darker(moved: torch.Tensor) -> torch.Tensor:
        told.append(moved)
        return moved / 2

    found = overlay.see(images, Seen({"masks": ranks}), darker)
    painted = paint(OverlayOptions(), images, features={"masks": ranks})
    assert torch.equal(told[0], painted.float())
    assert torch.equal(found, overlay.see(images, Seen({"masks": ranks}), lambda _: painted / 2))


def test_masks_are_left_out_by_their_scores_without_a_new_extraction():
    ranks = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.uint8)
    for rank in range(1, 5):
        ranks[:, 0, 4 * rank : 4 * rank + 4] = rank
    scores = torch.zeros(2, 2, 255, 1)
    scores[0, :, :4, 0] = torch.tensor([0.9, 0.95, 0.7, 0.95])
    scores[1, :, :4, 0] = torch.tensor([0.5, 0.6, 0.7, 0.8])
    scores[0, 1, :4, 0] = torch.tensor([0.96, 0.97, 0.93, 0.94])
    features = {"masks": ranks, "mask_scores": scores}

    def painted(**options: float) -> list[set[int]]:
        kept = Overlay(OverlayOptions(**options), TAPS, 32).ranks(Seen(features), (SIDE, SIDE))  # type: ignore[arg-type]
        return [set(one.flatten().tolist()) - {0} for one in kept]

    assert painted() == [{1, 2, 3, 4}, {1, 2, 3, 4}]
    assert painted(min_iou=0.85) == [{1, 2, 4}, set()]
    assert painted(max_masks=2) == [{2, 4}, {3, 4}]
    assert painted(max_masks=1) == [{2}, {4}]
    assert painted(max_masks=3, min_iou=0.65) == [{1, 2, 4}, {3, 4}]
    assert painted(min_stability=0.95) == [{1, 2}, set()]
    assert painted(min_stability=0.935, max_masks=2) == [{2, 4}, set()]
    images = some_images(2, SIDE, SIDE)
    found = paint(OverlayOptions(palette="cutout", min_iou=0.85), images, features=features)
    assert torch.equal(found[1], images[1])
    assert not found[0, :, 12:16].any()
    assert torch.equal(found[0, :, 4:12], images[0, :, 4:12])


def test_a_map_is_laid_over_the_part_that_is_image():
    ranks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    ranks[0, :4, :4] = torch.arange(1, 17).view(4, 4)
    ranks[0, 4:] = 200  # padding, which must not be read
    ranks[0, :, 4:] = 201
    found = lay(ranks, torch.tensor([[0.5, 0.5]]), (8, 8))
    expected = ranks[0, :4, :4].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(found[0], expected)
    assert torch.equal(lay(ranks, torch.tensor([[0.5, 0.5]]), (4, 4))[0], ranks[0, :4, :4])
    assert torch.equal(lay(ranks, None, (8, 8)), ranks)
    uneven = lay(ranks, torch.tensor([[0.45, 0.5]]), (64, 64))
    assert uneven.max() <= 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tap": "neck"}, "model.overlay.tap is 'neck', which is no map of masks: name the tap 'masks'"),
        ({"tap": "masks@hflip"}, "model.overlay.tap is 'masks@hflip', .* there are none of views"),
        ({"opacity": 1.5}, "model.overlay.opacity is 1.5: give a number from 0 to 1"),
        ({"palette": "gaudy"}, "model.overlay.palette is 'gaudy': choose one of rank, random, binary, cutout"),
        ({"min_iou": -0.1}, "model.overlay.min_iou is -0.1: give a number from 0 to 1"),
        ({"min_stability": 2.0}, "model.overlay.min_stability is 2.0: give a number from 0 to 1"),
        ({"max_masks": 0}, "model.overlay.max_masks is 0: give a number from 1 up"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        OverlayOptions(**options)


def test_what_is_stored_has_to_fit():
    model = ModelOptions(backbone="resnet18", image_px=32, gates=(), overlay=OverlayOptions())
    with pytest.raises(ConfigError, match=r"model.overlay needs the tap 'masks', which the store does not hold"):
        Classifier(model, {"neck": (3, 4, 4)}, 2)
    with pytest.raises(ConfigError, match=r"'masks' has the shape \(3, 24, 24\) and that of masks is \(1, 24, 24\)"):
        Classifier(model, {"masks": (3, SIDE, SIDE)}, 2)
    wide = dataclasses.replace(model, image_px=100)
    with pytest.raises(
        ConfigError, match=r"more than 4 times wider than what is stored .* model.image_px to at most 96"
    ):
        Classifier(wide, TAPS, 2)
    scored = dataclasses.replace(model, overlay=OverlayOptions(max_masks=3))
    assert scored.taps == ("masks", "mask_scores")
    with pytest.raises(ConfigError, match=r"model.overlay needs the tap 'mask_scores'"):
        Classifier(scored, {"masks": (1, SIDE, SIDE)}, 2)
    with pytest.raises(ConfigError, match=r"The backbone is 'none', so there is no image to paint an overlay on"):
        Classifier(dataclasses.replace(model, backbone="none", fuse=("neck",)), {**TAPS, "neck": (3, 4, 4)}, 2)
    for uses in ({"gates": (("masks", "stem"),)}, {"fuse": ("mask_scores",)}):
        with pytest.raises(ConfigError, match=r"which holds masks and no features: paint it with model.overlay"):
            Classifier(dataclasses.replace(model, **uses), TAPS, 2)


def test_a_classifier_with_an_overlay_has_the_weights_and_costs_of_one_without():
    model = ModelOptions(backbone="resnet18", image_px=32, gates=(("neck", "stage1"),), overlay=OverlayOptions())
    taps = {**TAPS, "neck": (3, 4, 4)}
    painted, plain = Classifier(model, taps, 2), Classifier(dataclasses.replace(model, overlay=None), taps, 2)
    assert model.taps == ("neck", "masks")
    assert model.feature_taps == ("neck",)
    assert painted.state_dict().keys() == plain.state_dict().keys()
    assert painted.flop_counts() == plain.flop_counts()
    assert painted.taps == {"neck": (3, 4, 4), "masks": TAPS["masks"]}


@pytest.mark.parametrize("options", [{"palette": "random", "max_masks": 3}, {"palette": "cutout", "min_iou": 0.5}, {}])
def test_painting_is_part_of_what_onnx_computes(options):
    model = ModelOptions(backbone="resnet18", image_px=32, gates=(), overlay=OverlayOptions(**options))
    served = Served(Classifier(model, TAPS, 3), "softmax")
    scores = ("mask_scores",) if len(options) == 2 else ()
    assert served.inputs == ("images", "extents", "masks", *scores)
    assert _largest_difference(served, _exported(served, Path("run"))) < TOLERANCE
