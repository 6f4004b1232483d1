"""How an encoder makes features, whatever its family: which depths it keeps, of which views, averaged how. No torch.

What differs between families is their geometry (`Geometry`); the rest, down to the fingerprint, is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

from pipeline import mask_tap
from pipeline.encoders.family import JSON, Shape
from pipeline.encoders.masks.rules import MaskRules
from pipeline.encoders.pooling import Pool, choose_pools
from pipeline.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
MEAN_OF_1, STD_OF_1 = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the same of colours in [0, 1], but for rounding
_VERSION = 1  # of each preprocessing: raise it when the same image gives other pixels
PREPROCESSINGS: Mapping[str, Mapping[str, JSON]] = MappingProxyType(
    {
        "sam": {"version": _VERSION, "mean": list(MEAN), "std": list(STD)},
        "medsam": {"version": _VERSION},
        "lite_medsam": {"version": _VERSION},
        "sam2": {"version": _VERSION, "mean": list(MEAN_OF_1), "std": list(STD_OF_1)},
        "clip": {"version": _VERSION},
        "clip_whole": {"version": _VERSION},
    }
)
"""What `preprocessing` makes of an image, by name, as a fingerprint has it."""

VIEWS: Mapping[str, tuple[bool, int]] = (
    MappingProxyType(  # mirrored left to right first, then quarter turns to the left
        {
            "identity": (False, 0),
            "rot90": (False, 1),
            "rot180": (False, 2),
            "rot270": (False, 3),
            "hflip": (True, 0),
            "transpose": (True, 1),
            "vflip": (True, 2),
            "transverse": (True, 3),
        }
    )
)


class Geometry(ABC):
    """What a family says of one of its encoders.

    A depth counts what has been computed: 0 after the patch embedding, i + 1 after step i, one more after the neck.

    Attributes:
        name: What configurations call it.
        input_px: Side of the square input that its weights were trained for, px.
        step: What the family calls a step, such as `block`.
        one_grid: Whether every depth has the same grid.
        arithmetic: Raised when the same pixels and weights give other features.
        preprocessings: Names of what its weights may have been trained with, its own first.
        masks: What suits its mask decoder by preprocessing, as `MaskRules.of` takes it; empty where there is none.
        decoder_heads: Attention heads of its mask decoder.
    """

    name: str
    input_px: int
    preprocessings: tuple[str, ...]
    masks: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    decoder_heads: int = 8
    step: ClassVar[str] = "block"
    one_grid: ClassVar[bool]
    arithmetic: ClassVar[int]

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many there are between the patch embedding and the neck."""

    @property
    @abstractmethod
    def named_depths(self) -> dict[str, int]:
        """Depth of each of the five named taps, in order."""

    def arithmetic_in(self, precision: str) -> int:
        """What `arithmetic` is in a precision, for a family in which only some have other features than before."""
        return self.arithmetic

    @property
    def multiple_px(self) -> int:
        """What an input's side has to be a multiple of, px: a cell of the coarsest grid."""
        return self.stride_px(None)

    def depth_of(self, tap: str) -> int:
        """Depth of a tap: one of the five names, or a step's number, such as `block:3`.

        Raises:
            ConfigError: There is no such tap.
        """
        numbered = {f"{self.step}:{number}": number + 1 for number in range(self.steps)}
        depths = {**numbered, **self.named_depths}
        if tap not in depths:
            message = f"{self.name} has no tap {tap!r}; valid taps: {', '.join(self.named_depths)}" + (
                f", and {self.step}:0 to {self.step}:{self.steps - 1}" if self.steps else ""
            )
            raise ConfigError(message)
        return depths[tap]

    def describe(self, depth: int) -> str:
        """What is computed last at a depth, in words that keep their meaning whatever the five names come to mean."""
        return {0: "patch", self.steps + 1: "neck"}.get(depth, f"{self.step}:{depth - 1}")

    @abstractmethod
    def channels_at(self, depth: int) -> int:
        """Channels of the map at a depth."""

    @abstractmethod
    def stride_px(self, depth: int | None) -> int:
        """Pixels of the input along a cell's side at a depth; of the coarsest grid for None."""

    def grid(self, depth: int, input_px: int) -> int:
        """Cells along each side at a depth, of an input of another size than its own as well."""
        return input_px // self.stride_px(depth)

    def preprocessing_fields(self, name: str) -> dict[str, JSON]:
        """What a preprocessing does to an image, as a fingerprint has it."""
        return dict(PREPROCESSINGS[name])


