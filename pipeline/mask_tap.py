"""What a segmentation model finds in an image as one more tap of a store, `masks`, and how good each is, `mask_scores`.

`masks` is uint8 (1, S, S) over the encoder's square input: 0 is nothing, else the mask's rank by area, 1 the largest.
The largest is painted first, so that smaller ones lie on top, and there are `MOST` at most. `mask_scores` is float32
(2, `MOST`, 1): predicted IoU and stability of the mask of rank k in column k - 1, zeros where there is none. So a later
filter needs no new extraction, and the number of masks is the number of columns that are not zero. Known masks and
their controls (`masks:shifted`) have the same form. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache import TapSpec

MASKS, SCORES = "masks", "mask_scores"
MOST = 255


def is_masks(tap: str) -> bool:
    """Whether a tap holds ranks of masks: `masks`, or a control of them such as `masks:shifted`."""
    return tap == MASKS or tap.startswith(f"{MASKS}:")


def is_scores(tap: str) -> bool:
    """Whether a tap holds what is known of the masks of another."""
    return tap == SCORES or tap.startswith(f"{SCORES}:")


def scores_of(tap: str) -> str:
    """The tap beside one of masks that holds their scores."""
    return SCORES + tap.removeprefix(MASKS)


def shapes_of(tap: str, side_px: int) -> dict[str, tuple[int, int, int]]:
    """Shape (C, h, w) of a tap of masks and of their scores."""
    return {tap: (1, side_px, side_px), scores_of(tap): (2, MOST, 1)}


def dtype_of(tap: str, dtype: str) -> str:
    """Type that a tap is stored in, where features are stored in `dtype`."""
    if is_masks(tap):
        return "uint8"
    return "float32" if is_scores(tap) else dtype


def features_of(taps: Mapping[str, TapSpec]) -> list[str]:
    """Those taps of a store that hold features: no images, no masks, no scores of masks."""
    return [tap for tap, spec in taps.items() if not (spec.holds_pixels or is_masks(tap) or is_scores(tap))]


def with_scores(taps: Iterable[str]) -> list[str]:
    """Taps, each of masks followed by its scores, which stay beside it."""
    both = ((tap, scores_of(tap)) if is_masks(tap) else (tap,) for tap in taps)
    return list(dict.fromkeys(tap for names in both for tap in names))


def others_of(taps: Iterable[str]) -> list[str]:
    """Those taps that hold masks or their scores."""
    return [tap for tap in taps if is_masks(tap) or is_scores(tap)]
