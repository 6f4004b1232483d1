"""Everything in an image: prompts all over it, and of the decoder's masks those that are good, stable and different.

What is kept is what SAM's `SamAutomaticMaskGenerator` keeps (the oracle of the tests), in another order of work: it
brings every mask to the size of the image and encodes it before it drops most of them. Here masks are judged near
the decoder's own grid, and only those that are left are brought to the grid that is stored; a mask whose stability is
close to the threshold is looked at again at the size of the encoder's input. The predicted IoU is known before a mask
is drawn, so prompts of which none would pass are never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from pipeline.encoders.masks.decoder import Decoder, Seen
from pipeline.encoders.masks.rules import MaskRules
from pipeline.mask_tap import MOST

_AT_ONCE = {"cpu": 4}  # prompts: their maps of the image then stay in the cache
_AT_ONCE_ELSEWHERE = 64
_TIMES = 2  # the decoder's grid: finer than that, the stability of a mask hardly changes
_CLOSE = 0.02, 0.15  # to the threshold of stability, and more for each unit that it is below 1: such masks are rougher
_SINGLE, _THREE = (0,), (1, 2, 3)  # which of the decoder's four masks


class Everything(nn.Module):
    """Masks of everything in an image."""

    def __init__(self, decoder: Decoder, rules: MaskRules, input_px: int, precision: str = "float32") -> None:
        """Make one.

        Args:
            decoder: Of the image encoder's own model.
            rules: What to ask, what to keep and how to store it.
            input_px: Side of the encoder's square input, px.
            precision: Type of the decoder's products; float16 stays float32 on a CPU.
        """
        super().__init__()
        self.decoder, self._rules, self._input_px = decoder, rules, input_px
        self._type = getattr(torch, precision)

    def forward(self, neck: Tensor, size: tuple[int, int], finer: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Find the masks of one image.

        Args:
            neck: (h, w, C), the image encoder's last map.
            size: Height and width of the image within the input, px.
            finer: See `Decoder.look`.

        Returns:
            uint8 (1, S, S), the rank of the mask that lies on top of each cell, and float32 (2, 255, 1), predicted IoU
            and stability by rank: see `pipeline.mask_tap`.
        """
        return paint(*self.masks(neck, size, finer))

    def masks(self, neck: Tensor, size: tuple[int, int], finer: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """The masks one by one, the best first: bool (K, S, S), and (2, K) predicted IoU and stability."""
        # On a CPU torch lowers to bfloat16 only.
        lower = self._type == torch.bfloat16 or (self._type == torch.float16 and neck.is_cuda)
        with torch.autocast(neck.device.type, self._type if lower else None, enabled=lower):
            logits, scores = self.candidates(self.decoder.look(neck, finer), size)
        boxes = boxes_around(logits, self._extent(logits, size))
        kept = nms(boxes, scores[0], self._rules.overlap)
        masks, scores = self._stored(logits[kept], size), scores[:, kept]
        if self._rules.min_region_px:
            masks, kept = without_small_regions(masks, self._rules.min_region_px, self._rules.overlap)
            scores = scores[:, kept]
        return masks, scores

    def candidates(self, seen: Seen, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """All masks that pass the two filters, many of them of the same thing.

        Returns:
            Logits float16 (K, 4h, 4w), and (2, K) predicted IoU and stability.
        """
        rules = self._rules
        numbers = _THREE if rules.prompts == "points" else _SINGLE
        found, scores = [], []
        for prompts in self._embedded(size, seen.cells.device):
            answers = self.decoder.ask(seen, prompts)
            predicted = answers.predicted_iou[:, list(numbers)].float()
            good = predicted > rules.predicted_iou if rules.predicted_iou > 0 else torch.ones_like(predicted).bool()
            worth = good.any(1).nonzero()[:, 0]
            if not len(worth):
                continue
            logits = self.decoder.draw(seen, answers, worth, numbers)[good[worth]].float()
            stability = self._stability(logits, size)
            stable = stability >= rules.stability  # not so where nothing is above the cut-off, which gives no number
            found.append(logits[stable].half())
            scores.append(torch.stack([predicted[good][stable], stability[stable]]))
        if not found:
            h, w = seen.grid
            none = seen.cells.new_zeros
            return none(0, 4 * h, 4 * w).half(), none(2, 0).float()
        with torch.autocast(seen.cells.device.type, enabled=False):  # which joins no float16 on a CPU
            return torch.cat(found), torch.cat(scores, dim=1)

    def _embedded(self, size: tuple[int, int], device: torch.device) -> Iterator[Tensor]:
        """Tokens (B, n, C) of the prompts on an image, as many at once as the device does well with."""
        rules = self._rules
        at_once = _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE)
        points = rules.prompts == "points"
        places = point_grid(size, rules.points) if points else box_grid(size, rules.box_sides, rules.box_step)
        embed = self.decoder.embed_points if points else self.decoder.embed_boxes
        prompts = embed(places.to(device))
        yield from (prompts[at : at + at_once] for at in range(0, len(prompts), at_once))

    def _extent(self, maps: Tensor, size: tuple[int, int]) -> tuple[float, float]:
        """Height and width of the image on the grid of maps (..., g, g), cells."""
        side = maps.shape[-1] / self._input_px
        return size[0] * side, size[1] * side

    def _stability(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Stability of masks (K, g, g): (K,), nan where even the lower cut-off leaves nothing."""
        offset, threshold = self._rules.stability_offset, self._rules.stability
        side = min(_TIMES * logits.shape[-1], self._input_px)
        stability = stability_of(self._inside(_resized(logits, side), size), offset)
        if side < self._input_px:
            close = _CLOSE[0] + _CLOSE[1] * (1 - threshold)
            for mask in ((stability - threshold).abs() < close).nonzero()[:, 0]:
                whole = _resized(logits[mask][None], self._input_px)
                stability[mask] = stability_of(self._inside(whole, size), offset)[0]
        return stability

    def _inside(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """The part of maps (K, g, g) that is image."""
        rows, columns = (min(math.ceil(cells), maps.shape[-1]) for cells in self._extent(maps, size))
        return maps[:, :rows, :columns]

    def _stored(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks bool (K, S, S) on the stored grid, nothing outside the image."""
        side = self._rules.side_px
        masks = _resized(logits.float(), side) > 0
        rows, columns = (max(1, round(cells)) for cells in self._extent(masks, size))
        masks[:, rows:], masks[:, :, columns:] = False, False
        return masks


def point_grid(size: tuple[int, int], points: int) -> Tensor:
    """Points in the middle of the cells of a grid over an image: float32 (points^2, 2), x and y in px."""
    middles = (torch.arange(points) + 0.5) / points
    y, x = torch.meshgrid(middles * size[0], middles * size[1], indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def box_grid(size: tuple[int, int], sides: Sequence[float], step: float) -> Tensor:
    """Square boxes of several sides all over an image, evenly and flush with its borders; our choice.

    Args:
        size: Height and width of the image, px.
        sides: As shares of the longer side; a box is cut at the borders where the image is narrower.
        step: From box to box at most, as a share of their side.

    Returns:
        float32 (B, 4), x and y of the upper left and of the lower right corner, px.
    """
    found = []
    for share in sides:
        side = share * max(size)
        starts = []
        for length in size:
            room = max(length - side, 0.0)
            starts.append(torch.linspace(0, room, math.ceil(room / (step * side) - 1e-9) + 1))
        y, x = (at.flatten() for at in torch.meshgrid(*starts, indexing="ij"))
        found.append(torch.stack([x, y, (x + side).clamp(max=size[1]), (y + side).clamp(max=size[0])], dim=1))
    return torch.cat(found)


def stability_of(logits: Tensor, offset: float) -> Tensor:
    """IoU of the masks above and below the cut-off by an offset: (K, h, w) to (K,); nan for nothing at all."""
    return (logits > offset).sum((1, 2)) / (logits > -offset).sum((1, 2))


def boxes_around(logits: Tensor, extent: tuple[float, float]) -> Tensor:
    """Boxes around masks, between cells where the outline runs between them.

    Args:
        logits: (K, g, g).
        extent: Height and width of the image on that grid, cells.

    Returns:
        float32 (K, 4), left, top, right, bottom.
    """
    edges = []
    for axis, length in ((2, extent[0]), (1, extent[1])):
        cells = min(math.ceil(length), logits.shape[1])
        other = min(math.ceil(extent[2 - axis]), logits.shape[1])
        inside = logits[:, :cells, :other] if axis == 2 else logits[:, :other, :cells]
        profile = inside.float().amax(axis)  # (K, cells)
        edges.append((_start(profile), length - _start(profile.flip(1)) - (cells - length)))
    (top, bottom), (left, right) = edges
    return torch.stack([left, top, right.clamp(max=extent[1]), bottom.clamp(max=extent[0])], dim=1)


def _start(profile: Tensor) -> Tensor:
    """Where a profile (K, n) first rises above zero, in cells from its beginning: (K,)."""
    first = (profile > 0).int().argmax(1, keepdim=True)
    above, below = profile.gather(1, first)[:, 0], profile.gather(1, (first - 1).clamp(min=0))[:, 0]
    between = first[:, 0] + 0.5 - above / (above - below).clamp(min=1e-6)
    return torch.where(first[:, 0] == 0, 0.0, between)


def without_small_regions(masks: Tensor, least_px: int, overlap: float) -> tuple[Tensor, Tensor]:
    """Fill small holes, remove small islands, and drop masks that have become alike, as SAM's generator does.

    Args:
        masks: bool (K, S, S), the best first.
        least_px: Pixels of the smallest region that stays; of a mask that has none, its largest.
        overlap: IoU of the boxes above which of two masks the one that was changed is dropped.

    Returns:
        Masks bool (K', S, S), and which they were: (K',).
    """
    cleaned = np.stack([_clean(mask, least_px) for mask in masks.cpu().numpy()]) if len(masks) else masks.cpu().numpy()
    changed = torch.from_numpy((cleaned != masks.cpu().numpy()).any((1, 2)))
    whole = torch.from_numpy(cleaned)
    kept = torch.arange(len(masks))
    if changed.any():
        kept = nms(_pixel_boxes(whole), (~changed).float(), overlap).sort().values
    return whole[kept].to(masks.device), kept.to(masks.device)


def _clean(mask: npt.NDArray[np.bool_], least_px: int) -> npt.NDArray[np.bool_]:
    """Fill holes and remove islands of fewer pixels, which may touch by their corners."""
    holes, sizes = _regions(~mask)
    mask = mask | (sizes < least_px)[holes] & ~mask
    islands, sizes = _regions(mask)
    stay = sizes >= least_px
    stay[0] = False
    if len(sizes) > 1 and not stay.any():
        stay[1 + sizes[1:].argmax()] = True
    kept: npt.NDArray[np.bool_] = stay[islands]
    return kept


def _regions(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The number of the region of each pixel, from 1, and how many pixels each number has."""
    regions, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    return regions, np.bincount(regions.ravel(), minlength=count + 1)


def _pixel_boxes(masks: Tensor) -> Tensor:
    """Boxes around masks bool (K, S, S): float32 (K, 4), first and last column and row."""
    found = []
    for axis in (1, 2):
        any_there = masks.any(axis).int()
        found.append((any_there.argmax(1), any_there.shape[1] - 1 - any_there.flip(1).argmax(1)))
    (left, right), (top, bottom) = found
    return torch.stack([left, top, right, bottom], dim=1).float()


def paint(masks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Lay masks over each other, the largest first.

    Args:
        masks: bool (K, S, S), the best first; beyond 255 they are left out.
        scores: (2, K).

    Returns:
        uint8 (1, S, S) and float32 (2, 255, 1): see `pipeline.mask_tap`.
    """
    areas = masks.sum((1, 2))
    there = (areas > 0).nonzero()[:MOST, 0]  # one may be too small for the stored grid
    order = there[areas[there].argsort(descending=True, stable=True)]
    painted = torch.zeros(1, *masks.shape[1:], dtype=torch.uint8, device=masks.device)
    for rank, mask in enumerate(masks[order], start=1):
        painted[0, mask] = rank
    known = torch.zeros(2, MOST, 1, device=masks.device)
    known[:, : len(order), 0] = scores[:, order].clamp(min=1e-6)  # zero means that there is no mask
    return painted, known


def _resized(maps: Tensor, side: int) -> Tensor:
    """Maps (K, g, g) on another grid, bilinearly and without smoothing, as SAM does it."""
    if maps.shape[-1] == side:
        return maps
    return F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
