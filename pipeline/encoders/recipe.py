"""What an encoder's features depend on, checked and spelled out before a weight is read; imports no torch.

A run that finds its store unchanged ends within the time that importing torch would take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, get_args

from pipeline.encoders.architecture import Architecture, architecture_named
from pipeline.encoders.family import JSON
from pipeline.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
Preprocessing = Literal["sam", "medsam"]
PREPROCESSINGS: tuple[str, ...] = get_args(Preprocessing)
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

ARITHMETIC = 3  # raise when the same pixels and weights give other features
_PREPROCESSING_VERSION = 1  # raise when the same image gives other pixels

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


@dataclass(frozen=True)
class Recipe:
    """How features are made, apart from the weights and the pixels.

    Attributes:
        architecture: Whose geometry.
        taps: Any of `patch early middle late neck` and `block:N`; of a turned image with `@` and one of `VIEWS`.
        input_px: Side S of the square input, px.
        pool: Side k of the local average, in tokens; divides the grid.
        precision: Type of the matrix products.
        preprocessing: What the weights were trained with.

    Raises:
        ConfigError: There is no such tap, pool, precision, preprocessing or input size; with the valid values.
    """

    architecture: Architecture
    taps: tuple[str, ...]
    input_px: int
    pool: int = 1
    precision: Precision = "float32"
    preprocessing: Preprocessing = "sam"

    def __post_init__(self) -> None:
        if not self.taps or len(set(self.taps)) < len(self.taps):
            message = f"taps are {list(self.taps)!r}; expected at least one, each once"
            raise ConfigError(message)
        for tap in self.taps:
            _parse(self.architecture, tap)
        patch = self.architecture.patch_px
        if self.input_px < patch or self.input_px % patch:
            message = (
                f"an input of {self.input_px!r} px does not divide into patches of {patch} px; "
                f"try {self.architecture.input_px}"
            )
            raise ConfigError(message)
        grid = self.input_px // patch
        if self.pool < 1 or grid % self.pool:
            divisors = ", ".join(str(k) for k in range(1, grid + 1) if grid % k == 0)
            message = (
                f"a pool of {self.pool!r} does not divide the {grid}x{grid} grid of {self.architecture.name}; "
                f"valid: {divisors}"
            )
            raise ConfigError(message)
        choices = (
            ("precision", self.precision, get_args(Precision)),
            ("preprocessing", self.preprocessing, PREPROCESSINGS),
        )
        for what, value, valid in choices:
            if value not in valid:
                message = f"there is no {what} {value!r}; valid: {', '.join(valid)}"
                raise ConfigError(message)

    @cached_property
    def sources(self) -> Mapping[str, tuple[int, str]]:
        """Depth and view of each tap."""
        return {tap: _parse(self.architecture, tap) for tap in self.taps}

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Shape (C, g, g) of each tap's map after the pool, in the order asked for."""
        side = self.input_px // self.architecture.patch_px // self.pool
        return MappingProxyType(
            {tap: (self.architecture.channels_at(depth), side, side) for tap, (depth, _) in self.sources.items()}
        )

    def fingerprint(self, weights_sha256: str) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels.

        Args:
            weights_sha256: Digest of the file of weights.
        """
        constants: dict[str, JSON] = {"mean": list(MEAN), "std": list(STD)} if self.preprocessing == "sam" else {}
        return {
            "encoder": self.architecture.name,
            "weights_sha256": weights_sha256,
            "input_px": self.input_px,
            "preprocessing": {"name": self.preprocessing, "version": _PREPROCESSING_VERSION, **constants},
            "precision": self.precision,
            "taps": {tap: self.architecture.describe(depth) for tap, (depth, _) in self.sources.items()},
            "views": {tap: view for tap, (_, view) in self.sources.items() if view != "identity"},
            "pool": self.pool,
            "arithmetic": ARITHMETIC,
        }


def make_recipe(
    name: str,
    taps: tuple[str, ...],
    input_px: int | None = None,
    pool: int = 1,
    precision: Precision = "float32",
    preprocessing: Preprocessing = "sam",
) -> Recipe:
    """A recipe for an encoder by its name; see `Recipe` for the arguments.

    Args:
        name: `sam_vit_b`, `sam_vit_l`, `sam_vit_h` or `sam_demo`.
        taps: Depths and views.
        input_px: Side of the input, px; None is what the weights were trained for.
        pool: Side of the local average, in tokens.
        precision: Type of the matrix products.
        preprocessing: Whose.

    Raises:
        ConfigError: There is no such encoder, tap, pool, precision, preprocessing or input size.
    """
    architecture = architecture_named(name)
    side = architecture.input_px if input_px is None else input_px
    return Recipe(architecture, taps, side, pool, precision, preprocessing)


def _parse(architecture: Architecture, tap: str) -> tuple[int, str]:
    """Depth and view of a tap: `NAME`, or `NAME@VIEW`.

    Raises:
        ConfigError: There is no such tap or view.
    """
    name, _, view = tap.partition("@")
    if "@" in tap and (view not in VIEWS or view == "identity"):
        message = f"tap {tap!r} has no view {view!r}; valid views: {', '.join(list(VIEWS)[1:])}, or none at all"
        raise ConfigError(message)
    return architecture.depth_of(name), view or "identity"
