"""Flips and quarter turns whose features were encoded in their own right (taps such as `neck@hflip`), drawn exactly.

Moving the features of an image along with it is an approximation, as an encoder is not quite equivariant. Stored views
are the exact alternative, at the price of one more encoding and one more tap of the same size for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from pipeline.errors import ConfigError

# Result to raw image, as in `pipeline.model.geometry`: mirrored left to right first, then quarter turns to the left.
VIEWS: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = MappingProxyType(
    {
        "identity": ((1, 0), (0, 1)),
        "rot90": ((0, -1), (1, 0)),
        "rot180": ((-1, 0), (0, -1)),
        "rot270": ((0, 1), (-1, 0)),
        "hflip": ((-1, 0), (0, 1)),
        "transpose": ((0, 1), (1, 0)),
        "vflip": ((1, 0), (0, -1)),
        "transverse": ((0, -1), (-1, 0)),
    }
)


def view_taps(taps: Sequence[str], views: Sequence[str]) -> tuple[str, ...]:
    """Name the stored taps of views: `neck` and `hflip` make `neck@hflip`.

    Raises:
        ConfigError: No such view.
    """
    for view in views:
        if view not in VIEWS or view == "identity":
            msg = f"There is no view {view!r}: choose from {', '.join(list(VIEWS)[1:])}."
            raise ConfigError(msg)
    return tuple(f"{tap}@{view}" for view in views for tap in taps)


@dataclass(frozen=True)
class DrawnViews:
    """One view for each sample of a batch.

    Attributes:
        views: Names to draw from; the first is `identity`.
        chosen: (B,) int64, which of them.
    """

    views: tuple[str, ...]
    chosen: Tensor

    def features(self, features: Mapping[str, Tensor], taps: Sequence[str]) -> dict[str, Tensor]:
        """Pick each sample's features (B, C, h, w) from those of its view."""
        picked = {}
        for tap in taps:
            picked[tap] = features[tap].clone()
            for number, view in enumerate(self.views[1:], start=1):
                mine = self.chosen == number
                picked[tap][mine] = features[f"{tap}@{view}"][mine]
        return picked

    def extents(self, extents: Tensor | None) -> Tensor | None:
        """Give the part (B, 2) of the chosen views' grids that is image: a quarter turn swaps the two."""
        if extents is None:
            return None
        swapped = self._matrices()[:, 0, 0] == 0
        return torch.where(swapped[:, None], extents.flip(1), extents)

    def on_image(self, affine: Tensor | None) -> Tensor:
        """Join the view with an affine map (B, 2, 3) drawn on top of it: result to raw image."""
        matrices = self._matrices()
        if affine is None:
            return torch.cat((matrices, matrices.new_zeros(len(matrices), 2, 1)), dim=-1)
        return matrices @ affine

    def _matrices(self) -> Tensor:
        table = torch.tensor([VIEWS[view] for view in self.views], dtype=torch.float32, device=self.chosen.device)
        return table[self.chosen]


def draw_views(views: Sequence[str], count: int, generator: torch.Generator) -> DrawnViews:
    """Draw a view for each of `count` samples, the image as it is being one of them."""
    chosen = torch.randint(len(views) + 1, (count,), generator=generator, device=generator.device)
    return DrawnViews(("identity", *views), chosen)
