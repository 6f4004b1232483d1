"""A whole SAM: image encoder, prompt encoder and mask decoder, in the official modules and key layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from pipeline.encoders.checkpoint import require_same, shapes_of
from pipeline.encoders.sam.recipe import Architecture
from pipeline.encoders.untrained import draw, write_whole
from pipeline.errors import CheckpointError
from pipeline.weights import read_weights

_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def draw_whole(architecture: Architecture, generator: torch.Generator) -> Sam:
    """A whole SAM with random weights; those of its image encoder are drawn first.

    Args:
        architecture: Whose sizes.
        generator: The same one draws the same weights; torch's global one is not touched.
    """
    vit, prompt_encoder, mask_decoder = _on_meta(architecture)
    draw(vit, generator)
    for part in (prompt_encoder, mask_decoder):
        draw(part, generator)
    nn.init.normal_(prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, generator=generator)
    return Sam(vit, prompt_encoder, mask_decoder)


def load_whole(architecture: Architecture, path: Path) -> Sam:
    """Fill the official modules from a checkpoint of a whole SAM.

    Args:
        architecture: What the checkpoint must hold.
        path: `.pth` or `.pt` (read with `weights_only=True`), or `.safetensors`.

    Returns:
        The official model in float32 on the CPU, in evaluation mode, without gradients.

    Raises:
        CheckpointError: The file is missing or no checkpoint, it holds an image encoder alone, or a key is missing,
            unknown or misshapen.
    """
    state = read_weights(path)
    if not any(key.startswith("mask_decoder.") for key in state):
        message = (
            f"{path}: holds an image encoder alone, and masks need the prompt encoder and the mask decoder beside it; "
            f"name a checkpoint of a whole {architecture.name} (the demo's: remove this one and run `pipeline prepare`)"
        )
        raise CheckpointError(message)
    state = {key: value for key, value in state.items() if key.partition(".")[0] not in ("pixel_mean", "pixel_std")}
    parts = dict(zip(_PARTS, _on_meta(architecture), strict=True))
    expected = {f"{part}.{key}": shape for part in _PARTS for key, shape in shapes_of(parts[part].state_dict()).items()}
    require_same(path, architecture.name, shapes_of(state), expected)
    for name, part in parts.items():
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        part.load_state_dict({key: value.float() for key, value in own.items()}, assign=True)
    return Sam(*parts.values()).eval().requires_grad_(False)


def write_sam(sam: Sam, path: Path) -> None:
    """Write a checkpoint in the official key layout; replaced at once or not at all."""
    write_whole(path, partial(torch.save, sam.state_dict()))


def decode(
    sam: Sam, neck: Tensor, points: tuple[Tensor, Tensor] | None = None, boxes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All four masks for one prompt on each of B images; the official decoder takes many prompts on one image.

    Args:
        sam: The official model.
        neck: (B, C, h, w), the image encoder's last map; for several prompts on an image, repeated.
        points: Coordinates (B, n, 2) as x and y in pixels of the input, and labels (B, n): 1 on the object, 0 off it.
        boxes: (B, 4), x and y of the upper left and of the lower right corner.

    Returns:
        Logits (B, 4, 4h, 4w) of the single mask and of the three masks, and the predicted IoU (B, 4) of each.
    """
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
    decoder = sam.mask_decoder
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output.expand(len(neck), -1, -1), sparse], dim=1)
    places = sam.prompt_encoder.get_dense_pe().expand(len(neck), -1, -1, -1)
    hs, source = decoder.transformer(neck + dense, places, tokens)
    upscaled = decoder.output_upscaling(source.mT.reshape(neck.shape))
    heads = zip(decoder.output_hypernetworks_mlps, hs[:, 1:].unbind(1), strict=False)
    weights = torch.stack([head(token) for head, token in heads], dim=1)  # (B, 4, C / 8)
    return torch.einsum("bkc,bchw->bkhw", weights, upscaled), decoder.iou_prediction_head(hs[:, 0])


def _on_meta(architecture: Architecture) -> tuple[nn.Module, PromptEncoder, MaskDecoder]:
    """The three official modules, shapes only."""
    channels, grid = architecture.neck, architecture.input_px // architecture.patch_px
    with torch.device("meta"):
        prompt_encoder = PromptEncoder(
            embed_dim=channels,
            image_embedding_size=(grid, grid),
            input_image_size=(architecture.input_px, architecture.input_px),
            mask_in_chans=16,
        )
        mask_decoder = MaskDecoder(
            transformer_dim=channels,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=channels, mlp_dim=8 * channels, num_heads=architecture.decoder_heads
            ),
            iou_head_hidden_dim=channels,
        )
    return architecture.build(), prompt_encoder, mask_decoder
