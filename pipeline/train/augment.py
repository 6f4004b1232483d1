"""What a training image may go through: one affine map that its gates follow, changes of light that they do not, views.

A view is a flip or quarter turn whose features were encoded in their own right (a tap such as `neck@hflip`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from pipeline.errors import ConfigError

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as PIL converts colour to grey


@dataclass(frozen=True)
class Augmentation:
    """How far a training image may be changed; the default changes nothing.

    Attributes:
        flip_horizontal: Probability of exchanging left and right.
        flip_vertical: Probability of exchanging top and bottom.
        quarter_turns: Whether to turn by 0, 90, 180 or 270 degrees, each as likely.
        rotation_degrees: Largest further turn, to either side.
        scale: Smallest and largest magnification about the centre; 1 changes nothing.
        shift: Largest shift along each axis, as a part of the side.
        crop: Smallest side of the window that is cut out and enlarged, as a part of the side; 1 cuts nothing.
        brightness: Largest relative change of all values: 0.2 draws a factor from 0.8 to 1.2.
        contrast: Largest relative change of the distance from the image's mean grey.
        saturation: Largest relative change of the distance from each pixel's grey.
        noise: Standard deviation of Gaussian noise, as a part of the full range.
        views: Flips and quarter turns to draw with their own stored features (see `DrawnViews`), in place of
            `flip_horizontal`, `flip_vertical` and `quarter_turns`.
        margin: How much larger than the classifier's image the decoded one is kept, as a part of its side, so that what
            `crop` and `scale` enlarge has detail.
    """

    flip_horizontal: float = 0.0
    flip_vertical: float = 0.0
    quarter_turns: bool = False
    rotation_degrees: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    crop: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    noise: float = 0.0
    views: tuple[str, ...] = ()
    margin: float = 0.0

    def __post_init__(self) -> None:
        shares = (
            "flip_horizontal",
            "flip_vertical",
            "shift",
            "margin",
            "brightness",
            "contrast",
            "saturation",
            "noise",
        )
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                msg = f"Augmentation's {name} is {getattr(self, name)!r}: give a number from 0 to 1."
                raise ConfigError(msg)
        if not 0 < self.crop <= 1:
            msg = f"Augmentation's crop is {self.crop!r}: give a part of the side above 0 and at most 1."
            raise ConfigError(msg)
        if not 0 < self.scale[0] <= self.scale[1]:
            msg = f"Augmentation's scale is {self.scale!r}: give the smallest and the largest factor, both above 0."
            raise ConfigError(msg)
        if self.views and (self.flip_horizontal or self.flip_vertical or self.quarter_turns):
            msg = (
                f"Augmentation draws views ({', '.join(self.views)}) and flips or turns besides: choose one of the two."
            )
            raise ConfigError(msg)

    @property
    def moves(self) -> bool:
        """Whether `draw_affine` can move a pixel."""
        flips = self.flip_horizontal or self.flip_vertical or self.quarter_turns
        rest = self.rotation_degrees or self.shift or self.crop < 1 or self.scale != (1.0, 1.0)
        return bool(flips or rest)

    def draw_affine(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Draw one affine map per sample.

        Args:
            count: B, samples in the batch.
            generator: Source of the numbers; its device is the result's.

        Returns:
            (B, 2, 3) float32 as `pipeline.model.geometry` takes it; None where nothing can move.
        """
        if not self.moves:
            return None
        uniform = torch.rand(10, count, generator=generator, device=generator.device)
        signed = 2 * uniform - 1
        flip_x = torch.where(uniform[0] < self.flip_horizontal, -1.0, 1.0)
        flip_y = torch.where(uniform[1] < self.flip_vertical, -1.0, 1.0)
        angle = signed[2] * math.radians(self.rotation_degrees)
        smallest, largest = self.scale
        window = self.crop + (1 - self.crop) * uniform[3]
        size = window / (smallest + (largest - smallest) * uniform[4])
        linear = _turns(angle) * size[:, None, None] * torch.stack((flip_x, flip_y), dim=-1)[:, None, :]
        if self.quarter_turns:
            linear = _quarter_turns((uniform[5] * 4).long().clamp(max=3)) @ linear
        centre = torch.stack(
            (
                (1 - window) * signed[6] + 2 * self.shift * signed[8],
                (1 - window) * signed[7] + 2 * self.shift * signed[9],
            ),
            dim=-1,
        )
        return torch.cat((linear, centre[:, :, None]), dim=-1)

    def relight(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change light and colour, never place.

        Args:
            images: (B, 3, H, W) float32 in 0..255.
            generator: Source of the numbers, on the device of `images`.

        Returns:
            (B, 3, H, W) float32 in 0..255.
        """
        if not (self.brightness or self.contrast or self.saturation or self.noise):
            return images
        signed = 2 * torch.rand(3, len(images), 1, 1, 1, generator=generator, device=images.device) - 1
        weights = torch.tensor(_GREY, dtype=images.dtype)[:, None, None].to(images.device, non_blocking=True)
        if self.brightness:
            images = images * (1 + self.brightness * signed[0])
        if self.contrast:
            mean = (images * weights).sum(dim=1, keepdim=True).mean(dim=(-2, -1), keepdim=True)
            images = mean + (images - mean) * (1 + self.contrast * signed[1])
        if self.saturation:
            grey = (images * weights).sum(dim=1, keepdim=True)
            images = grey + (images - grey) * (1 + self.saturation * signed[2])
        if self.noise:
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            images = images + 255 * self.noise * noise
        return images.clamp(0, 255)


def _turns(angle: Tensor) -> Tensor:
    """Give the rotations (B, 2, 2) by angles (B,) in radians."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack((cos, -sin, sin, cos), dim=-1).view(-1, 2, 2)


def _quarter_turns(turns: Tensor) -> Tensor:
    """Give the rotations (B, 2, 2) by `turns` (B,) quarter turns, whole numbers and no cosine's rounding."""
    cos = torch.tensor((1.0, 0.0, -1.0, 0.0), device=turns.device)[turns]
    sin = torch.tensor((0.0, 1.0, 0.0, -1.0), device=turns.device)[turns]
    return torch.stack((cos, -sin, sin, cos), dim=-1).view(-1, 2, 2)


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
