"""The local average between an encoder and the store: how large it is for each tap, and how it is taken. No torch.

SLCA's own pool has no parameters, so it runs before the store. Grids differ by tap where an encoder makes its map
smaller on the way; the pool is chosen for each, so that all stored maps have one side unless asked otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIDE = 16  # cells along each side of a stored map where nothing else is asked for

Pool = int | Mapping[str, int] | None
"""Cells of the coarsest grid; or cells of its own grid for each tap that is named; None for maps of `SIDE`."""


def choose_pools(encoder: str, grids: Mapping[str, int], coarsest: int, asked: Pool) -> dict[str, int]:
    """Side of each tap's local average, in cells of its own grid.

    Args:
        encoder: Its name, for messages.
        grids: Cells along each side of each tap's own grid.
        coarsest: Cells along each side of the encoder's coarsest grid, whether a tap is of it or not.
        asked: A number counts cells of the coarsest grid, and finer grids are averaged in proportion, so that all maps
            have one side. A mapping has the number for a tap's own grid; a turned view without one takes that of its
            tap. What is named by neither, and everything for None, is averaged to `SIDE`; a grid that is smaller
            stays as it is, and one that `SIDE` does not divide gets the largest side below that does.

    Raises:
        ConfigError: A pool does not divide its grid, or a tap that is named is none of `grids`.
    """
    if isinstance(asked, int):
        _require_divides(encoder, asked, coarsest)
        side = coarsest // asked
        return {tap: _in_proportion(encoder, tap, grid, side) for tap, grid in grids.items()}
    given = dict(asked or {})
    strangers = [tap for tap in given if tap not in grids]
    if strangers:
        message = f"encoder.pool names {strangers[0]!r}, which is no tap here; the taps are {', '.join(grids)}"
        raise ConfigError(message)
    pools = {}
    for tap, grid in grids.items():
        cells = given.get(tap, given.get(tap.partition("@")[0]))
        if cells is not None:
            _require_divides(encoder, cells, grid, f" of tap {tap!r}")
        pools[tap] = cells or next(k for k in range(1, grid + 1) if grid % k == 0 and grid // k <= SIDE)
    return pools


def _require_divides(encoder: str, pool: int, grid: int, whose: str = "") -> None:
    if pool < 1 or grid % pool:
        divisors = ", ".join(str(k) for k in range(1, grid + 1) if grid % k == 0)
        message = (
            f"a pool of {pool!r} does not divide the {grid}x{grid} grid{whose or f' of {encoder}'}; valid: {divisors}"
        )
        raise ConfigError(message)


def _in_proportion(encoder: str, tap: str, grid: int, side: int) -> int:
    """The pool that brings a grid to a side; a single cell, which stands for the whole image, stays as it is."""
    if grid == 1:
        return 1
    if grid % side:
        message = (
            f"encoder.pool: the {grid}x{grid} grid of tap {tap!r} of {encoder} does not come down to a side of {side}; "
            f"give a pool for each tap, or none"
        )
        raise ConfigError(message)
    return grid // side


def pool_steps(pool: int) -> tuple[int, ...]:
    """Prime factors, smallest first: a pool goes in these steps, so that the store can be made coarser later.

    `cache.pool_steps` says the same of a conversion; neither room may import the other.
    """
    smallest = next((factor for factor in range(2, pool + 1) if pool % factor == 0), None)
    return () if smallest is None else (smallest, *pool_steps(pool // smallest))


def average(features: Tensor, pool: int, dtype: torch.dtype) -> Tensor:
    """Round to the stored type and average over windows, step after step, rounded after each.

    Args:
        features: (B, h, w, C).
        pool: Side of the windows, in cells; divides h and w.
        dtype: Stored type.

    Returns:
        (B, C, h / pool, w / pool), contiguous.
    """
    features = features.to(dtype)
    for step in pool_steps(pool):
        sums = reduce(add, [features[:, i::step].float() for i in range(step)])
        sums = reduce(add, [sums[:, :, i::step] for i in range(step)])
        features = (sums * (1 / step**2)).to(features.dtype)
    return features.permute(0, 3, 1, 2).contiguous()
