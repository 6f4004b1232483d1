"""Gate a stage on a CPU a few images at a time, so that the resized gate stays in the processor's cache.

On the stage's grid a gate is as large as the stage: to write it, keep it for the way back and read it again costs more
than all of its arithmetic. So it is made for a few images, used, and on the way back made once more; its gradient, too,
is summed into the gate's own coarse cells before the next images are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.model.geometry import Corners, cell_rows, find_corners, gate_places, sample_gate
from pipeline.model.slca import integrate

CACHED_BYTES = 4 * 2**20  # of the resized gate at a time: what a core or two have of cache


def gate_stage(stage: Tensor, added: int, part: Tensor, affine: Tensor | None, extents: Tensor | None) -> Tensor:
    """Compute `integrate(stage, sample_gate(part, affine, extents, size of the stage), added)`.

    Args:
        stage: x (B, C, H, W).
        added: The number that `pipeline.model.slca.factor` gave.
        part: (B, C, h, w), what `factor` gave beside it.
        affine: (B, 2, 3) float32; None for the identity.
        extents: (B, 2) float32, the part of the grid's height and width that is image; None where all of it is.

    Returns:
        (B, C, H, W) in the dtype of `stage`, differentiable once in `stage` and `part`.
    """
    size = (stage.shape[-2], stage.shape[-1])
    sampled = part.shape[-2:] != (1, 1) and not (affine is None and extents is None)
    if stage.device.type != "cpu" or not sampled or torch.compiler.is_compiling():
        return integrate(stage, sample_gate(part, affine, extents, size), added)
    corners = find_corners(gate_places(part, affine, extents, size), *part.shape[-2:])
    gated: Tensor = _Gating.apply(stage, cell_rows(part.float()), corners.cells, corners.shares, added)
    return gated


class _Gating(torch.autograd.Function):
    """Stage (B, C, H, W), rows of its gates' cells (B n, C) and the corners of its own, to the gated stage."""

    @staticmethod
    def forward(ctx: Any, stage: Tensor, rows: Tensor, cells: Tensor, shares: Tensor, added: int) -> Tensor:
        ctx.save_for_backward(stage, rows, cells, shares)
        ctx.added = added
        gated = torch.empty_like(stage)
        for images in _few_at_a_time(stage):
            _times(stage[images], _resized(rows, Corners(cells, shares), images, added), gated[images])
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        stage, rows, cells, shares = ctx.saved_tensors
        corners, count = Corners(cells, shares), len(rows) // len(stage)
        turned = _Turned(corners, count)
        of_stage = torch.empty_like(stage) if ctx.needs_input_grad[0] else None
        of_rows = torch.empty_like(rows)
        for images in _few_at_a_time(stage):
            if of_stage is not None:
                _times(gradient[images], _resized(rows, corners, images, ctx.added), of_stage[images])
            of_factor = _channels_last(gradient[images] * stage[images]).to(rows.dtype)
            of_rows[images.start * count : images.stop * count] = turned.sums(of_factor, images)
        return of_stage, of_rows, None, None, None


class _Turned:
    """The corners the other way round: the places that each cell is a corner of, which its gradient is the sum over.

    Args:
        corners: Of a batch.
        count: Cells of a map.
    """

    def __init__(self, corners: Corners, count: int) -> None:
        batch, places, taken = corners.cells.shape
        cells, order = corners.cells.flatten().sort(stable=True)
        self._starts = torch.searchsorted(cells, torch.arange(batch * count))  # (B n,), where each cell's places start
        self._places = order // taken  # counted on from image to image
        self._shares = corners.shares.flatten()[order]
        self._of_image, self._places_of_image, self._count = places * taken, places, count

    def sums(self, gradient: Tensor, images: slice) -> Tensor:
        """Sum the gradient (b, H, W, C) of some images' resized gates into their cells: (b n, C)."""
        first = images.start * self._of_image
        own = slice(first, images.stop * self._of_image)
        return F.embedding_bag(
            self._places[own] - images.start * self._places_of_image,
            gradient.flatten(0, 2),
            self._starts[images.start * self._count : images.stop * self._count] - first,
            mode="sum",
            per_sample_weights=self._shares[own],
        )


def _resized(rows: Tensor, corners: Corners, images: slice, added: int) -> Tensor:
    """Resize the gates of some images, and add a number, from the rows of the whole batch's cells: (b H W, C)."""
    cells, shares = corners.cells[images].flatten(0, 1), corners.shares[images].flatten(0, 1)
    return F.embedding_bag(cells, rows, mode="sum", per_sample_weights=shares).add_(added)


def _times(maps: Tensor, factors: Tensor, out: Tensor) -> None:
    """Multiply maps (b, C, H, W) by factors (b H W, C)."""
    x = _channels_last(maps)
    torch.mul(x, factors.view(x.shape).to(x.dtype), out=_channels_last(out))


def _few_at_a_time(stage: Tensor) -> Iterator[slice]:
    few = max(1, CACHED_BYTES // (4 * stage[0].numel()))
    for start in range(0, len(stage), few):
        yield slice(start, min(start + few, len(stage)))


def _channels_last(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1)
