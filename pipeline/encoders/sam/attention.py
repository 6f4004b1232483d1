"""Attention with SAM's decomposed relative position, without the (tokens, tokens) bias of the official code.

For queries at row i and column j and keys at row k and column l of a grid, the official encoder computes

    softmax over (k, l) of  q_ij . k_kl / sqrt(d)  +  q_ij . Rh[i - k]  +  q_ij . Rw[j - l]

(MViTv2, Li et al. 2022, equation 4). The last two terms are small tables, (tokens, h) and (tokens, w) a head. Their
sum over all pairs is a bias of 805 MB an image in the global blocks of ViT-B; here it never exists as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

_BIAS_PER_THREAD = 2**20  # elements in use at a time on a CPU: 4 MiB in float32, a core's share of the last cache
_BIAS_ON_DEVICE = 2**28
_LINE_BYTES = 64


def relative_terms(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Products of the queries with the relative positions of rows and of columns.

    Args:
        q: (B, heads, h * w, d), not scaled.
        rel_pos_h: (2 * h - 1, d), embedding of the difference of rows, the most negative first.
        rel_pos_w: (2 * w - 1, d), the same for columns.
        grid: (h, w).

    Returns:
        (B, heads, h * w, h) and (B, heads, h * w, w).
    """
    h, w = grid
    at = q.reshape(*q.shape[:2], h, w, q.shape[3])
    rows = (at @ _pairs(rel_pos_h, h).mT)[..., :h]
    columns = (at.transpose(2, 3) @ _pairs(rel_pos_w, w).mT)[..., :w]
    return rows.flatten(2, 3), columns.transpose(2, 3).flatten(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention with relative position: fused where blocks are compiled, which is done on a GPU, else in chunks.

    Args:
        q: (B, heads, h * w, d).
        k: As `q`.
        v: As `q`.
        rows: (B, heads, h * w, h), see `relative_terms`.
        columns: (B, heads, h * w, w).

    Returns:
        (B, h * w, heads, d).
    """
    if torch.compiler.is_compiling():
        return fused_attention(q, k, v, rows, columns)
    return chunked_attention(q, k, v, rows, columns)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention as one kernel that looks the two tables up for every score; arguments as for `attend`.

    Meant for `torch.compile`, which turns it into a Triton kernel; uncompiled it is a slow reference. Its algebra is
    tested on a CPU; its speed on a GPU has not been measured.
    """
    w = columns.shape[3]

    def add_relative_position(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rows[b, head, query, key // w] + columns[b, head, query, key % w]

    out = flex_attention(q, k, v, score_mod=add_relative_position)
    assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp is asked for
    return out.transpose(1, 2)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention with as much of the bias at a time as the caches hold; arguments as for `attend`."""
    batch, heads, tokens, d = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # products of strided heads take half as long again
    limit = _BIAS_ON_DEVICE if q.is_cuda else _BIAS_PER_THREAD * torch.get_num_threads()
    if batch * heads * tokens**2 <= limit:
        return _attend(q, k, v, rows, columns)
    batch_step, head_step = max(1, limit // (heads * tokens**2)), max(1, limit // tokens**2)
    out = q.new_empty(batch, tokens, heads, d)
    for b, head in itertools.product(_slices(batch, batch_step), _slices(heads, head_step)):
        for query in _slices(tokens, max(1, limit // tokens)):
            at = (b, head, query)
            out[b, query, head] = _attend(q[at], k[b, head], v[b, head], rows[at], columns[at])
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention of some queries to all keys: (B, heads, n, d) to (B, n, heads, d).

    In half precision on a CPU, plain products with the scores in float32 take half the time of torch's kernel
    (ViT-B at 1024 px, one thread: 4.0 against 6.0 s an image) and are as accurate.
    """
    if q.is_cuda or q.dtype == torch.float32:
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        scores = ((q * q.shape[3] ** -0.5) @ k.mT).float().unflatten(3, (rows.shape[3], columns.shape[3]))
        scores += rows[..., :, None]
        scores += columns[..., None, :]
        scores = scores.flatten(3)
        out = torch.softmax(scores, 3, out=scores).to(v.dtype) @ v
    return out.transpose(1, 2)


def _pairs(rel_pos: Tensor, size: int) -> Tensor:
    """Relative positions of all pairs along one axis, (size, size or more, d); query first.

    The last key is repeated until a row of products fills whole lines of memory. On a CPU the last bits of a product
    depend on how it is aligned, and so else on an image's place in its batch.
    """
    at = torch.arange(size, device=rel_pos.device)
    line = _LINE_BYTES // rel_pos.element_size()
    keys = torch.arange(-(-size // line) * line, device=rel_pos.device).clamp(max=size - 1)
    return rel_pos[at[:, None] - keys[None, :] + size - 1]


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, size, step))
