"""A whole SAM: image encoder, prompt encoder and mask decoder, in the official modules and key layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

from pipeline.encoders.masks.weights import new_modules
from pipeline.encoders.sam.recipe import Architecture
from pipeline.encoders.untrained import draw, write_whole


def draw_whole(architecture: Architecture, generator: torch.Generator) -> Sam:
    """A whole SAM with random weights; those of its image encoder are drawn first.

    Args:
        architecture: Whose sizes.
        generator: The same one draws the same weights; torch's global one is not touched.
    """
    vit = architecture.build()
    draw(vit, generator)
    return with_decoder(vit, architecture, generator)


def with_decoder(vit: ImageEncoderViT, architecture: Architecture, generator: torch.Generator) -> Sam:
    """Put a prompt encoder and a mask decoder with random weights behind an image encoder; see `draw_whole`."""
    prompt_encoder, mask_decoder = new_modules(architecture)
    for part in (prompt_encoder, mask_decoder):
        draw(part, generator)
    nn.init.normal_(prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, generator=generator)
    side, grid = architecture.input_px, architecture.input_px // architecture.patch_px
    prompt_encoder.input_image_size, prompt_encoder.image_embedding_size = (side, side), (grid, grid)
    return Sam(vit, prompt_encoder, mask_decoder)


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
