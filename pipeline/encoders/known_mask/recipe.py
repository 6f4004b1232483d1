"""What the taps of the known mask are and depend on, checked before a mask is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipeline.encoders.family import JSON, Shape
from pipeline.encoders.pooling import Pool, choose_pools
from pipeline.errors import ConfigError
from pipeline.mask_tap import MASKS, shapes_of

SIDE_PX = 256  # of the maps of masks
NAME = "mask"  # of the encoder that is none, and of its tap of features
SHIFTED, RANDOM = f"{MASKS}:shifted", f"{MASKS}:random"
MAPS: Mapping[str, JSON] = MappingProxyType(  # what each map shows, as a fingerprint has it
    {
        MASKS: "the parts of the mask",
        SHIFTED: "the same, all moved by one step to where they cover least of themselves",
        RANDOM: "ellipses of the same sizes",
    }
)
TAPS = (NAME, *MAPS)
CHANNELS = ("inside", "edge", "around", "outside")
_VERSION = 1  # raise when the same masks give other numbers
_MAPS_VERSION = 1  # the same of the maps
_PATCH_PX = 16  # as SAM's, so that `input_px` and `pool` give the grid that they give there
_INPUT_PX = 256


@dataclass(frozen=True)
class MaskRecipe:
    """How masks become features.

    Attributes:
        input_px: Side of the image that the grid is counted in, px; masks of any size are taken.
        grid: Cells along each side; they cover the whole image, whatever its shape.
        taps: Those that are wanted, of `TAPS`.
    """

    input_px: int
    grid: int
    taps: tuple[str, ...] = (NAME,)

    @property
    def maps(self) -> tuple[str, ...]:
        """Those of the taps that are maps of masks (see `pipeline.mask_tap`); they are stored with their scores."""
        return tuple(tap for tap in self.taps if tap != NAME)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape (C, h, w) of each tap, maps with their scores."""
        shapes: dict[str, Shape] = {}
        for tap in self.taps:
            shapes |= {NAME: (len(CHANNELS), self.grid, self.grid)} if tap == NAME else shapes_of(tap, SIDE_PX)
        return MappingProxyType(shapes)

    def fingerprint(self, knows_sha256: str) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels.

        Args:
            knows_sha256: Digest of all masks: where one has changed, the store is another, and has to be replaced.
        """
        shown: dict[str, JSON] = {tap: list(CHANNELS) if tap == NAME else MAPS[tap] for tap in self.taps}
        of_maps: dict[str, JSON] = {"masks": {"side_px": SIDE_PX, "version": _MAPS_VERSION}} if self.maps else {}
        return {
            "encoder": NAME,
            "masks_sha256": knows_sha256,
            "taps": shown,
            "grid": self.grid,
            "version": _VERSION,
            **of_maps,
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
        taps: Any of `TAPS`.
        input_px: Side of the input, px; None for 256.
        pool: Patches along each side of a cell; see `pooling.choose_pools` for what else it may be.
        precision: Asked of every family; masks are averaged in float32.
        preprocessing: Asked of every family; masks have none.
        masks: Asked of every family.

    Raises:
        ConfigError: Another tap is asked for, or one twice, or the grid is not whole.
    """
    if not taps or len(set(taps)) < len(taps) or not set(taps) <= set(TAPS):
        message = f"encoder.taps: got {list(taps)!r}; the encoder {name!r} has the taps {', '.join(TAPS)}, each once"
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
    return MaskRecipe(side_px, patches // choose_pools(name, {NAME: patches}, patches, pool)[NAME], taps)
