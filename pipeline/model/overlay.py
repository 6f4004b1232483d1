"""The overlay: masks painted over the image, so that a classifier sees where things begin and end.

Masks are painted on decoded images, before anything moves them, so that image and masks move as one; light changes
afterwards, for both. It is done at each step anew: an image with its masks takes a hundredth of the time that a
ResNet-18 takes to learn from it, and a painted copy of every image would have to be kept for every palette.

Known of MedFocusCLIP is a half-transparent overlay, of training and of test images. Likely, and the default: what the
notebooks of SAM 2 draw, one colour a mask, an opacity of .5, a thin blue outline. Where no mask is, the plain image is
taken, whatever the palette; that is ours.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.mask_tap import MOST, is_masks, scores_of, shapes_of
from pipeline.model.uses import Seen, Shape, Use

Palette = Literal["rank", "random", "binary", "cutout"]
_CONTOUR = (0.0, 0.0, 255.0)  # as SAM 2's notebooks outline a mask, and
_CONTOUR_OPACITY = 0.4
_OUTLINE, _PLAIN = MOST + 1, MOST + 2  # places in a table of colours, behind those of the ranks
_WIDEST = 4  # pixels of an image to a cell of its masks
_PRIME = 2**31 - 1


@dataclass(frozen=True)
class OverlayOptions:
    """How masks are painted over images.

    Attributes:
        tap: Which map of masks (see `pipeline.mask_tap`).
        opacity: Of the colours, from 0 to 1.
        palette: `"rank"`, a colour for each rank, the same in all images; `"random"`, colours of each image's own, as
            SAM's notebooks draw them, which follow from its masks; `"binary"`, white masks on black in place of the
            image; `"cutout"`, the image without what is in no mask.
        contour: Whether colours have a thin outline. It belongs to the mask that lies on top.
        min_iou: Masks whose predicted IoU is below are left out.
        min_stability: The same of their stability.
        max_masks: Those of the highest predicted IoU are painted, of equal ones the larger; None for all.

    Where a mask is left out the image shows, also where a larger mask lay below: nothing of it is known there.

    Raises:
        ConfigError: A value is out of range, or the tap is no map of masks.
    """

    tap: str = "masks"
    opacity: float = 0.5
    palette: Palette = "rank"
    contour: bool = True
    min_iou: float = 0.0
    min_stability: float = 0.0
    max_masks: int | None = None

    def __post_init__(self) -> None:
        if not is_masks(self.tap):
            msg = (
                f"model.overlay.tap is {self.tap!r}, which is no map of masks: name the tap 'masks', or of known masks "
                f"'masks:shifted' or 'masks:random'. Masks move with the image they are painted on, so there are none "
                f"of views."
            )
            raise ConfigError(msg)
        if self.palette not in get_args(Palette):
            msg = f"model.overlay.palette is {self.palette!r}: choose one of {', '.join(get_args(Palette))}."
            raise ConfigError(msg)
        for name in ("opacity", "min_iou", "min_stability"):
            if not 0 <= getattr(self, name) <= 1:
                msg = f"model.overlay.{name} is {getattr(self, name)!r}: give a number from 0 to 1."
                raise ConfigError(msg)
        if self.max_masks is not None and self.max_masks < 1:
            msg = f"model.overlay.max_masks is {self.max_masks!r}: give a number from 1 up, or null for all."
            raise ConfigError(msg)

    @property
    def filters(self) -> bool:
        """Whether masks are left out for their scores."""
        return self.min_iou > 0 or self.min_stability > 0 or self.max_masks is not None

    @property
    def in_words(self) -> str:
        """Such as `masks in fixed colours, opacity 0.5, outlined`."""
        how = {
            "rank": f"{self.tap} in fixed colours, opacity {self.opacity:g}",
            "random": f"{self.tap} in colours of each image's own, opacity {self.opacity:g}",
            "binary": f"{self.tap} in white on black, in place of the image",
            "cutout": f"nothing but what is in {self.tap}",
        }[self.palette]
        outlined = ", outlined" if self.contour and self.palette in ("rank", "random") else ""
        least = f", of a predicted IoU of at least {self.min_iou:g}" if self.min_iou else ""
        steady = f", of a stability of at least {self.min_stability:g}" if self.min_stability else ""
        most = f", at most {self.max_masks} of them" if self.max_masks is not None else ""
        return f"{how}{outlined}{least}{steady}{most}"

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps that it reads: the masks, and their scores where they are asked about."""
        return (self.tap, scores_of(self.tap)) if self.filters else (self.tap,)


