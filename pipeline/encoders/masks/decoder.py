"""SAM's mask decoder for very many prompts on one image: the official arithmetic with a third of the products.

The official module projects all cells of the image anew for every prompt, though a prompt has a handful of tokens.
Here projections move to the side of the tokens: a score between a token and a cell is a product of the token's query,
carried back through the projection of keys, with the cell itself; and what a cell takes from the tokens is a sum of at
most `heads * tokens` vectors. What no prompt has changed yet, the first layer's keys, values and queries of the cells,
is computed once an image. Masks are drawn only of prompts that are worth it, from maps whose channels come last, so
that transposed convolutions are plain products. Equal to the official module but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn


@dataclass(frozen=True)
class Seen:
    """What the decoder computes once of an image, with N = h * w cells.

    Attributes:
        cells: (N, C), the image encoder's map with the embedding of no mask.
        places: (N, C), where each cell is.
        first: Of the first layer: keys and values for the tokens, and queries of the cells, each (heads, N, d).
        finer: What SAM 2 adds while masks are drawn: (N, 4, C / 4) and (N, 4, 4, C / 8); empty for SAM.
        grid: (h, w).
    """

    cells: Tensor
    places: Tensor
    first: tuple[Tensor, Tensor, Tensor]
    finer: tuple[Tensor, ...]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Answers:
    """What the decoder knows of B prompts before it draws a mask.

    Attributes:
        predicted_iou: (B, 4), of the single mask and of the three.
        tokens: (B, 4, C), of the same masks.
        cells: (B, N, C), the image as each prompt sees it.
    """

    predicted_iou: Tensor
    tokens: Tensor
    cells: Tensor


class Decoder(nn.Module):
    """Prompt encoder and mask decoder, frozen."""

    def __init__(self, prompts: PromptEncoder, masks: MaskDecoder, input_px: int, grid: int) -> None:
        """Make one of the official modules.

        Args:
            prompts: With its weights; changed in place to fit the input.
            masks: With its weights.
            input_px: Side of the square input, px.
            grid: Cells along each side of the image encoder's map.
        """
        super().__init__()
        prompts.input_image_size, prompts.image_embedding_size = (input_px, input_px), (grid, grid)
        self.prompts, self.masks = prompts, masks

    def embed_points(self, points: Tensor) -> Tensor:
        """Tokens of single points (B, 2), each on an object, x and y in pixels of the input: (B, 2, C)."""
        on_object = torch.ones(len(points), 1, dtype=torch.int, device=points.device)
        sparse, _ = self.prompts(points=(points[:, None], on_object), boxes=None, masks=None)
        return cast(Tensor, sparse)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Tokens of boxes (B, 4), x and y of the upper left and of the lower right corner: (B, 2, C)."""
        sparse, _ = self.prompts(points=None, boxes=boxes, masks=None)
        return cast(Tensor, sparse)

    def look(self, neck: Tensor, finer: Sequence[Tensor] = ()) -> Seen:
        """Compute what all prompts on an image share.

        Args:
            neck: (h, w, C), the image encoder's last map.
            finer: Maps of twice and four times its sides that go into the masks as they are drawn (SAM 2).
        """
        h, w, channels = neck.shape
        cells = (neck + self.prompts.no_mask_embed.weight[0]).reshape(-1, channels)
        places = self._places()
        layer = self._layers[0]
        to_tokens, to_cells = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        placed = cells + places
        first = (to_tokens.k_proj(placed), to_tokens.v_proj(cells), to_cells.q_proj(placed))
        keys, values, queries = (x.unflatten(1, (to_tokens.num_heads, -1)).transpose(0, 1).contiguous() for x in first)
        return Seen(cells, places, (keys, values, queries), tuple(finer), (h, w))

    def ask(self, seen: Seen, prompts: Tensor) -> Answers:
        """Run the two-way transformer.

        Args:
            seen: The image.
            prompts: (B, n, C), the tokens of each prompt.
        """
        own = self._own_tokens()
        start = torch.cat([own.expand(len(prompts), -1, -1), prompts], dim=1)
        tokens, cells, placed = start, seen.cells, seen.cells
        for number, layer in enumerate(self._layers):
            if number == 0:
                tokens = layer.self_attn(q=tokens, k=tokens, v=tokens)
            else:
                asking = tokens + start
                tokens = tokens + layer.self_attn(q=asking, k=asking, v=tokens)
            tokens = layer.norm1(tokens)
            attention = layer.cross_attn_token_to_image
            if number == 0:
                told = _tell_tokens_the_same(attention, tokens + start, *seen.first[:2])
            else:
                told = _tell_tokens(attention, tokens + start, cells, placed)
            tokens = layer.norm2(tokens + told)
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            queries = seen.first[2] if number == 0 else placed
            cells = layer.norm4(_tell_cells(layer.cross_attn_image_to_token, tokens + start, tokens, cells, queries))
            placed = cells + seen.places
        transformer: Any = self.masks.transformer
        told = _tell_tokens(transformer.final_attn_token_to_image, tokens + start, cells, placed)
        tokens = transformer.norm_final_attn(tokens + told)
        at = own.shape[0] - self.masks.num_mask_tokens
        return Answers(self._predicted_iou(tokens[:, at - 1]), tokens[:, at : own.shape[0]], cells)

    def draw(self, seen: Seen, answers: Answers, prompts: Tensor, numbers: Sequence[int]) -> Tensor:
        """Draw masks.

        Args:
            seen: The image.
            answers: What came of the prompts.
            prompts: (P,), which of them.
            numbers: Which of the four masks of each, M of them.

        Returns:
            Logits (P, M, 4h, 4w).
        """
        first, norm, _, second, _ = self.masks.output_upscaling
        x = _four_cells(first, answers.cells[prompts])  # (P, N, 4, C / 4)
        if seen.finer:
            x = x + seen.finer[0]
        x = F.gelu(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
        x = _four_cells(second, x)  # (P, N, 4, 4, C / 8)
        x = F.gelu(x + seen.finer[1] if seen.finer else x)
        heads: Any = self.masks.output_hypernetworks_mlps
        weights = torch.stack([heads[number](answers.tokens[prompts, number]) for number in numbers], dim=1)
        masks = weights @ x.flatten(1, 3).mT  # (P, M, N * 16)
        h, w = seen.grid
        masks = masks.view(len(prompts), len(numbers), h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(len(prompts), len(numbers), 4 * h, 4 * w)

    @property
    def _layers(self) -> Any:
        return self.masks.transformer.layers

    def _places(self) -> Tensor:
        """The embeddings (N, C) of the cells' places."""
        return cast(Tensor, self.prompts.get_dense_pe())[0].flatten(1).T.contiguous()

    def _own_tokens(self) -> Tensor:
        """The tokens (n, C) that every prompt begins with; the last four are those of the masks."""
        return torch.cat([self.masks.iou_token.weight, self.masks.mask_tokens.weight])

    def _predicted_iou(self, token: Tensor) -> Tensor:
        return cast(Tensor, self.masks.iou_prediction_head(token))


def _four_cells(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """Transposed convolution of 2 x 2 cells at a stride of 2: (..., C) to (..., 4, C'), the four as one reads."""
    weight = layer.weight.permute(0, 2, 3, 1)  # (C, 2, 2, C')
    assert layer.bias is not None
    return F.linear(x, weight.flatten(1).T, layer.bias.repeat(4)).view(*x.shape[:-1], 4, -1)


def _heads(layer: nn.Linear, x: Tensor, heads: int) -> Tensor:
    """Project tokens: (B, T, C) to (B, heads, T, d)."""
    projected: Tensor = layer(x)
    return projected.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _tell_tokens_the_same(attention: Any, asking: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of tokens (B, T, C) to cells that are the same for all prompts: keys and values (heads, N, d)."""
    q = _heads(attention.q_proj, asking, attention.num_heads).transpose(0, 1)  # (heads, B, T, d)
    out = F.scaled_dot_product_attention(q.flatten(1, 2)[None], keys[None], values[None])[0]
    return cast(Tensor, attention.out_proj(out.view(q.shape).permute(1, 2, 0, 3).flatten(2)))


def _tell_tokens(attention: Any, asking: Tensor, cells: Tensor, placed: Tensor) -> Tensor:
    """Attention of tokens (B, T, C) to each prompt's own cells (B, N, C); `placed` are those with their places.

    A bias of the keys would add the same to all scores of a token, so it has no effect.
    """
    q = _heads(attention.q_proj, asking, attention.num_heads)  # (B, heads, T, d)
    by_head = attention.k_proj.weight.unflatten(0, (attention.num_heads, -1))  # (heads, d, C)
    folded = (q @ by_head).flatten(1, 2) * q.shape[3] ** -0.5
    shares = (folded @ placed.mT).softmax(dim=2)  # (B, heads * T, N)
    seen = (shares @ cells).unflatten(1, q.shape[1:3])  # (B, heads, T, C)
    by_head = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))
    out = (seen @ by_head.mT).transpose(1, 2).flatten(2) + attention.v_proj.bias
    return cast(Tensor, attention.out_proj(out))


def _tell_cells(attention: Any, asked: Tensor, told: Tensor, cells: Tensor, queries: Tensor) -> Tensor:
    """Cells with their attention to the tokens added.

    Args:
        attention: The module.
        asked: (B, T, C), tokens that keys are made of.
        told: (B, T, C), tokens that values are made of.
        cells: (B, N, C), or (N, C) if no prompt has changed them yet.
        queries: Cells with their places, (B, N, C); or their queries (heads, N, d), the same for all prompts.

    Returns:
        (B, N, C).
    """
    heads = attention.num_heads
    k, v = _heads(attention.k_proj, asked, heads), _heads(attention.v_proj, told, heads)  # (B, heads, T, d)
    scale = k.shape[3] ** -0.5
    if queries.shape[0] == heads and queries.shape[2] == k.shape[3]:
        scores = (k.transpose(0, 1).flatten(1, 2) * scale) @ queries.mT  # (heads, B * T, N)
        scores = scores.unflatten(1, (len(k), -1)).transpose(0, 1)
    else:
        by_head = attention.q_proj.weight.unflatten(0, (heads, -1))
        folded = (k @ by_head).flatten(1, 2) * scale  # (B, heads * T, C)
        bias = (k @ attention.q_proj.bias.view(heads, -1, 1)) * scale  # (B, heads, T, 1)
        scores = (folded @ queries.mT).unflatten(1, k.shape[1:3]) + bias
    shares = scores.softmax(dim=2).flatten(1, 2)  # (B, heads * T, N), over the tokens of each head
    by_head = attention.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # (heads, d, C)
    sums = (v @ by_head + attention.out_proj.bias / heads).flatten(1, 2)  # the shares of each head sum up to 1
    return torch.baddbmm(cells.expand(len(k), -1, -1), shares.mT, sums)
