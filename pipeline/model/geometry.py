"""One affine map per sample, applied to the image and to its gates: where a gate lies on the augmented image.

Coordinates are (x, y) in [-1, 1] over the raw image whatever its shape, with pixel edges at -1 and 1. An affine map
(B, 2, 3) takes a place in the *result* to the place in the raw image where its value is found. Every sampler here is
bilinear with no smoothing first, which a gate finer than four times its stage's grid would want.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def place_grid(affine: Tensor, height: int, width: int) -> Tensor:
    """Find the places in the raw image that the cells of a result come from.

    Args:
        affine: (B, 2, 3) float32, result to raw image.
        height: Cells of the result from top to bottom.
        width: Cells of the result from left to right.

    Returns:
        (B, height, width, 2) float32, (x, y) in the raw image; outside [-1, 1] there is no image.
    """
    y = _centres(height, affine.device)[:, None].expand(height, width)
    x = _centres(width, affine.device)[None, :].expand(height, width)
    places = torch.stack((x, y, torch.ones_like(x)), dim=-1)  # (height, width, 3)
    return torch.einsum("hwk,bck->bhwc", places, affine)


def sample_image(images: Tensor, affine: Tensor | None, size_px: int) -> Tensor:
    """Draw images through their affine maps; black where there is no image.

    Values are rounded to whole grey levels, as image libraries do, so a flip or a quarter turn moves pixels and changes
    none of them.

    Args:
        images: (B, 3, H, W) uint8.
        affine: (B, 2, 3) float32; None for the identity.
        size_px: Side of the result.

    Returns:
        (B, 3, size_px, size_px) float32, whole numbers in 0..255.
    """
    values = images.float()
    if affine is None and images.shape[-2:] == (size_px, size_px):
        return values
    if affine is None:
        return F.interpolate(values, size=(size_px, size_px), mode="bilinear", align_corners=False).round()
    grid = place_grid(affine, size_px, size_px)
    drawn = F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False).round()
    tolerance = 1e-5  # a turned corner pixel must not fall out of the image by a rounding error
    return drawn * (grid.abs() <= 1 + tolerance).all(dim=-1)[:, None]


def sample_gate(gate: Tensor, affine: Tensor | None, extents: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Lay gates over their augmented images: crop the padding, apply the affine map and resize, in one sampling.

    Beyond the image a gate continues with its value at the image's border; cells of pure padding are never read.

    Args:
        gate: (B, C, h, w) over the encoder's padded square.
        affine: (B, 2, 3) float32; None for the identity.
        extents: (B, 2) float32, the part of the grid's height and width that is image; None where all of it is.
        size: (height, width) of the stage's grid.

    Returns:
        (B, C, height, width), differentiable in `gate`.
    """
    cells = gate.shape[-2:]
    if cells == (1, 1):
        return gate.expand(-1, -1, *size)
    if affine is None and extents is None:
        return gate if cells == size else F.interpolate(gate, size=size, mode="bilinear", align_corners=False)
    places = gate_places(gate, affine, extents, size)
    with torch.autocast(gate.device.type, enabled=False):
        if gate.device.type == "cpu":
            return _sample_cells(gate.float(), places)
        return F.grid_sample(gate.float(), places, mode="bilinear", padding_mode="border", align_corners=False)


def gate_places(gate: Tensor, affine: Tensor | None, extents: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Find the places on gates that the cells of a stage come from; arguments as for `sample_gate`.

    Returns:
        (B, height, width, 2) float32, (x, y) in [-1, 1] over the encoder's padded square.
    """
    if affine is None:
        affine = identity(len(gate), gate.device)
    with torch.autocast(gate.device.type, enabled=False):  # bfloat16 has 8 bits: too few to name a place
        return _on_padded_grid(place_grid(affine.float(), *size), extents, gate.shape[-2:])


@dataclass(frozen=True)
class Corners:
    """The cells of maps between which places lie, four for each.

    Attributes:
        cells: (B, H W, 4) int64, cells in the order of rows, counted on from map to map of the batch.
        shares: (B, H W, 4) float32, how much of each a place takes; 1 in all.
    """

    cells: Tensor
    shares: Tensor


def find_corners(places: Tensor, height: int, width: int) -> Corners:
    """Find what bilinear sampling with continued borders takes from maps of `height` x `width` cells.

    Args:
        places: (B, H, W, 2) float32, as (x, y) in [-1, 1].
        height: Cells of a map from top to bottom.
        width: Cells of a map from left to right.
    """
    sides = places.new_tensor((width, height))
    cell = torch.minimum((((places.flatten(1, 2) + 1) * sides - 1) / 2).clamp(min=0), sides - 1)
    corner = cell.floor()
    right, below = (cell - corner).unbind(-1)  # how far between a cell and the next: (B, H W) each
    x, y = corner.long().unbind(-1)
    after_x, after_y = (x + 1).clamp(max=width - 1), (y + 1).clamp(max=height - 1)
    cells = torch.stack((y * width + x, y * width + after_x, after_y * width + x, after_y * width + after_x), -1)
    cells += (torch.arange(len(places)) * height * width)[:, None, None]
    shares = torch.stack(((1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right), -1)
    return Corners(cells, shares)


def cell_rows(maps: Tensor) -> Tensor:
    """Lay maps (B, C, h, w) out with a row for each cell: (B h w, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _sample_cells(maps: Tensor, places: Tensor) -> Tensor:
    """Compute `grid_sample`, bilinear with borders continued, all channels of a cell at a time.

    Torch's own loops go map by map on a CPU: forward and back through a gate of 256 channels, 16 x 16 to 56 x 56, take
    18 instead of its 41 ms for four samples. The channels of the result lie together.

    Args:
        maps: (B, C, h, w) float32.
        places: (B, H, W, 2) float32, as (x, y) in [-1, 1].

    Returns:
        (B, C, H, W), differentiable in `maps`.
    """
    corners = find_corners(places, *maps.shape[-2:])
    sums = F.embedding_bag(
        corners.cells.view(-1, 4), cell_rows(maps), mode="sum", per_sample_weights=corners.shares.view(-1, 4)
    )
    return sums.view(*places.shape[:3], -1).permute(0, 3, 1, 2)


def identity(count: int, device: torch.device) -> Tensor:
    """Give `count` affine maps that change nothing: (count, 2, 3) float32."""
    return torch.eye(2, 3, device=device).expand(count, 2, 3)


def _on_padded_grid(places: Tensor, extents: Tensor | None, cells: torch.Size) -> Tensor:
    """Turn places in the image (B, H, W, 2) into places on the padded square, held within the cells that are image."""
    if extents is None:
        return places
    count = torch.tensor((cells[1], cells[0]), dtype=torch.float32)  # (w, h), as (x, y)
    count = count.to(places.device, non_blocking=True)
    image_cells = (extents.flip(1) * count)[:, None, None, :]  # (B, 1, 1, 2)
    tolerance = 1e-3  # of a cell: extents are float32 and a whole number of cells must stay one
    last = ((image_cells - tolerance).ceil() - 1).clamp(min=0)
    cell = torch.minimum(((places + 1) / 2 * image_cells - 0.5).clamp(min=0), last)
    return (2 * cell + 1) / count - 1


def _centres(cells: int, device: torch.device) -> Tensor:
    """Give the centres of `cells` equal cells of [-1, 1], symmetric to the last bit: (cells,) float32."""
    return torch.arange(1 - cells, cells, 2, dtype=torch.float32, device=device) / cells
