"""What the tap of the known mask is and depends on, checked before a mask is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipeline.encoders.family import JSON, Shape
from pipeline.encoders.pooling import Pool, choose_pools
from pipeline.errors import ConfigError

NAME = "mask"  # of the encoder that is none, and of its one tap
CHANNELS = ("inside", "edge", "around", "outside")
_VERSION = 1  # raise when the same masks give other numbers
_PATCH_PX = 16  # as SAM's, so that `input_px` and `pool` give the grid that they give there
_INPUT_PX = 256


@dataclass(frozen=True)
class MaskRecipe:
    """How masks become features.

    Attributes:
        input_px: Side of the image that the grid is counted in, px; masks of any size are taken.
        grid: Cells along each side; they cover the whole image, whatever its shape.
    """

    input_px: int
    grid: int

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape (C, g, g) of the one tap."""
        return MappingProxyType({NAME: (len(CHANNELS), self.grid, self.grid)})

    def fingerprint(self, knows_sha256: str) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels.

        Args:
            knows_sha256: Digest of all masks: where one has changed, the store is another, and has to be replaced.
        """
        return {
            "encoder": NAME,
            "masks_sha256": knows_sha256,
            "taps": {NAME: list(CHANNELS)},
            "grid": self.grid,
            "version": _VERSION,
        }


def make_recipe(
    name: str,
    taps: tuple[str, ...],
    input_px: int | None,
    pool: Pool,
    precision: str,
    preprocessing: str | None,
    masks: Mapping[str, Any] | None = None,
) -> MaskRecipe:
    """The recipe of the known mask; its grid is the input's side in patches of 16 px, over the pool.

    Args:
        name: `mask`.
        taps: No other than `mask`.
        input_px: Side of the input, px; None for 256.
        pool: Patches along each side of a cell; see `pooling.choose_pools` for what else it may be.
        precision: Asked of every family; masks are averaged in float32.
        preprocessing: Asked of every family; masks have none.
        masks: Asked of every family.

    Raises:
        ConfigError: Another tap is asked for, or the grid is not whole.
    """
    if taps != (NAME,):
        message = f"encoder.taps: got {list(taps)!r}; the encoder {name!r} has one tap: set encoder.taps to [{NAME}]"
        raise ConfigError(message)
    side_px = _INPUT_PX if input_px is None else input_px
    cell_px = _PATCH_PX * (pool if isinstance(pool, int) else 1)
    if side_px % cell_px:
        message = (
            f"encoder.input_px: {side_px!r} px do not divide into cells of {_PATCH_PX} x {cell_px // _PATCH_PX} px; "
            f"choose a multiple of {cell_px}, or another encoder.pool"
        )
        raise ConfigError(message)
    patches = side_px // _PATCH_PX
    return MaskRecipe(side_px, patches // choose_pools(name, {NAME: patches}, patches, pool)[NAME])
