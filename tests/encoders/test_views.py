"""A view's features are those of the turned image, padding included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.encoders import VIEWS, build_encoder
from pipeline.encoders.preprocessing import turned
from tests.encoders.seeded import image_like

TRANSPOSITIONS = {
    "rot90": Image.Transpose.ROTATE_90,
    "rot180": Image.Transpose.ROTATE_180,
    "rot270": Image.Transpose.ROTATE_270,
    "hflip": Image.Transpose.FLIP_LEFT_RIGHT,
    "vflip": Image.Transpose.FLIP_TOP_BOTTOM,
    "transpose": Image.Transpose.TRANSPOSE,
    "transverse": Image.Transpose.TRANSVERSE,
}


def test_every_view_but_the_first_is_one_of_pillows_transpositions() -> None:
    assert next(iter(VIEWS)) == "identity"
    assert set(TRANSPOSITIONS) == set(VIEWS) - {"identity"}


@pytest.mark.parametrize("view", TRANSPOSITIONS)
def test_features_of_a_view_are_those_of_the_image_turned_by_pillow(demo_checkpoint: Path, view: str) -> None:
    tap = f"neck@{view}"
    encoder = build_encoder("sam_demo", checkpoint=demo_checkpoint, taps=["neck", tap])
    images = [image_like(256, 150), image_like(77, 256)]  # of the input's size: resizing leaves them alone
    batch = [encoder.prepare(image) for image in images]
    pixels, sizes = torch.stack([p.pixels for p in batch]), torch.tensor([p.size for p in batch])
    found = encoder.encode(pixels, sizes)
    for row, image in enumerate(images):
        by_pillow = np.asarray(Image.fromarray(image).transpose(TRANSPOSITIONS[view]))
        prepared = encoder.prepare(by_pillow)
        expected = encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]))["neck"]
        torch.testing.assert_close(found[tap][row], expected[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found["neck"][row], expected[0], atol=1e-2)
        assert tuple(turned(pixels, sizes, view)[1][row].tolist()) == by_pillow.shape[:2]


def test_views_are_in_the_fingerprint(demo_checkpoint: Path) -> None:
    def fingerprint(*taps: str) -> dict[str, object]:
        return dict(build_encoder("sam_demo", checkpoint=demo_checkpoint, taps=taps).fingerprint())

    assert fingerprint("neck", "late@rot90")["views"] == {"late@rot90": "rot90"}
    assert fingerprint("neck")["views"] == {}
