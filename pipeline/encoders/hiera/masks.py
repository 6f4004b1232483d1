"""SAM 2's mask decoder: that of SAM with a token more, finer maps of the image, and other names in its files.

The arithmetic is that of `transformers.Sam2Model`, which is the oracle of the tests. Its object score only says whether
something is there at all, in a video; with a single image nobody asks for it, so it is not computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from pipeline.encoders.layers import convolve
from pipeline.encoders.masks.decoder import Decoder, Seen
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.masks.weights import decoder_state, fill
from pipeline.encoders.recipe import Recipe
from pipeline.errors import CheckpointError
from pipeline.weights import read_weights

_OWN = "mask_decoder.obj_score_token.weight", "shared_image_embedding.positional_embedding", "no_memory_embedding"
_CONVOLUTIONS = "mask_decoder.conv_s0", "mask_decoder.conv_s1"
_LEFT_OUT = ("mask_decoder.pred_obj_score_head.",)
_NAMES = tuple(
    (re.compile(ours), official)
    for ours, official in (
        (r"\.layer_norm(\d|_final_attn)\.", r".norm\1."),
        (r"(self_attn|_image|_token)\.o_proj\.", r"\1.out_proj."),
        (r"\.mlp\.proj_in\.", ".mlp.lin1."),
        (r"\.mlp\.proj_out\.", ".mlp.lin2."),
        (r"(mlps\.\d|prediction_head)\.layers\.0\.", r"\1.layers.1."),
        (r"(mlps\.\d|prediction_head)\.proj_in\.", r"\1.layers.0."),
        (r"(mlps\.\d|prediction_head)\.proj_out\.", r"\1.layers.2."),
        (r"\.upscale_conv1\.", ".output_upscaling.0."),
        (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
        (r"\.upscale_conv2\.", ".output_upscaling.3."),
        (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
        (r"\.mask_embed\.norm1\.", ".mask_downscaling.1."),
        (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
        (r"\.mask_embed\.norm2\.", ".mask_downscaling.4."),
        (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
        (r"\.shared_embedding\.positional_embedding", ".pe_layer.positional_encoding_gaussian_matrix"),
    )
)


class Sam2Decoder(Decoder):
    """Prompt encoder and mask decoder of SAM 2, frozen."""

    def __init__(
        self,
        prompts: PromptEncoder,
        masks: MaskDecoder,
        input_px: int,
        grid: int,
        own: Mapping[str, Tensor],
    ) -> None:
        """Make one; see `Decoder`.

        Args:
            prompts: With its weights.
            masks: With its weights.
            input_px: Side of the square input, px.
            grid: Cells along each side of the image encoder's coarsest map.
            own: Tensors that SAM has not, by their names in the file.
        """
        super().__init__(prompts, masks, input_px, grid)
        object_token, places, no_memory = (own[name].float() for name in _OWN)
        self.register_buffer("object_token", object_token)
        self.register_buffer("image_places", places)
        self.register_buffer("no_memory", no_memory.reshape(-1))
        self.finest, self.finer = (_convolution(own, name) for name in _CONVOLUTIONS)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Tokens of boxes (B, 4): (B, 3, C), the third of no point."""
        no_point = self.prompts.not_a_point_embed.weight.expand(len(boxes), 1, -1)
        return torch.cat([super().embed_boxes(boxes), no_point], dim=1)

    def look(self, neck: Tensor, finer: Sequence[Tensor] = ()) -> Seen:
        """Compute what all prompts on an image share.

        Args:
            neck: (h, w, C), the image encoder's coarsest map.
            finer: Its maps of four times and twice the sides, (4h, 4w, C) and (2h, 2w, C).
        """
        finest, fine = finer
        h, w, _ = neck.shape
        four = convolve(self.finer, fine[None])[0].float().view(h, 2, w, 2, -1).transpose(1, 2)
        sixteen = convolve(self.finest, finest[None])[0].float().view(h, 2, 2, w, 2, 2, -1).permute(0, 3, 1, 4, 2, 5, 6)
        arranged = (four.reshape(h * w, 4, -1), sixteen.reshape(h * w, 4, 4, -1))
        return super().look(neck + self.get_buffer("no_memory"), arranged)

    def _places(self) -> Tensor:
        """The embeddings (N, C) of the cells' places, of which the image has its own matrix."""
        layer = self.prompts.pe_layer
        prompts_own = layer.positional_encoding_gaussian_matrix
        layer.positional_encoding_gaussian_matrix = self.get_buffer("image_places")
        places = super()._places()
        layer.positional_encoding_gaussian_matrix = prompts_own
        return places

    def _own_tokens(self) -> Tensor:
        return torch.cat([self.get_buffer("object_token"), super()._own_tokens()])

    def _predicted_iou(self, token: Tensor) -> Tensor:
        return F.sigmoid(super()._predicted_iou(token))


def load_everything(recipe: Recipe, file: Path) -> Everything | None:
    """What finds masks, with the weights of a whole SAM 2 as transformers saves it; None where no masks are asked for.

    Raises:
        CheckpointError: The file has no mask decoder, or that of another encoder.
    """
    if recipe.masks is None:
        return None
    state = read_weights(file)
    name = recipe.architecture.name
    official = {_official(key): value for key, value in decoder_state(name, file, state).items()}
    own = {key: state[key] for key in state if key in _OWN or key.startswith(_CONVOLUTIONS)}
    expected = {*_OWN, *(f"{part}.{kind}" for part in _CONVOLUTIONS for kind in ("weight", "bias"))}
    if own.keys() != expected:
        message = f"{file}: lacks {min(expected - own.keys())!r}, so its masks cannot be those of {name}"
        raise CheckpointError(message)
    prompts, masks = fill(recipe.architecture, file, _split_points(official, own))
    grid = recipe.input_px // recipe.architecture.stride_px(recipe.architecture.named_depths["neck"])
    decoder = Sam2Decoder(prompts, masks, recipe.input_px, grid, own)
    return Everything(decoder, recipe.masks, recipe.input_px, recipe.precision)


def finer_maps(vision: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The neck's two finer levels from the ends (1, h, w, C) of the first two stages."""
    finest, fine = vision.neck.convs[3], vision.neck.convs[2]
    return convolve(finest, first)[0].float(), convolve(fine, second)[0].float()


def _official(key: str) -> str:
    """The name that a tensor would have in a checkpoint of SAM."""
    for ours, official in _NAMES:
        key = ours.sub(official, key)
    return key


def _split_points(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their official names, without those that SAM has not; the four kinds of points are one tensor here."""
    points = state.get("prompt_encoder.point_embed.weight", torch.empty(0))
    split = {f"prompt_encoder.point_embeddings.{kind}.weight": row[None] for kind, row in enumerate(points)}
    places = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    shared = {} if places in state else {places: own["shared_image_embedding.positional_embedding"]}
    rest = {
        key: value
        for key, value in state.items()
        if key not in own and not key.startswith((*_LEFT_OUT, "prompt_encoder.point_embed."))
    }
    return {**rest, **split, **shared}


def _convolution(own: Mapping[str, Tensor], name: str) -> nn.Conv2d:
    weight, bias = own[f"{name}.weight"].float(), own[f"{name}.bias"].float()
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer.requires_grad_(False)
