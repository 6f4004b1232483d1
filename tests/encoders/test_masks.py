"""Masks of everything in an image are those of SAM's own generator, and are stored in the form that they promise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data import demo_arrays
from pipeline.encoders import build_encoder, checkpoint_path
from pipeline.encoders.masks import everything as ours
from pipeline.encoders.masks.decoder import Decoder
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.masks.rules import MaskRules
from pipeline.encoders.masks.weights import decoder_state, fill, new_modules
from pipeline.encoders.sam.recipe import Architecture
from pipeline.encoders.tiny_vit.recipe import TINY_VITS
from pipeline.encoders.untrained import draw
from pipeline.weights import read_weights
from tests.encoders.official_masks import best_ious, official_masks, rules_for
from tests.encoders.seeded import image_like, relative_error

TINY = Architecture(
    "sam_tiny", width=24, blocks=5, heads=2, global_blocks=(1, 2, 4), neck=32, input_px=256, decoder_heads=4
)
GRID = 16


def modules(architecture: Any, seed: int = 0) -> tuple[Any, Any]:
    """The official prompt encoder and mask decoder, seeded, every part of which changes the masks."""
    generator = torch.Generator().manual_seed(seed)
    prompts, masks = (draw(module, generator).eval() for module in new_modules(architecture))
    torch.nn.init.normal_(prompts.pe_layer.positional_encoding_gaussian_matrix, generator=generator)
    for parameter in (*prompts.parameters(), *masks.parameters()):
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    side = architecture.input_px
    prompts.input_image_size, prompts.image_embedding_size = (side, side), (GRID, GRID)
    return prompts.requires_grad_(False), masks.requires_grad_(False)


def neck(channels: int, seed: int = 0, grid: int = GRID) -> Tensor:
    """A smooth map (h, w, C), so that masks have regions."""
    coarse = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (grid, grid), mode="bicubic")
    return fine[0].permute(1, 2, 0).contiguous()


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    """LiteMedSAM's own."""
    tiny, path = TINY_VITS["lite_medsam"], checkpoint_path("lite_medsam")
    prompts, masks = fill(tiny, path, decoder_state("lite_medsam", path, read_weights(path)))
    prompts.input_image_size, prompts.image_embedding_size = (256, 256), (64, 64)
    return prompts, masks


@torch.no_grad()
def answers(decoder: Decoder, map_: Tensor, prompts: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    seen = decoder.look(map_)
    told = decoder.ask(seen, prompts)
    return decoder.draw(seen, told, torch.arange(len(prompts)), numbers), told.predicted_iou[:, list(numbers)]


@pytest.mark.parametrize("kind", ["points", "boxes"])
@pytest.mark.parametrize("whose", ["seeded", "trained"])
def test_the_decoder_is_the_official_one(kind: str, whose: str, trained: tuple[Any, Any]) -> None:
    prompts, masks = modules(TINY) if whose == "seeded" else trained
    channels, grid = prompts.embed_dim, prompts.image_embedding_size[0]
    map_ = neck(channels, grid=grid)
    decoder = Decoder(copy.deepcopy(prompts), masks, 256, grid)
    random = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 200
    boxes = torch.cat([random[:, :2], random[:, :2] + random[:, 2:]], dim=1)
    with torch.no_grad():
        one = torch.ones(3, 1, dtype=torch.int)
        points = (random[:, None, :2], one) if kind == "points" else None
        sparse, dense = prompts(points=points, boxes=boxes if kind == "boxes" else None, masks=None)
        logits, predicted = masks(
            image_embeddings=map_.permute(2, 0, 1)[None],
            image_pe=prompts.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=kind == "points",
        )
        embedded = decoder.embed_points(random[:, :2]) if kind == "points" else decoder.embed_boxes(boxes)
    found, found_iou = answers(decoder, map_, embedded, (1, 2, 3) if kind == "points" else (0,))
    assert torch.equal(embedded, sparse)
    assert relative_error(found, logits) < 1e-5
    assert relative_error(found_iou, predicted) < 1e-5


@pytest.mark.parametrize("size", [(256, 256), (192, 256)], ids=str)
@pytest.mark.parametrize("kind", ["points", "boxes"])
@pytest.mark.parametrize("min_region_px", [0, 60])
def test_masks_are_those_of_the_official_generator(size: tuple[int, int], kind: Any, min_region_px: int) -> None:
    prompts, masks = modules(TINY, seed=4)
    map_ = neck(32, seed=1)
    decoder = Decoder(copy.deepcopy(prompts), masks, 256, GRID)
    rules = MaskRules(kind, points=6, stability_offset=0.02, overlap=1.0, min_region_px=min_region_px, side_px=256)
    rules = rules_for(decoder, map_, size, rules)
    theirs = official_masks(prompts, masks, map_, np.zeros((*size, 3), np.uint8), rules)
    with torch.no_grad():
        found, scores = Everything(decoder, rules, 256).masks(map_, size)
    assert len(theirs) > 10
    assert abs(len(found) - len(theirs)) <= 0.1 * len(theirs)
    inside = found[:, : size[0], : size[1]]
    assert inside.sum() == found.sum()  # nothing where there is no image
    ious = best_ious(inside.numpy(), np.stack([mask["segmentation"] for mask in theirs]))
    assert (ious >= 0.95).mean() >= 0.98, sorted(ious)[:5]
    best = [mask["predicted_iou"] for mask in theirs]
    assert scores[0, 0].item() == pytest.approx(best[0], rel=1e-4)
    assert set(np.round(best, 3)) - set(np.round(scores[0].tolist(), 3)) == set() or (ious < 1).any()


def test_masks_in_bfloat16_are_nearly_the_same() -> None:
    prompts, masks = modules(TINY, seed=4)
    decoder, map_ = Decoder(prompts, masks, 256, GRID), neck(32, seed=1)
    rules = MaskRules("points", points=5, predicted_iou=0.0, stability=0.0, overlap=1.0, min_region_px=0)
    with torch.no_grad():
        exact, _ = Everything(decoder, rules, 256).masks(map_, (256, 256))
        rounded, scores = Everything(decoder, rules, 256, "bfloat16").masks(map_, (256, 256))
    assert scores.dtype == torch.float32
    ious = best_ious(rounded.numpy(), exact.numpy())
    assert (ious > 0.95).mean() > 0.7
    assert (ious < 1).any()  # it was computed in that precision


def test_trained_weights_give_the_official_masks(trained: tuple[Any, Any]) -> None:
    prompts, masks = trained
    encoder = build_encoder("lite_medsam", checkpoint=checkpoint_path("lite_medsam"), taps=["neck"])
    image = np.repeat(demo_arrays(1, 256, seed=5)[0][0, :200, :, None], 3, axis=2)  # looks like ultrasound
    prepared = encoder.prepare(image)
    (map_,) = encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]))["neck"].permute(0, 2, 3, 1)
    decoder = Decoder(copy.deepcopy(prompts), masks, 256, 64)
    rules = rules_for(decoder, map_, (200, 256), MaskRules("boxes", box_sides=(0.45,), overlap=0.2))
    theirs = official_masks(prompts, masks, map_, image, rules)
    with torch.no_grad():
        everything = Everything(decoder, rules, 256)
        found, _ = everything.masks(map_, (200, 256))
        candidates, _ = everything.candidates(decoder.look(map_), (200, 256))
    assert 3 <= len(theirs) < len(candidates)  # some were of the same thing
    ious = best_ious(found[:, :200].numpy(), np.stack([mask["segmentation"] for mask in theirs]))
    assert ious.min() >= 0.95
    assert len(found) == len(theirs)


