"""Known masks as the masks of a perfect segmentation model, and the controls that are made from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.encoders import build_encoder, make_recipe
from pipeline.encoders.known_mask.maps import at_random, rank_map, shifted
from pipeline.errors import ConfigError

TAPS = ("mask", "masks", "masks:shifted", "masks:random")


def blobs() -> np.ndarray:
    """A large part, a small one, and one of a single pixel, in an image that is wider than high."""
    mask = np.zeros((200, 400), bool)
    mask[20:100, 40:200] = True
    mask[150:170, 300:340] = True
    mask[190, 10] = True
    return mask


def test_parts_are_ranked_by_area_and_lie_where_the_mask_is() -> None:
    found = rank_map(blobs(), 100)
    expected = np.zeros((100, 100), np.uint8)
    expected[10:50, 10:50] = 1
    expected[75:85, 75:85] = 2
    np.testing.assert_array_equal(found, expected)  # the single pixel fills an eighth of its cell


def test_a_mask_smaller_than_half_a_cell_is_not_lost() -> None:
    mask = np.zeros((200, 200), bool)
    mask[3, 4] = True
    found = rank_map(mask, 50)
    assert found[0, 1] == 1
    assert found.sum() == 1
    assert rank_map(np.zeros((50, 60), bool), 50).max() == 0


def test_only_the_255_largest_of_very_many_parts_are_kept() -> None:
    mask = np.zeros((64, 64), bool)
    mask[::2, ::2] = True  # 1024 parts of a pixel
    mask[:4, :4] = True
    found = rank_map(mask, 64)
    sizes = np.bincount(found.ravel())[1:]
    assert len(sizes) == 255
    assert sizes[0] == 16 + 5  # those that touch it belong to it, by a corner too
    assert set(sizes[1:]) == {1}


def test_shifted_masks_are_the_same_masks_elsewhere() -> None:
    known = np.zeros((100, 100), np.uint8)
    known[10:40, 20:50] = 1
    known[15:20, 55:60] = 2
    moved = shifted(known)
    steps = {tuple(np.argwhere(moved == rank)[0] - np.argwhere(known == rank)[0]) for rank in (1, 2)}
    assert len(steps) == 1  # as one, and not over the border
    np.testing.assert_array_equal(moved, np.roll(known, steps.pop(), axis=(0, 1)))
    assert not ((moved > 0) & (known > 0)).any()
    np.testing.assert_array_equal(moved, shifted(known.copy()))


def test_masks_that_reach_too_far_to_be_moved_inside_come_in_at_the_other_side() -> None:
    known = rank_map(blobs(), 100)  # its parts span three quarters of each side
    moved = shifted(known)
    np.testing.assert_array_equal(np.bincount(moved.ravel()), np.bincount(known.ravel()))
    assert ((moved > 0) & (known > 0)).sum() < 0.1 * (known > 0).sum()
    full = np.ones((8, 8), np.uint8)
    np.testing.assert_array_equal(shifted(full), full)
    assert shifted(np.zeros((8, 8), np.uint8)).max() == 0


def test_random_masks_have_the_same_sizes_at_the_border_too() -> None:
    one = np.zeros((100, 100), np.uint8)
    one[40:60, 30:75] = 1
    centres = []
    for turn in range(4):
        known = np.roll(one, 7 * turn, axis=0)
        drawn = at_random(known)
        assert (drawn == 1).sum() == (known == 1).sum() == 900
        np.testing.assert_array_equal(drawn, at_random(known.copy()))
        centres.append(tuple(np.argwhere(drawn == 1).mean(axis=0).round()))
    assert len(set(centres)) == 4


def test_of_many_random_masks_the_smaller_lie_on_top() -> None:
    known = np.zeros((60, 60), np.uint8)
    known[:40] = 1
    known[45:55, :50] = 2
    known[57:, :10] = 3
    sizes = np.bincount(at_random(known).ravel(), minlength=4)
    assert sizes[3] == 30
    assert sizes[2] <= 500
    assert sizes[1:].sum() <= 2400 + 500 + 30


def test_one_encoding_gives_features_maps_and_scores() -> None:
    encoder = build_encoder("mask", taps=TAPS)
    empty = np.zeros((30, 50), bool)
    batch = torch.stack([encoder.prepare(mask).pixels for mask in (blobs(), empty)])  # type: ignore[arg-type]
    found = encoder.encode(batch, torch.full((2, 2), 256), torch.float16)
    assert {tap: (tuple(one.shape[1:]), one.dtype) for tap, one in found.items()} == {
        "mask": ((4, 16, 16), torch.float16),
        "masks": ((1, 256, 256), torch.uint8),
        "mask_scores": ((2, 255, 1), torch.float32),
        "masks:shifted": ((1, 256, 256), torch.uint8),
        "mask_scores:shifted": ((2, 255, 1), torch.float32),
        "masks:random": ((1, 256, 256), torch.uint8),
        "mask_scores:random": ((2, 255, 1), torch.float32),
    }
    known = rank_map(blobs(), 256)
    np.testing.assert_array_equal(found["masks"][0, 0].numpy(), known)
    np.testing.assert_array_equal(found["masks:shifted"][0, 0].numpy(), shifted(known))
    np.testing.assert_array_equal(found["masks:random"][0, 0].numpy(), at_random(known))
    np.testing.assert_array_equal(found["mask"][0], build_encoder("mask", taps=["mask"]).encode(
        build_encoder("mask", taps=["mask"]).prepare(blobs()).pixels[None], torch.tensor([[256, 256]]), torch.float16
    )["mask"][0])  # fmt: skip
    count = int(known.max())
    for tap in TAPS[1:]:
        scores = found[tap.replace("masks", "mask_scores")]
        assert (scores[0, :, :count] == 1).all()
        assert scores[0].sum() == 2 * count
        assert not found[tap][1].any()
        assert not scores[1].any()


def test_only_a_store_with_maps_says_how_they_were_made() -> None:
    alone, both = make_recipe("mask", ("mask",)), make_recipe("mask", TAPS)
    assert "masks" not in alone.fingerprint("ab")
    assert both.fingerprint("ab")["masks"] == {"side_px": 256, "version": 1}
    assert list(both.fingerprint("ab")["taps"]) == [*TAPS]  # type: ignore[arg-type]
    for taps in ((), ("masks", "masks"), ("masks:other",)):
        with pytest.raises(ConfigError, match="the encoder 'mask' has the taps mask, masks, masks:shifted, masks:rand"):
            make_recipe("mask", taps)
