"""Prompt encoder and mask decoder of a checkpoint in SAM's official key layout, in the official modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

from pipeline.encoders.checkpoint import require_same, shapes_of
from pipeline.encoders.masks.decoder import Decoder
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.recipe import Geometry, Recipe
from pipeline.errors import CheckpointError
from pipeline.weights import read_weights

PARTS = ("prompt_encoder", "mask_decoder")


def load_everything(recipe: Recipe, path: Path) -> Everything | None:
    """What finds masks, with the weights of a checkpoint of a whole SAM; None where no masks are asked for.

    Raises:
        CheckpointError: The checkpoint has no mask decoder, or that of another encoder.
    """
    if recipe.masks is None:
        return None
    prompts, masks = fill(recipe.architecture, path, decoder_state(recipe.architecture.name, path, read_weights(path)))
    grid = recipe.input_px // recipe.architecture.stride_px(recipe.architecture.named_depths["neck"])
    return Everything(Decoder(prompts, masks, recipe.input_px, grid), recipe.masks, recipe.input_px, recipe.precision)


def decoder_state(name: str, path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the two parts among those of a checkpoint.

    Raises:
        CheckpointError: It has none.
    """
    found = {key: value for key, value in state.items() if key.partition(".")[0] in PARTS}
    if {key.partition(".")[0] for key in found} != {*PARTS}:
        message = (
            f"{path}: has no prompt encoder and mask decoder, only an image encoder, and the tap 'masks' needs them: "
            f"name a checkpoint of a whole {name} as encoder.checkpoint (the demo's is made by `pipeline prepare`), or "
            f"leave 'masks' out of encoder.taps"
        )
        raise CheckpointError(message)
    return found


def fill(architecture: Geometry, path: Path, state: Mapping[str, Tensor]) -> tuple[PromptEncoder, MaskDecoder]:
    """Fill the official modules.

    Args:
        architecture: Whose they are.
        path: Where the tensors come from, for messages.
        state: By their names in a whole SAM.

    Raises:
        CheckpointError: A tensor is missing, unknown or misshapen.
    """
    modules = dict(zip(PARTS, new_modules(architecture), strict=True))
    shapes = {part: shapes_of(module.state_dict()) for part, module in modules.items()}
    expected = {f"{part}.{key}": shape for part in PARTS for key, shape in shapes[part].items()}
    require_same(path, f"the mask decoder of {architecture.name}", shapes_of(state), expected)
    for part, module in modules.items():
        own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
        module.load_state_dict({key: value.float() for key, value in own.items()}, assign=True)
        module.eval().requires_grad_(False)
    return modules["prompt_encoder"], modules["mask_decoder"]


def new_modules(architecture: Geometry) -> tuple[PromptEncoder, MaskDecoder]:
    """The official prompt encoder and mask decoder, shapes only (on the `meta` device)."""
    channels = architecture.channels_at(architecture.named_depths["neck"])
    with torch.device("meta"):
        prompts = PromptEncoder(
            embed_dim=channels, image_embedding_size=(1, 1), input_image_size=(1, 1), mask_in_chans=16
        )
        transformer = TwoWayTransformer(
            depth=2, embedding_dim=channels, mlp_dim=8 * channels, num_heads=architecture.decoder_heads
        )
        masks = MaskDecoder(transformer_dim=channels, transformer=transformer, iou_head_hidden_dim=channels)
    return prompts, masks