def check_width(tap: str, side: int, image_px: int) -> None:
    """Refuse masks that would be blocks in the image, before they are found or painted.

    Args:
        tap: Of the masks.
        side: Cells along a side of their map, as it is stored.
        image_px: Side of the images that the classifier sees.

    Raises:
        ConfigError: The image is more than `_WIDEST` times wider.
    """
    if image_px > _WIDEST * side:
        msg = (
            f"model.image_px is {image_px}, and the masks of tap {tap!r} are stored at {side} cells a side: an overlay "
            f"more than {_WIDEST} times wider than what is stored would be of blocks. Extract masks with a larger "
            f"encoder.masks.side_px, or set model.image_px to at most {_WIDEST * side}."
        )
        raise ConfigError(msg)


class Overlay(nn.Module, Use):
    """Paints masks over images; learns nothing.

    Args:
        options: How.
        taps: (C, h, w) of each stored tap.
        image_px: Side of the images that the classifier sees.

    Raises:
        ConfigError: A tap is not there or has not the shape of masks; or the image is wider than what is stored of
            them: `_WIDEST` pixels or more to a cell, whose masks would be blocks.
    """

    colours: Tensor

    def __init__(self, options: OverlayOptions, taps: Mapping[str, Shape], image_px: int) -> None:
        super().__init__()
        self.options = options
        for tap in options.taps:
            if tap not in taps:
                msg = (
                    f"model.overlay needs the tap {tap!r}, which the store does not hold; it holds: {', '.join(taps)}."
                )
                raise ConfigError(msg)
        shape = taps[options.tap]
        expected = shapes_of(options.tap, shape[-1])
        wrong = [tap for tap in options.taps if tuple(taps[tap]) != expected[tap]]
        if wrong:
            msg = (
                f"The tap {wrong[0]!r} has the shape {tuple(taps[wrong[0]])} and that of masks is "
                f"{expected[wrong[0]]}: model.overlay cannot be painted from it; name a map of masks."
            )
            raise ConfigError(msg)
        check_width(options.tap, shape[-1], image_px)
        self.register_buffer("colours", _table(options), persistent=False)

    def on_images(self, images: Tensor, seen: Seen) -> Tensor:
        """Paint the masks of decoded images (B, 3, H, W) over them; the result is of the same type."""
        return self.paint(images, seen, seen.features[self.options.tap])

    def paint(self, images: Tensor, seen: Seen, found: Tensor) -> Tensor:
        """Paint masks over images (B, 3, H, W).

        Args:
            images: As they were decoded.
            seen: With the masks to paint.
            found: (B, 1, S, S), all that were found in the images: colours of an image's own follow from these, so that
                one that is left out changes no other's.
        """
        ranks = self.ranks(seen, (images.shape[-2], images.shape[-1]))
        places = torch.where(_outline(ranks), _OUTLINE, ranks) if self._outlines else ranks
        some = (ranks.flatten(1).amax(dim=1) > 0)[:, None, None]
        places = torch.where(some, places, _PLAIN)
        if self.options.palette == "random":
            table = _of_each_image(self.colours, found[:, 0])  # (B, n, 4)
            first = len(self.colours) * torch.arange(len(images), device=images.device)
            painted = nn.functional.embedding(places + first[:, None, None], table.flatten(0, 1))
        else:
            painted = nn.functional.embedding(places, self.colours)  # (B, H, W, 4)
        paint, share = painted[..., :3].permute(0, 3, 1, 2), painted[..., 3][:, None]
        return (images * (1 - share) + paint).round().to(images.dtype)

    def ranks(self, seen: Seen, size: tuple[int, int]) -> Tensor:
        """Say which mask is painted where, by its rank, on images of a size: (B, height, width) int64, 0 for none."""
        ranks = lay(seen.features[self.options.tap][:, 0], seen.extents, size).long()
        if not self.options.filters:
            return ranks
        wanted = self.wanted(seen.features[scores_of(self.options.tap)])
        return ranks * wanted.gather(1, ranks.flatten(1)).view_as(ranks)

    def wanted(self, scores: Tensor) -> Tensor:
        """Choose masks by their scores (B, 2, 255, 1): (B, 256) of yes and no, by rank."""
        iou, stability = scores[:, 0, :, 0].float(), scores[:, 1, :, 0].float()
        there = (scores[:, :, :, 0] != 0).any(dim=1)
        chosen = there & (iou >= self.options.min_iou) & (stability >= self.options.min_stability)
        if self.options.max_masks is not None:
            known = torch.where(chosen, iou, -1.0)
            number = torch.arange(MOST, device=iou.device)
            better = (known[:, None, :] > known[:, :, None]) | (  # counted, for ONNX has no stable sort
                (known[:, None, :] == known[:, :, None]) & (number[None, :] < number[:, None])
            )
            chosen = chosen & (better.sum(dim=2) < self.options.max_masks)
        return torch.cat((torch.zeros_like(chosen[:, :1]), chosen), dim=1)

    @property
    def _outlines(self) -> bool:
        return self.options.contour and self.options.palette in ("rank", "random")


