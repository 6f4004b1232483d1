"""Layers of a frozen encoder on maps (B, h, w, C), in the type of their weights, and windows of such maps."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN_IMAGES = 16
_MOST_WINDOWS = 2**15  # of one call: a CUDA kernel's grid has at most 65,535 of them


def cast_products(module: nn.Module, dtype: torch.dtype) -> None:
    """Set the type of matrix products and convolutions in place; everything else stays float32."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.to(dtype)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Normalise over channels."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer to the channels of a map (B, h, w, C).

    On a CPU in float32 torch multiplies matrices with MKL, but convolves with oneDNN, which is up to twice as fast on
    other makers' processors. On a single thread oneDNN is taken from 16 images on, so the tokens are cut into 16.
    """
    shape = x.shape[:-1]
    tokens = x.reshape(-1, x.shape[-1]).to(layer.weight.dtype)
    if not x.is_cpu or tokens.dtype != torch.float32 or len(tokens) % _ONEDNN_IMAGES:
        return F.linear(tokens, layer.weight, layer.bias).view(*shape, -1)
    images = tokens.view(_ONEDNN_IMAGES, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(images, layer.weight[:, :, None, None], layer.bias)
    return out.permute(0, 2, 3, 1).reshape(*shape, -1)


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve a map whose channels come last."""
    with whole_float32(x):
        out: Tensor = layer(x.permute(0, 3, 1, 2).to(layer.weight.dtype))
    return out.permute(0, 2, 3, 1)


def whole_float32(x: Tensor) -> AbstractContextManager[None]:
    """Convolve float32 as float32 within the block: torch lets a GPU drop 13 bits of it unless told not to."""
    if not x.is_cuda:
        return contextlib.nullcontext()
    now = torch.backends.cudnn
    return now.flags(now.enabled, now.benchmark, deterministic=now.deterministic, allow_tf32=False)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention within windows, in parts where there are more of them than a kernel takes.

    Args:
        q: (windows, heads, tokens, d).
        k: As `q`, of as many tokens or others.
        v: As `k`.
        bias: (1, heads, tokens, tokens), added to the scores.
        scale: Of the scores; None for that of d.

    Returns:
        As `q`.
    """
    slices = [slice(at, at + _MOST_WINDOWS) for at in range(0, len(q), _MOST_WINDOWS)]
    parts = [F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=bias, scale=scale) for part in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def partition(x: Tensor, window: int, padding: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Pad with the token `padding` and cut into windows: (B, h, w, C) to (B * rows * columns, window, window, C)."""
    batch, h, w, channels = x.shape
    rows, columns = -(-h // window), -(-w // window)
    padded = padding.repeat(batch, rows * window, columns * window, 1)
    padded[:, :h, :w] = x
    padded = padded.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return padded.reshape(batch * rows * columns, window, window, channels), (rows, columns)


def join(x: Tensor, windows: tuple[int, int]) -> Tensor:
    """Undo `partition`, except for the padding."""
    (rows, columns), window = windows, x.shape[1]
    x = x.view(-1, rows, columns, window, window, x.shape[3]).transpose(2, 3)
    return x.reshape(x.shape[0], rows * window, columns * window, -1)
