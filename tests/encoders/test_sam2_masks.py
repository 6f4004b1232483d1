"""SAM 2's masks are those that transformers' own model gives for the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from pipeline.encoders.hiera import encoder as hiera
from pipeline.encoders.hiera.masks import finer_maps
from pipeline.encoders.hiera.recipe import Hiera
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.preprocessing import normalise
from pipeline.encoders.recipe import Recipe
from pipeline.errors import CheckpointError
from tests.encoders.seeded import image_like, relative_error

SMALL = Hiera(
    "sam2_test", width=16, heads=1, blocks=(1, 2, 3, 2), global_blocks=(4,), background=5, neck=32, input_px=256
)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A whole small SAM 2 with seeded weights, and its folder as transformers saves it."""
    decoder = {"hidden_size": 32, "mlp_dim": 256, "iou_head_hidden_dim": 32}
    config = transformers.Sam2Config(
        vision_config={**SMALL.settings, "backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]]},
        prompt_encoder_config={"hidden_size": 32, "image_size": 256},
        mask_decoder_config=decoder,
    )
    model = transformers.Sam2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 or "pos_embed" in name or "no_memory" in name:
            parameter.data = 0.1 * noise + float("norm" in name and name.endswith("weight"))
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    path = tmp_path_factory.mktemp("sam2")
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path)
    return model, path


def build(folder: Path, **rules: Any) -> hiera.HieraEncoder:
    return hiera.build(Recipe.of(SMALL, ("neck", "masks"), None, None, "float32", None, rules), folder, "cpu")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_the_decoder_is_that_of_transformers(official: tuple[Any, Path], kind: str) -> None:
    model, folder = official
    encoder = build(folder)
    prepared = encoder.prepare(image_like(120, 160))
    images = normalise(prepared.pixels[None], torch.tensor([prepared.size]), "sam2")
    random = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 120
    boxes = torch.cat([random[:, :2], random[:, :2] + random[:, 2:]], dim=1)
    asked = {"input_points": random[None, :, None, :2]} if kind == "points" else {"input_boxes": boxes[None]}
    theirs = model(pixel_values=images, multimask_output=True, **asked)
    maps = [map_ for depth, map_ in enumerate(encoder.maps(images)) if depth in encoder.mask_depths]
    everything = encoder.everything
    assert isinstance(everything, Everything)
    decoder = everything.decoder
    seen = decoder.look(maps[2][0], finer_maps(encoder.vision, *maps[:2]))
    told = decoder.ask(seen, decoder.embed_points(random[:, :2]) if kind == "points" else decoder.embed_boxes(boxes))
    logits = decoder.draw(seen, told, torch.arange(3), (1, 2, 3))
    assert relative_error(logits, theirs.pred_masks[0]) < 1e-5
    assert relative_error(told.predicted_iou[:, 1:], theirs.iou_scores[0]) < 1e-5


def test_masks_come_with_the_features_of_one_pass(official: tuple[Any, Path]) -> None:
    rules = {"points": 4, "predicted_iou": 0.0, "stability": 0.0, "overlap": 1.0, "side_px": 64}
    encoder = build(official[1], **rules)
    prepared = [encoder.prepare(image_like(90, 60 + 40 * seed, seed)) for seed in range(2)]
    found = encoder.encode(torch.stack([one.pixels for one in prepared]), torch.tensor([one.size for one in prepared]))
    assert list(found) == ["neck", "masks", "mask_scores"]
    assert found["masks"].shape == (2, 1, 64, 64)
    assert found["masks"].dtype == torch.uint8
    assert (found["masks"].amax((1, 2, 3)) > 0).all()
    assert ((found["mask_scores"][:, 0] > 0).sum((1, 2)) > 1).all()


def test_a_vision_encoder_alone_finds_no_masks(official: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = official
    vision = {f"vision_encoder.{key}": value for key, value in model.vision_encoder.state_dict().items()}
    safetensors.torch.save_file(vision, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="has no prompt encoder and mask decoder"):
        build(tmp_path)