def lay(maps: Tensor, extents: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Lay maps over their images: crop the padding, and give each pixel the number of the cell that it is in.

    Args:
        maps: (B, S, S) over the encoder's padded square.
        extents: (B, 2) float32, the part of its height and width that is image; None where all of it is.
        size: (height, width) of the images.

    Returns:
        (B, height, width), of the type of `maps`.
    """
    if extents is None:
        down, across = (_cells(size[axis], maps.shape[axis - 2], None, maps.device)[0] for axis in (0, 1))
        return maps[:, down][:, :, across]
    rows = _cells(size[0], maps.shape[-2], extents[:, 0], maps.device)
    columns = _cells(size[1], maps.shape[-1], extents[:, 1], maps.device)
    laid = maps.gather(1, rows[:, :, None].expand(-1, -1, maps.shape[-1]))
    return laid.gather(2, columns[:, None, :].expand(-1, size[0], -1))


def _cells(pixels: int, cells: int, extent: Tensor | None, device: torch.device) -> Tensor:
    """Find the cell that each pixel's centre lies in, along an axis: (B, pixels), held within those that are image."""
    whole = torch.ones(1, device=device) if extent is None else extent
    at = (torch.arange(pixels, device=device) + 0.5) / pixels * (whole[:, None] * cells)
    tolerance = 1e-3  # of a cell: extents are float32 and a whole number of cells must stay one
    last = ((whole * cells - tolerance).ceil() - 1).clamp(min=0)
    return torch.minimum(at.floor(), last[:, None]).long()


def _outline(ranks: Tensor) -> Tensor:
    """Mark the pixels of masks (B, H, W) beside which, up, down, left or right, a mask below or nothing shows."""
    edge = torch.zeros_like(ranks, dtype=torch.bool)
    edge[:, 1:] |= ranks[:, 1:] > ranks[:, :-1]
    edge[:, :-1] |= ranks[:, :-1] > ranks[:, 1:]
    edge[:, :, 1:] |= ranks[:, :, 1:] > ranks[:, :, :-1]
    edge[:, :, :-1] |= ranks[:, :, :-1] > ranks[:, :, 1:]
    return edge


def _table(options: OverlayOptions) -> Tensor:
    """What becomes of a pixel: for 0, each rank, an outline and an image without masks, added RGB and share: (258, 4).

    A pixel p becomes p (1 - share) + added.
    """
    table = torch.zeros(_PLAIN + 1, 4)
    if options.palette == "binary":
        table[1:_OUTLINE, :3] = 255.0
        table[:_OUTLINE, 3] = 1.0
    elif options.palette == "cutout":
        table[0, 3] = 1.0
    else:
        if options.palette == "rank":
            table[1:_OUTLINE, :3] = options.opacity * torch.tensor([rank_colour(rank) for rank in range(1, MOST + 1)])
        table[1:_OUTLINE, 3] = options.opacity
        table[_OUTLINE, :3] = _CONTOUR_OPACITY * torch.tensor(_CONTOUR)
        table[_OUTLINE, 3] = _CONTOUR_OPACITY
    return table


def rank_colour(rank: int) -> tuple[float, float, float]:
    """Give the colour of a rank, 0 to 255: bright, with hues as far apart as those before it leave room for."""
    hue = 0.08 + (rank - 1) * (5**0.5 - 1) / 2  # orange first, far from the blue of outlines
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _of_each_image(table: Tensor, maps: Tensor) -> Tensor:
    """Give each image a table with colours that follow from its masks (B, S, S): (B, 258, 4)."""
    colours = image_colours(maps) * table[1:_OUTLINE, 3:]
    own = torch.cat((colours, table[1:_OUTLINE, 3:].expand(len(maps), -1, -1)), dim=2)
    return torch.cat((table[:1].expand(len(maps), -1, -1), own, table[_OUTLINE:].expand(len(maps), -1, -1)), dim=1)


def image_colours(maps: Tensor) -> Tensor:
    """Draw 255 colours for each image from its masks (B, S, S): (B, 255, 3) float32, whole numbers in 0..255.

    The same masks give the same colours, in any batch, order and machine: whole numbers of 64 bits do it.
    """
    some = maps[:, ::8, ::8].flatten(1).long()
    places = torch.arange(1, some.shape[1] + 1, device=maps.device)
    seed = (some * (places * 48271 % _PRIME)).sum(dim=1) % _PRIME  # at most 255 * 2^31 * 2^10
    drawn = seed[:, None] + torch.arange(1, 3 * MOST + 1, device=maps.device) * 69621
    for _ in range(3):
        drawn = drawn % _PRIME
        drawn = drawn * drawn % _PRIME + 48271
    return (drawn % _PRIME * 256 // _PRIME).float().view(-1, MOST, 3)
