"""Features equal the official encoder's: its module with forward hooks, and `SamPredictor.set_image`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.encoders import ARCHITECTURES, Encoder, build_encoder
from pipeline.encoders.preprocessing import normalise
from pipeline.encoders.recipe import Precision
from tests.encoders.seeded import hooked, image_like, official_encoder, predictor, relative_error, seeded_state

LIMITS: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 2e-2}
IMAGES = {
    "wide": image_like(90, 310),
    "tall": image_like(401, 133),
    "square": image_like(256, 256),
    "grey": image_like(200, 280, grey=True),
    "tiny": image_like(5, 7),
}


def encode(encoder: Encoder, *images: npt.NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    prepared = [encoder.prepare(image) for image in images]
    return encoder.encode(torch.stack([p.pixels for p in prepared]), torch.tensor([p.size for p in prepared]))


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("input_px", [128, 256, 512])
def test_every_block_equals_the_official_one(demo_checkpoint: Path, input_px: int, precision: Precision) -> None:
    architecture = ARCHITECTURES["sam_demo"]
    blocks = [f"block:{number}" for number in range(architecture.blocks)]
    named = {"early": "block:1", "middle": "block:3", "late": "block:5"}
    encoder = build_encoder(
        "sam_demo",
        checkpoint=demo_checkpoint,
        taps=["patch", *blocks, "neck", *named],
        input_px=input_px,
        precision=precision,
    )
    vit = official_encoder(architecture, seeded_state(architecture), input_px)
    prepared = encoder.prepare(IMAGES["wide"])
    pixels, sizes = prepared.pixels[None], torch.tensor([prepared.size])
    with hooked(vit) as expected:
        vit(normalise(pixels, sizes))
    found = encoder.encode(pixels, sizes)
    for tap, features in found.items():
        assert features.dtype == torch.float32
        assert relative_error(features, expected[named.get(tap, tap)]) <= LIMITS[precision], tap


def test_vit_b_at_full_size_equals_the_official_predictor(vit_b_checkpoint: Path) -> None:
    architecture = ARCHITECTURES["sam_vit_b"]
    vit = official_encoder(architecture, seeded_state(architecture), 1024)
    oracle = predictor(vit)
    with hooked(vit) as expected:
        oracle.set_image(IMAGES["wide"])
    expected |= {name: expected[f"block:{n}"] for name, n in (("early", 2), ("middle", 5), ("late", 8))}
    for precision, limit in LIMITS.items():
        encoder = build_encoder(
            "sam_vit_b",
            checkpoint=vit_b_checkpoint,
            taps=["patch", "early", "middle", "late", "neck"],
            precision=precision,
        )
        found = encode(encoder, IMAGES["wide"])
        for tap, features in found.items():
            assert relative_error(features, expected[tap]) <= limit, (tap, precision)
        assert relative_error(found["neck"], oracle.get_image_embedding()) <= limit


def test_vit_b_neck_equals_the_official_predictor_for_any_shape(vit_b_checkpoint: Path) -> None:
    architecture = ARCHITECTURES["sam_vit_b"]
    oracle = predictor(official_encoder(architecture, seeded_state(architecture), 256))
    encoder = build_encoder("sam_vit_b", checkpoint=vit_b_checkpoint, taps=["neck"], input_px=256)
    for shape, image in IMAGES.items():
        oracle.set_image(image)
        found = encode(encoder, image)["neck"]
        assert relative_error(found, oracle.get_image_embedding()) <= 1e-5, shape


def test_a_batch_gives_what_its_images_give_alone(demo_checkpoint: Path) -> None:
    encoder = build_encoder("sam_demo", checkpoint=demo_checkpoint, taps=["early", "neck"], pool=2)
    images = [IMAGES["wide"], IMAGES["tall"], IMAGES["tiny"]]
    together = encode(encoder, *images)
    for row, image in enumerate(images):
        for tap, features in encode(encoder, image).items():
            assert relative_error(together[tap][row], features[0]) <= 1e-5


def test_the_pool_is_the_mean_of_each_square_of_tokens(demo_checkpoint: Path) -> None:
    plain = build_encoder("sam_demo", checkpoint=demo_checkpoint, taps=["late"])
    pooled = build_encoder("sam_demo", checkpoint=demo_checkpoint, taps=["late"], pool=4)
    features = encode(plain, IMAGES["grey"])["late"].numpy()
    by_hand = np.empty((1, 96, 4, 4), np.float32)
    for row in range(4):
        for column in range(4):
            square = features[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            by_hand[:, :, row, column] = square.mean((2, 3))
    np.testing.assert_allclose(encode(pooled, IMAGES["grey"])["late"].numpy(), by_hand, rtol=1e-4, atol=1e-5)
