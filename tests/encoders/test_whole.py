"""A whole SAM in the official layout: official code reads what we write and finds the same masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from pipeline.encoders import ARCHITECTURES, build_encoder, load_encoder, write_untrained_encoder
from pipeline.encoders.masks.weights import new_modules
from pipeline.encoders.sam.whole import decode, draw_whole, write_sam
from pipeline.errors import CheckpointError
from tests.encoders.seeded import image_like

DEMO = ARCHITECTURES["sam_demo"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sam_demo.pth"
    write_untrained_encoder("sam_demo", path, seed=3)
    return path


def official_demo() -> Sam:
    """The official class built by hand at the miniature's sizes, none of which are read from our code."""
    return Sam(
        ImageEncoderViT(
            img_size=256,
            patch_size=16,
            embed_dim=96,
            depth=6,
            num_heads=3,
            out_chans=64,
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
            use_rel_pos=True,
            window_size=7,
            global_attn_indexes=(1, 3, 5),
        ),
        PromptEncoder(embed_dim=64, image_embedding_size=(16, 16), input_image_size=(256, 256), mask_in_chans=16),
        MaskDecoder(
            transformer_dim=64,
            transformer=TwoWayTransformer(depth=2, embedding_dim=64, mlp_dim=512, num_heads=4),
            iou_head_hidden_dim=64,
        ),
    ).eval()


def test_its_sizes_are_those_of_the_official_model() -> None:
    with torch.device("meta"):
        official = sam_model_registry["vit_b"](checkpoint=None)
    ours = dict(zip(("prompt_encoder", "mask_decoder"), new_modules(ARCHITECTURES["sam_vit_b"]), strict=True))
    expected = {key: value.shape for key, value in official.state_dict().items() if not key.startswith("image_encoder")}
    assert {f"{part}.{k}": v.shape for part, module in ours.items() for k, v in module.state_dict().items()} == expected
    heads = [layer.self_attn.num_heads for layer in official.mask_decoder.transformer.layers]
    assert [layer.self_attn.num_heads for layer in ours["mask_decoder"].transformer.layers] == heads


def test_the_official_predictor_finds_the_same_masks(path: Path) -> None:
    official = official_demo()
    official.load_state_dict(torch.load(path, weights_only=True), strict=True)
    image = image_like(96, 128)
    predictor = SamPredictor(official)
    predictor.set_image(image)
    encoder = build_encoder("sam_demo", checkpoint=path, taps=["neck", "masks"])
    prepared = encoder.prepare(image)
    neck = encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]), torch.float32)["neck"]
    decoder = encoder.everything.decoder
    seen = decoder.look(neck[0].permute(1, 2, 0))
    point, box = np.array([40, 60]), np.array([10, 20, 90, 70])  # x, y in an image half as large as the input
    for asked, tokens in (
        (
            {"point_coords": point[None], "point_labels": np.ones(1)},
            decoder.embed_points(2.0 * torch.tensor(point)[None]),
        ),
        ({"box": box}, decoder.embed_boxes(2.0 * torch.tensor(box)[None])),
    ):
        answers = decoder.ask(seen, tokens)
        ours = decoder.draw(seen, answers, torch.tensor([0]), (0, 1, 2, 3))
        for several, which in ((False, slice(0, 1)), (True, slice(1, 4))):
            masks, scores, low = predictor.predict(**asked, multimask_output=several, return_logits=True)
            spread = float(low.std())
            np.testing.assert_allclose(ours[0, which].numpy(), low, atol=1e-4 * spread)
            np.testing.assert_allclose(answers.predicted_iou[0, which].numpy(), scores, atol=1e-4)
            assert 0 < (masks > 0).mean() < 1  # or equal masks would say little


def test_many_prompts_on_many_images_are_decoded_as_one_by_one(path: Path) -> None:
    sam = draw_whole(DEMO, torch.Generator().manual_seed(3)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    necks = torch.randn(3, 64, 16, 16, generator=generator)
    points = (256 * torch.rand(3, 1, 2, generator=generator), torch.ones(3, 1))
    together = decode(sam, necks, points)
    for i in range(3):
        sparse, dense = sam.prompt_encoder(points=(points[0][i : i + 1], points[1][:1]), boxes=None, masks=None)
        alone = sam.mask_decoder.predict_masks(necks[i : i + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_whole_sam_is_a_checkpoint_of_its_encoder(path: Path) -> None:
    whole, encoder = torch.load(path, weights_only=True), load_encoder(DEMO, path)
    for key, value in encoder.state_dict().items():
        assert torch.equal(whole[f"image_encoder.{key}"], value)


def test_weights_are_drawn_from_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first, same, other = (draw_whole(DEMO, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    key = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    assert torch.equal(first.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    write_sam(first, tmp_path / "whole.pth")
    read = torch.load(tmp_path / "whole.pth", weights_only=True)
    assert all(torch.equal(value, read[name]) for name, value in first.state_dict().items())


def test_an_encoder_alone_still_loads_and_is_refused_for_masks_only(tmp_path: Path, path: Path) -> None:
    alone = {
        key.removeprefix("image_encoder."): value
        for key, value in torch.load(path, weights_only=True).items()
        if key.startswith("image_encoder.")
    }
    torch.save(alone, tmp_path / "encoder.pth")
    assert set(build_encoder("sam_demo", checkpoint=tmp_path / "encoder.pth", taps=["neck"]).taps) == {"neck"}
    with pytest.raises(CheckpointError, match=r"encoder\.pth: has no prompt encoder and mask decoder"):
        build_encoder("sam_demo", checkpoint=tmp_path / "encoder.pth", taps=["masks"])
