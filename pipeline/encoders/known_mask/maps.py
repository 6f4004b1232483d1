"""Known masks as the masks of a segmentation model that finds exactly them, and controls that find them elsewhere.

The controls tell what an overlay owes to where the masks are: `shifted` are the very masks at another place, `random`
are ellipses of the same sizes at places drawn from nothing. Both follow from the mask alone, whatever the order of the
samples. All of this is ours.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import scipy
import torch
from torch.nn import functional as F

from pipeline.mask_tap import MOST

Bools = npt.NDArray[np.bool_]
Map = npt.NDArray[np.uint8]
_TRIES = 64  # places that a shift is chosen among
_LONGEST = 2.0  # axis of an ellipse over its other one


def rank_map(mask: Bools | npt.NDArray[np.uint8], side_px: int) -> Map:
    """Number the parts of a mask, each a mask by itself, by their areas.

    A cell belongs to the mask where at least half of it does; a mask too small for that has every cell it touches.

    Args:
        mask: bool (H, W), over the whole image.
        side_px: S.

    Returns:
        uint8 (S, S): 0 is nothing, 1 the largest part, and so on up to 255.
    """
    finding = torch.from_numpy(mask.astype(np.float32))[None, None]
    covered = F.adaptive_avg_pool2d(finding, side_px)[0, 0].numpy()
    inside = covered >= 0.5 if (covered >= 0.5).any() else covered > 0
    parts, count = scipy.ndimage.label(inside, structure=np.ones((3, 3)))
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    rank_of = np.zeros(count + 1, np.uint8)
    largest = np.argsort(-areas, kind="stable")[:MOST]
    rank_of[largest + 1] = np.arange(1, len(largest) + 1)
    ranks: Map = rank_of[parts]
    return ranks


def shifted(known: Map) -> Map:
    """Move masks (S, S), all by one step, to where they cover least of themselves.

    Of places drawn at random the best is taken: one inside of the image, or, where the masks reach too far for that,
    one where what leaves the image at one side comes in at the other.
    """
    rows, columns = np.nonzero(known)
    if not len(rows):
        return known
    random, side = _random(known, "shifted"), len(known)
    inside, best, least = known > 0, known, len(rows) + 1
    within = (-rows.min(), side - rows.max()), (-columns.min(), side - columns.max())
    for limits in (within, ((0, side), (0, side))):
        for _ in range(_TRIES):
            down, across = (int(random.integers(*limit)) for limit in limits)
            covered = int(inside[(rows + down) % side, (columns + across) % side].sum())
            if covered < least:
                best, least = np.roll(known, (down, across), axis=(0, 1)), covered
        if not least:
            break
    return best


def at_random(known: Map) -> Map:
    """Draw an ellipse for each mask of a map (S, S), of just as many cells, the largest first as all masks are painted.

    Its cells are the nearest to a random centre, in a distance whose unit circle is an ellipse: so it has the size of
    the mask at the image's border, too.
    """
    random, side = _random(known, "random"), len(known)
    drawn = np.zeros_like(known)
    y, x = np.mgrid[:side, :side] + 0.5
    for rank, area in enumerate(np.bincount(known.ravel())[1:], start=1):
        turn, longer = math.pi * random.random(), math.sqrt(_LONGEST ** random.random())
        centre_y, centre_x = side * random.random(2)
        along = math.cos(turn) * (x - centre_x) + math.sin(turn) * (y - centre_y)
        beside = math.cos(turn) * (y - centre_y) - math.sin(turn) * (x - centre_x)
        distance = (along / longer) ** 2 + (beside * longer) ** 2
        drawn.ravel()[np.argsort(distance, axis=None, kind="stable")[:area]] = rank
    return drawn


def _random(known: Map, purpose: str) -> np.random.Generator:
    """Random numbers of a map's own."""
    digest = hashlib.sha256(purpose.encode() + known.tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