def test_ranks_go_by_area_and_smaller_masks_lie_on_top() -> None:
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 2:4] = True  # the best, and the smallest
    masks[1, :6, :6] = True
    masks[2, 4:8, 4:8] = True
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.99, 0.98, 0.97, 0.96]])  # the fourth has no pixel on this grid
    painted, known = ours.paint(masks, scores)
    expected = np.zeros((8, 8), int)
    expected[:6, :6] = 1
    expected[4:8, 4:8] = 2
    expected[2:4, 2:4] = 3
    np.testing.assert_array_equal(painted[0].numpy(), expected)
    assert painted.dtype == torch.uint8
    assert known.shape == (2, 255, 1)
    torch.testing.assert_close(known[0, :4, 0], torch.tensor([0.8, 0.7, 0.9, 0.0]))
    torch.testing.assert_close(known[1, :4, 0], torch.tensor([0.98, 0.97, 0.99, 0.0]))
    assert (known[0, :, 0] > 0).sum() == 3


def test_beyond_255_the_worst_are_left_out() -> None:
    masks = torch.zeros(300, 1, 300, dtype=torch.bool)
    for number, mask in enumerate(masks):
        mask[0, number] = True
    painted, known = ours.paint(masks, torch.linspace(1, 0.1, 300).repeat(2, 1))
    assert int((known[0] > 0).sum()) == 255
    assert painted[0, 0, :255].min() == 1
    assert painted[0, 0, 255:].max() == 0


def test_no_mask_is_a_map_of_zeros() -> None:
    prompts, masks = modules(TINY)
    decoder = Decoder(prompts, masks, 256, GRID)
    rules = MaskRules("points", points=2, predicted_iou=1.0, stability=1.0, stability_offset=100.0)
    with torch.no_grad():
        painted, known = Everything(decoder, rules, 256)(neck(32), (256, 256))
    assert painted.shape == (1, 256, 256)
    assert known.shape == (2, 255, 1)
    assert not painted.any()
    assert not known.any()


@pytest.mark.parametrize("seed", range(3))
def test_small_regions_go_as_the_official_code_lets_them_go(seed: int) -> None:
    from segment_anything.utils.amg import remove_small_regions

    noise = image_like(64, 80, seed)[..., 0] > 120
    wanted, _ = remove_small_regions(noise, 12, "holes")
    wanted, _ = remove_small_regions(wanted, 12, "islands")
    assert (wanted != noise).any()
    np.testing.assert_array_equal(ours._clean(noise, 12), wanted)
    few = np.zeros((20, 20), bool)
    few[3, 3:5], few[10, 10] = True, True
    wanted, _ = remove_small_regions(few, 12, "islands")
    np.testing.assert_array_equal(ours._clean(few, 12), wanted)


def test_boxes_cover_an_image_at_each_scale() -> None:
    boxes = ours.box_grid((100, 200), (0.25, 1.0), 0.5)
    sides = (boxes[:, 2:] - boxes[:, :2]).unique(dim=0).tolist()
    assert sides == [[50.0, 50.0], [200.0, 100.0]]  # a box as large as the image is cut at its borders
    small = boxes[:-1]
    assert small[:, 0].unique().tolist() == [0, 25, 50, 75, 100, 125, 150]
    assert small[:, 1].unique().tolist() == [0, 25, 50]
    assert boxes.min() == 0
    assert boxes.amax(0).tolist() == [150, 50, 200, 100]


def test_points_are_those_of_the_official_grid() -> None:
    from segment_anything.utils.amg import build_point_grid

    wanted = build_point_grid(5) * np.array([[200, 100]])
    np.testing.assert_allclose(ours.point_grid((100, 200), 5).numpy(), wanted, rtol=1e-6)
