"""How everything in an image is segmented: prompts, filters, what is stored; checked before a weight is read. No torch.

Defaults of points are those of SAM's own `SamAutomaticMaskGenerator`, and SAM 2's of its own. The grid of boxes is
ours: MedSAM and LiteMedSAM were trained on boxes only, so boxes of three sides stand all over the image instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pipeline.encoders.family import JSON
from pipeline.errors import ConfigError

Prompts = Literal["points", "boxes"]

BOXES: Mapping[str, Any] = MappingProxyType(
    {"prompts": "boxes", "predicted_iou": 0.84, "stability": 0.72, "overlap": 0.3}
)
"""What suits weights that were trained on boxes: our choice, by LiteMedSAM's masks of lesions in training images."""

_VERSION = 1  # raise when the same image, weights and rules give other masks
_RANGES: Mapping[str, tuple[float, float]] = {
    "points": (1, 256),
    "box_step": (0.05, 1),
    "predicted_iou": (0, 1),
    "stability": (0, 1),
    "stability_offset": (0, 100),
    "overlap": (0, 1),
    "min_region_px": (0, 2**20),
    "side_px": (16, 1024),
}


@dataclass(frozen=True)
class MaskRules:
    """How masks are found in an image, filtered and stored.

    Attributes:
        prompts: `points`, one in the middle of each cell of a grid, of which each gives the decoder's three masks; or
            `boxes`, of which each gives one.
        points: Points along each side of the grid.
        box_sides: Sides of the square boxes, as shares of the image's longer side.
        box_step: From one box to the next of its side, as a share of that side.
        predicted_iou: Masks whose IoU the decoder itself thinks to be no larger are dropped.
        stability: Masks are dropped whose area shrinks below this share when the cut-off rises: IoU of the masks at
            `stability_offset` above and below it.
        stability_offset: In logits.
        overlap: IoU of the boxes around two masks above which the one with the smaller predicted IoU is dropped.
        min_region_px: Holes and islands with fewer pixels of the stored map are filled and removed; 0 for none.
        side_px: Side S of the stored map.

    Raises:
        ConfigError: A value is out of its range.
    """

    prompts: Prompts
    points: int = 32
    box_sides: tuple[float, ...] = (0.2, 0.35, 0.6)
    box_step: float = 0.4
    predicted_iou: float = 0.88
    stability: float = 0.95
    stability_offset: float = 1.0
    overlap: float = 0.7
    min_region_px: int = 16
    side_px: int = 256

    def __post_init__(self) -> None:
        if self.prompts not in ("points", "boxes"):
            message = f"encoder.masks.prompts: got {self.prompts!r}, expected 'points' or 'boxes'"
            raise ConfigError(message)
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                message = f"encoder.masks.{name}: got {value!r}, expected {least} to {most}"
                raise ConfigError(message)
        if not self.box_sides or not all(0 < side <= 1 for side in self.box_sides):
            message = (
                f"encoder.masks.box_sides: got {list(self.box_sides)!r}, expected at least one share of the image's "
                f"longer side, above 0 and at most 1"
            )
            raise ConfigError(message)

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> MaskRules:
        """Rules of a configuration's section, in which None leaves a value to the encoder.

        Args:
            settings: Values by name; None for none.
            defaults: What suits the encoder's weights: `prompts`, and thresholds that differ from the official ones.

        Raises:
            ConfigError: There is no such setting, or a value is out of its range.
        """
        given = {name: value for name, value in (settings or {}).items() if value is not None}
        unknown = given.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            valid = ", ".join(field.name for field in dataclasses.fields(cls))
            message = f"encoder.masks has no {min(unknown)!r}; valid: {valid}"
            raise ConfigError(message)
        usual = defaults if given.get("prompts", defaults["prompts"]) == defaults["prompts"] else {}
        values = {**usual, **given}
        if "box_sides" in values:
            values["box_sides"] = tuple(values["box_sides"])
        return cls(**values)

    def fingerprint(self) -> dict[str, JSON]:
        """What of them the masks depend on."""
        grid: dict[str, JSON] = (
            {"points": self.points}
            if self.prompts == "points"
            else {"box_sides": list(self.box_sides), "box_step": self.box_step}
        )
        filters = ("predicted_iou", "stability", "stability_offset", "overlap")
        return {
            "version": _VERSION,
            "prompts": self.prompts,
            **grid,
            **{name: float(getattr(self, name)) for name in filters},
            "min_region_px": self.min_region_px,
            "side_px": self.side_px,
        }
