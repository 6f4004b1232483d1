"""The known mask as taps in place of an encoder: would a perfect map help? For experiments, not for patients.

The store is like any other: rows of the same ids and pixel digests, so that everything downstream takes it. The taps
`masks`, `masks:shifted` and `masks:random` are what a segmentation model would give that finds just that, and its
controls (`maps`), with scores of 1. The tap `mask` has features. Which channels it has is ours: `inside` is the share
of a cell that the finding covers, `edge` how much of its outline runs through the cell (1 for a straight line across),
`around` the share of a cell that lies outside but within a tenth of the image's longer side of the finding, and
`outside` the share that the finding does not cover.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.encoders.family import JSON, Prepared, Reads
from pipeline.encoders.known_mask.maps import at_random, rank_map, shifted
from pipeline.encoders.known_mask.recipe import NAME, RANDOM, SHIFTED, SIDE_PX, MaskRecipe
from pipeline.errors import DataError
from pipeline.mask_tap import MOST, dtype_of

_AROUND = 0.1  # of the longer side


def build(recipe: MaskRecipe, checkpoint: Path | None, device: str) -> KnownMask:
    """Make one, which has no weights and computes on the CPU; see `family.build_encoder`."""
    return KnownMask(recipe)


class KnownMask:
    """Masks in, their maps out: an encoder that has nothing to compute once a mask is read (see `family.Encoder`)."""

    reads: Reads = "mask"
    device = torch.device("cpu")

    def __init__(self, recipe: MaskRecipe) -> None:
        """Make one that knows no masks yet.

        Args:
            recipe: Of what grid.
        """
        self.input_px = recipe.input_px
        self.taps = recipe.shapes
        self._recipe, self._masks_sha256 = recipe, ""

    def know(self, masks_sha256: str) -> None:
        """Say which masks it will be given, of which the features depend: a digest of all of them."""
        self._masks_sha256 = masks_sha256

    def check(self, data_set: str, mask: npt.NDArray[np.bool_] | None) -> None:
        """Refuse a data set by the first sample's mask; a layout has masks for all samples or for none.

        Raises:
            DataError: There is none.
        """
        if mask is None:
            message = (
                f"{data_set!r} has no masks, and the encoder {NAME!r} makes its tap from them: "
                f"name data.mask_column of a CSV table or data.masks of a MedMNIST archive, take the demo data, or "
                f"choose another encoder"
            )
            raise DataError(message)

    def fingerprint(self) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels; asked for once it knows its masks."""
        return self._recipe.fingerprint(self._masks_sha256)

    def prepare(self, image: npt.NDArray[np.bool_] | npt.NDArray[np.uint8]) -> Prepared:
        """Turn a mask (H, W) into its taps, one behind the other, none of which has padding."""
        parts = []
        known = rank_map(image, SIDE_PX) if self._recipe.maps else np.zeros((0, 0), np.uint8)
        for tap in self._recipe.taps:
            if tap == NAME:
                parts.append(map_of(image, self._recipe.grid).flatten())
            else:
                drawn = shifted(known) if tap == SHIFTED else at_random(known) if tap == RANDOM else known
                there = torch.arange(MOST) < int(known.max())
                parts += [torch.from_numpy(drawn.astype(np.float32)).flatten(), there.float().repeat(2)]
        return Prepared(torch.cat(parts), (self.input_px, self.input_px))

    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Take taps (n, D) apart, each of its own type; known masks are sure, so their scores are 1."""
        stored = {tap: getattr(torch, dtype_of(tap, str(dtype).removeprefix("torch."))) for tap in self.taps}
        parts = torch.split(pixels[: len(sizes)], [math.prod(shape) for shape in self.taps.values()], dim=1)
        return {tap: part.view(-1, *self.taps[tap]).to(stored[tap]) for tap, part in zip(self.taps, parts, strict=True)}


def map_of(mask: npt.NDArray[np.bool_] | npt.NDArray[np.uint8], grid: int) -> Tensor:
    """Turn a mask into the channels of the tap.

    Args:
        mask: bool (H, W).
        grid: Cells along each side.

    Returns:
        float32 (4, grid, grid) in [0, 1]: `recipe.CHANNELS`.
    """
    finding = torch.from_numpy(mask.astype(np.float32))[None, None]  # (1, 1, H, W)
    reach = max(1, round(_AROUND * max(mask.shape)))
    inside = F.adaptive_avg_pool2d(finding, grid)
    around = F.adaptive_avg_pool2d(_grown(finding, reach) - finding, grid)
    outline = F.adaptive_avg_pool2d(_grown(finding, 1) - finding, grid)  # one pixel wide
    side = sum(mask.shape) / 2 / grid  # pixels of an outline that crosses a cell
    return torch.cat([inside, (outline * side).clamp(max=1), around, 1 - inside], dim=1)[0]


def _grown(finding: Tensor, reach: int) -> Tensor:
    """Grow a mask (1, 1, H, W) of 0 and 1 by a number of pixels to every side."""
    across = F.max_pool2d(finding, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    return F.max_pool2d(across, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
