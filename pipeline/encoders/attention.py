"""Attention with SAM's decomposed relative position, without the (tokens, tokens) scores of the official code.

For queries and keys at rows `i, k` and columns `j, l` of a grid, the official encoder computes

    softmax_kl( q_ij . k_kl / sqrt(d)  +  q_ij . Rh[i - k]  +  q_ij . Rw[j - l] )

(MViTv2, Li et al. 2022, equation 4). The two last terms are small tables, (tokens, h) and (tokens, w) a head; their
sum over all pairs is the (tokens, tokens) bias that costs the official code its memory: 805 MB an image in ViT-B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BIAS_ROWS = 8  # rows of queries whose bias exists at a time


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
    rows = torch.einsum("bnhwc,hkc->bnhwk", at, _pairs(rel_pos_h, h))
    columns = torch.einsum("bnhwc,wkc->bnhwk", at, _pairs(rel_pos_w, w))
    return rows.flatten(2, 3), columns.flatten(2, 3)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention through `scaled_dot_product_attention`, a few rows of queries and their bias at a time.

    Args:
        q: (B, heads, h * w, d).
        k: As `q`.
        v: As `q`.
        rows: (B, heads, h * w, h), see `relative_terms`.
        columns: (B, heads, h * w, w).

    Returns:
        (B, heads, h * w, d).
    """
    h, w = rows.shape[3], columns.shape[3]
    step = _BIAS_ROWS * w
    parts = []
    for start in range(0, h * w, step):
        part = slice(start, start + step)
        bias = rows[:, :, part, :, None] + columns[:, :, part, None, :]
        parts.append(F.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=bias.flatten(3)))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _pairs(rel_pos: Tensor, size: int) -> Tensor:
    """Relative positions of all pairs along one axis, (size, size, d); query first."""
    at = torch.arange(size, device=rel_pos.device)
    return rel_pos[at[:, None] - at[None, :] + size - 1]
