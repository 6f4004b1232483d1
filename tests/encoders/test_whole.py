"""A whole SAM in the official layout: official code reads what we write and finds the same masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor

from pipeline.encoders import ARCHITECTURES, build_encoder, load_encoder, write_untrained_encoder
from pipeline.encoders.sam.whole import decode, draw_whole, load_whole, write_sam
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


@pytest.mark.parametrize("name", ["sam_vit_b", "sam_vit_l", "sam_vit_h"])
def test_its_sizes_are_those_of_the_official_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        official = sam_model_registry[name.removeprefix("sam_")](checkpoint=None)
    monkeypatch.setattr("pipeline.encoders.sam.whole.read_weights", lambda path: official.state_dict())
    ours = load_whole(ARCHITECTURES[name], Path("whole.pth"))  # refuses another set of keys or shapes
    heads = [layer.self_attn.num_heads for layer in official.mask_decoder.transformer.layers]
    assert [layer.self_attn.num_heads for layer in ours.mask_decoder.transformer.layers] == heads


def prompts() -> list[tuple[dict[str, np.ndarray], tuple[Tensor, Tensor] | None, Tensor | None]]:
    """For an image of 96 x 128 px: as the official predictor takes them, and in pixels of the 256 px input."""
    clicks, labels = np.array([[40, 60], [100, 20]]), np.array([1, 0])
    box = np.array([10, 20, 90, 70])
    return [
        ({"point_coords": clicks[:1], "point_labels": labels[:1]}, (_twice(clicks[:1]), torch.ones(1, 1)), None),
        ({"point_coords": clicks, "point_labels": labels}, (_twice(clicks), torch.tensor([[1, 0]])), None),
        ({"box": box}, None, _twice(box)),
    ]


def _twice(at: np.ndarray) -> Tensor:
    return 2 * torch.tensor(at, dtype=torch.float32)[None]


def test_the_official_predictor_finds_the_same_masks(path: Path) -> None:
    official = official_demo()
    official.load_state_dict(torch.load(path, weights_only=True), strict=True)
    image = image_like(96, 128)
    predictor = SamPredictor(official)
    predictor.set_image(image)
    sam, encoder = load_whole(DEMO, path), build_encoder("sam_demo", checkpoint=path, taps=["neck"])
    prepared = encoder.prepare(image)
    neck = encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]), torch.float32)["neck"]
    for asked, points, box in prompts():
        logits, predicted = decode(sam, neck, points, box)
        for several in (False, True):
            masks, scores, low = predictor.predict(**asked, multimask_output=several, return_logits=True)
            which = slice(1, 4) if several else slice(0, 1)
            spread = float(low.std())
            np.testing.assert_allclose(logits[0, which].numpy(), low, atol=1e-4 * spread)
            np.testing.assert_allclose(predicted[0, which].numpy(), scores, atol=1e-4)
            ours = sam.postprocess_masks(logits[:, which], prepared.size, (96, 128))[0]
            np.testing.assert_allclose(ours.numpy(), masks, atol=1e-4 * spread)
            assert 0 < (masks > 0).mean() < 1  # or equal masks would say little


def test_many_prompts_on_many_images_are_decoded_as_one_by_one(path: Path) -> None:
    sam = load_whole(DEMO, path)
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
    whole, encoder = load_whole(DEMO, path), load_encoder(DEMO, path)
    assert not any(parameter.requires_grad for parameter in whole.parameters())
    for key, value in encoder.state_dict().items():
        assert torch.equal(whole.image_encoder.state_dict()[key], value)


def test_weights_are_drawn_from_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first, same, other = (draw_whole(DEMO, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    key = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    assert torch.equal(first.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    write_sam(first, tmp_path / "whole.pth")
    read = load_whole(DEMO, tmp_path / "whole.pth").state_dict()
    assert all(torch.equal(value, read[name]) for name, value in first.state_dict().items())


def test_an_encoder_alone_and_another_size_are_refused_for_masks(tmp_path: Path, path: Path) -> None:
    state = torch.load(path, weights_only=True)
    alone = {k.removeprefix("image_encoder."): v for k, v in state.items() if k.startswith("image_encoder.")}
    torch.save(alone, tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match=r"encoder\.pth: holds an image encoder alone, and masks need .* prepare"):
        load_whole(DEMO, tmp_path / "encoder.pth")
    torch.save(state | {"mask_decoder.iou_token.weight": torch.ones(1, 63)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"'mask_decoder\.iou_token\.weight' \(1, 63\) instead of \(1, 64\)"):
        load_whole(DEMO, tmp_path / "other.pth")