@dataclass(frozen=True)
class Recipe:
    """How features are made, apart from the weights and the pixels.

    Attributes:
        architecture: Whose geometry.
        taps: Depths by name; of a turned image with `@` and one of `VIEWS`.
        input_px: Side S of the square input, px.
        pool: See `pooling.choose_pools`.
        precision: Type of the matrix products.
        preprocessing: What the weights were trained with.
        masks: How masks are made, where the tap `masks` is among the taps.

    Raises:
        ConfigError: There is no such tap, pool, precision, preprocessing or input size; with the valid values.
    """

    architecture: Geometry
    taps: tuple[str, ...]
    input_px: int
    pool: Pool = 1
    precision: str = "float32"
    preprocessing: str = "sam"
    masks: MaskRules | None = None

    @classmethod
    def of(
        cls,
        architecture: Geometry,
        taps: tuple[str, ...],
        input_px: int | None = None,
        pool: Pool = None,
        precision: str = "float32",
        preprocessing: str | None = None,
        masks: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """Leave to the architecture what is None: the side of its input, and what its weights were trained with."""
        side = architecture.input_px if input_px is None else input_px
        whose = preprocessing or architecture.preprocessings[0]
        rules = _mask_rules(architecture, whose, masks) if mask_tap.MASKS in taps else None
        return cls(architecture, taps, side, pool, precision, whose, rules)

    def __post_init__(self) -> None:
        if not self.taps or len(set(self.taps)) < len(self.taps):
            message = f"taps are {list(self.taps)!r}; expected at least one, each once"
            raise ConfigError(message)
        _ = self.sources  # refuses taps that there are not
        multiple = self.architecture.multiple_px
        if self.input_px < multiple or self.input_px % multiple:
            message = (
                f"an input of {self.input_px!r} px does not divide into patches of {multiple} px; "
                f"try {self.architecture.input_px}"
            )
            raise ConfigError(message)
        _ = self.pools  # refuses one that does not fit
        choices = (
            ("precision", self.precision, get_args(Precision)),
            ("preprocessing", self.preprocessing, self.architecture.preprocessings),
        )
        for what, value, valid in choices:
            if value not in valid:
                message = f"there is no {what} {value!r}; valid: {', '.join(valid)}"
                raise ConfigError(message)

    @cached_property
    def sources(self) -> Mapping[str, tuple[int, str]]:
        """Depth and view of each tap of features."""
        masks = mask_tap.shapes_of(mask_tap.MASKS, 1) if self.masks else {}
        return {tap: parse_tap(self.architecture, tap) for tap in self.taps if tap not in masks}

    @cached_property
    def _grids(self) -> Mapping[str, int]:
        """Cells along each side of each tap's own grid."""
        return {tap: self.architecture.grid(depth, self.input_px) for tap, (depth, _) in self.sources.items()}

    @cached_property
    def pools(self) -> Mapping[str, int]:
        """Side of each tap's local average, in cells of its own grid."""
        coarsest = self.input_px // self.architecture.stride_px(None)
        return choose_pools(self.architecture.name, self._grids, coarsest, self.pool)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape (C, g, g) of each tap's map after its pool, in the order asked for; then of masks and their scores."""
        channels = {tap: self.architecture.channels_at(depth) for tap, (depth, _) in self.sources.items()}
        sides = {tap: grid // self.pools[tap] for tap, grid in self._grids.items()}
        maps = {tap: (channels[tap], sides[tap], sides[tap]) for tap in self.sources}
        masks = mask_tap.shapes_of(mask_tap.MASKS, self.masks.side_px) if self.masks else {}
        return MappingProxyType({**maps, **masks})

    def fingerprint(self, weights_sha256: str) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels.

        Args:
            weights_sha256: Digest of the file of weights.
        """
        one_pool = self.architecture.one_grid and not isinstance(self.pool, Mapping) and self.pools
        masks: dict[str, JSON] = {tap: tap for tap in self.shapes if tap not in self.sources}
        return {
            "encoder": self.architecture.name,
            "weights_sha256": weights_sha256,
            "input_px": self.input_px,
            "preprocessing": {"name": self.preprocessing, **self.architecture.preprocessing_fields(self.preprocessing)},
            "precision": self.precision,
            "taps": {**{tap: self.architecture.describe(depth) for tap, (depth, _) in self.sources.items()}, **masks},
            "views": {tap: view for tap, (_, view) in self.sources.items() if view != "identity"},
            "pool": next(iter(self.pools.values())) if one_pool else dict(self.pools),
            "arithmetic": self.architecture.arithmetic_in(self.precision),
            **({"masks": self.masks.fingerprint()} if self.masks else {}),
        }


def _mask_rules(architecture: Geometry, preprocessing: str, settings: Mapping[str, Any] | None) -> MaskRules:
    """How an encoder makes masks.

    Raises:
        ConfigError: It has no mask decoder, or a setting is out of its range.
    """
    if preprocessing not in architecture.masks:
        message = (
            f"encoder.taps: {architecture.name!r} has no mask decoder and so no tap {mask_tap.MASKS!r}: leave it out, "
            f"or choose an encoder of the SAM family"
        )
        raise ConfigError(message)
    return MaskRules.of(settings, architecture.masks[preprocessing])


def parse_tap(architecture: Geometry, tap: str) -> tuple[int, str]:
    """Depth and view of a tap: `NAME`, or `NAME@VIEW`.

    Raises:
        ConfigError: There is no such tap or view.
    """
    name, _, view = tap.partition("@")
    if view and mask_tap.is_masks(name):
        message = (
            f"tap {tap!r}: masks have no views, because an overlay is painted before the image is turned; "
            f"list {name!r} in encoder.taps"
        )
        raise ConfigError(message)
    if "@" in tap and (view not in VIEWS or view == "identity"):
        message = f"tap {tap!r} has no view {view!r}; valid views: {', '.join(list(VIEWS)[1:])}, or none at all"
        raise ConfigError(message)
    return architecture.depth_of(name), view or "identity"
