"""SAM's image encoder from the official module's weights, stopped at the depth that is wanted.

The arithmetic is the official one (its module is the oracle of the tests); what differs is how attention is
computed, that padding tokens of windows are not projected, and that nothing after the deepest tap is computed.
Feature maps are (B, h, w, C) throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

from pipeline.encoders.layers import cast_products, convolve, join, layer_norm, linear, partition
from pipeline.encoders.sam.attention import attend, relative_terms


def run_block(block: Block, x: Tensor) -> Tensor:
    """One transformer block: attention and a two-layer perceptron, each added to its input in float32."""
    x = x + _attention(block, layer_norm(block.norm1, x))
    hidden = F.gelu(linear(block.mlp.lin1, layer_norm(block.norm2, x)))
    return x + linear(block.mlp.lin2, hidden)


def feature_maps(
    vit: ImageEncoderViT, images: Tensor, run_block: Callable[[Block, Tensor], Tensor] = run_block
) -> Iterator[Tensor]:
    """Compute the encoder depth by depth; what is not asked for is not computed.

    Args:
        vit: The official module, its position embeddings of the grid's size.
        images: float32 (B, 3, S, S), normalised and padded.
        run_block: How to compute a block; a compiled form of `run_block` on a GPU.

    Yields:
        float32 (B, h, w, C) after the position embedding, after each block, and after the neck.
    """
    # Sums keep the order in memory of their first term, which is that of all maps from here on.
    x = convolve(vit.patch_embed.proj, images.permute(0, 2, 3, 1)).contiguous() + vit.pos_embed
    yield x
    for block in vit.blocks:
        x = run_block(block, x)
        yield x
    yield _neck(vit, x)


def fit_to_grid(vit: ImageEncoderViT, grid: int) -> None:
    """Resample position embeddings in place for an input of another size; the windows' own stay as they are.

    The absolute embedding is resampled bicubically with antialiasing, which is our choice; the relative ones of
    global blocks linearly, as the official code does when it meets another size.

    Args:
        vit: The official module.
        grid: Tokens along a side.
    """
    if vit.pos_embed.shape[1] == grid:
        return
    absolute = vit.pos_embed.permute(0, 3, 1, 2)
    absolute = F.interpolate(absolute, (grid, grid), mode="bicubic", antialias=True)
    vit.pos_embed = nn.Parameter(absolute.permute(0, 2, 3, 1).contiguous(), requires_grad=False)
    for block in vit.blocks:
        if block.window_size == 0:
            for name in ("rel_pos_h", "rel_pos_w"):
                table = getattr(block.attn, name).T[None]  # (1, d, 2 * old - 1)
                table = F.interpolate(table, 2 * grid - 1, mode="linear")[0].T.contiguous()
                setattr(block.attn, name, nn.Parameter(table, requires_grad=False))


def cast(vit: ImageEncoderViT, dtype: torch.dtype) -> None:
    """Set the type of matrix products; normalisations, the position embedding and sums of blocks stay float32."""
    cast_products(vit, dtype)
    for block in vit.blocks:
        for table in (block.attn.rel_pos_h, block.attn.rel_pos_w):
            table.data = table.data.to(dtype)


def _attention(block: Block, x: Tensor) -> Tensor:
    """Multi-head attention over the grid or within windows: (B, h, w, C) to the same."""
    attn, window = block.attn, block.window_size
    qkv = linear(attn.qkv, x)
    if window > 0:  # a padding token is zero, so its query, key and value are the bias alone
        qkv, windows = partition(qkv, window, attn.qkv.bias)
    count, h, w, channels = qkv.shape
    q, k, v = qkv.view(count, h * w, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # (count, heads, h * w, d) each
    rows, columns = relative_terms(q, attn.rel_pos_h, attn.rel_pos_w, (h, w))
    out = attend(q, k, v, rows, columns).reshape(count, h, w, channels // 3)
    if window > 0:
        out = join(out, windows)[:, : x.shape[1], : x.shape[2]]
    return linear(attn.proj, out)


def _neck(vit: ImageEncoderViT, x: Tensor) -> Tensor:
    """Two convolutions, each normalised over channels."""
    first, first_norm, second, second_norm = vit.neck
    for convolution, norm in ((first, first_norm), (second, second_norm)):
        x = F.layer_norm(convolve(convolution, x).float(), norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return x
