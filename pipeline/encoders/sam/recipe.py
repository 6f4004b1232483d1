"""SAM's image encoders before a weight is read: their geometry and depths, and what features depend on. No torch.

A depth counts what has been computed: 0 after the position embedding, i + 1 after block i, `depth + 1` after the
neck. `early`, `middle` and `late` are the first three blocks with global attention: our choice, because no public
code of SLCA says which blocks it means. A run that finds its store unchanged ends within the time that importing torch
would take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from pipeline.encoders.family import JSON
from pipeline.encoders.pooling import Pool, choose_pools
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT


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
        pool: Side k of the local average, in tokens, which divides the grid; or see `pooling.choose_pools`.
        precision: Type of the matrix products.
        preprocessing: What the weights were trained with.

    Raises:
        ConfigError: There is no such tap, pool, precision, preprocessing or input size; with the valid values.
    """

    architecture: Architecture
    taps: tuple[str, ...]
    input_px: int
    pool: Pool = 1
    precision: Precision = "float32"
    preprocessing: Preprocessing = "sam"

    def __post_init__(self) -> None:
        if not self.taps or len(set(self.taps)) < len(self.taps):
            message = f"taps are {list(self.taps)!r}; expected at least one, each once"
            raise ConfigError(message)
        for tap in self.taps:
            parse_tap(self.architecture.depth_of, tap)
        patch = self.architecture.patch_px
        if self.input_px < patch or self.input_px % patch:
            message = (
                f"an input of {self.input_px!r} px does not divide into patches of {patch} px; "
                f"try {self.architecture.input_px}"
            )
            raise ConfigError(message)
        _ = self.pools  # refuses one that does not fit
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
        return {tap: parse_tap(self.architecture.depth_of, tap) for tap in self.taps}

    @cached_property
    def pools(self) -> Mapping[str, int]:
        """Side of each tap's local average, in tokens."""
        return choose_pools(self.architecture.name, dict.fromkeys(self.taps, self._grid), self._grid, self.pool)

    @property
    def _grid(self) -> int:
        return self.input_px // self.architecture.patch_px

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Shape (C, g, g) of each tap's map after the pool, in the order asked for."""
        channels = {tap: self.architecture.channels_at(depth) for tap, (depth, _) in self.sources.items()}
        sides = {tap: self._grid // pool for tap, pool in self.pools.items()}
        return MappingProxyType({tap: (channels[tap], sides[tap], sides[tap]) for tap in self.taps})

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
            "pool": dict(self.pools) if isinstance(self.pool, Mapping) else next(iter(self.pools.values())),
            "arithmetic": ARITHMETIC,
        }


def make_recipe(
    name: str,
    taps: tuple[str, ...],
    input_px: int | None = None,
    pool: Pool = 1,
    precision: Precision = "float32",
    preprocessing: Preprocessing | None = None,
) -> Recipe:
    """A recipe for an encoder by its name; see `Recipe` for the arguments.

    Args:
        name: `sam_vit_b`, `sam_vit_l`, `sam_vit_h` or `sam_demo`.
        taps: Depths and views.
        input_px: Side of the input, px; None is what the weights were trained for.
        pool: See `pooling.choose_pools`.
        precision: Type of the matrix products.
        preprocessing: Whose; None for SAM's.

    Raises:
        ConfigError: There is no such encoder, tap, pool, precision, preprocessing or input size.
    """
    architecture = architecture_named(name)
    side = architecture.input_px if input_px is None else input_px
    return Recipe(architecture, taps, side, pool, precision, preprocessing or "sam")


def parse_tap(depth_of: Callable[[str], int], tap: str) -> tuple[int, str]:
    """Depth and view of a tap: `NAME`, or `NAME@VIEW`.

    Raises:
        ConfigError: There is no such tap or view.
    """
    name, _, view = tap.partition("@")
    if "@" in tap and (view not in VIEWS or view == "identity"):
        message = f"tap {tap!r} has no view {view!r}; valid views: {', '.join(list(VIEWS)[1:])}, or none at all"
        raise ConfigError(message)
    return depth_of(name), view or "identity"


@dataclass(frozen=True)
class Architecture:
    """Size of one ViT in the layout of SAM's official image encoder.

    Attributes:
        name: What configurations call it.
        width: Channels of a token.
        blocks: Transformer blocks.
        heads: Attention heads of a block.
        global_blocks: Blocks (0-based) whose attention spans the whole grid; the others attend within windows.
        window: Side of a window, tokens.
        neck: Channels after the convolutional neck.
        input_px: Side of the square input that the position embedding was trained for, px.
        patch_px: Side of a patch, px.
    """

    name: str
    width: int
    blocks: int
    heads: int
    global_blocks: tuple[int, int, int, *tuple[int, ...]]
    window: int = 14
    neck: int = 256
    input_px: int = 1024
    patch_px: int = 16

    @property
    def named_depths(self) -> dict[str, int]:
        """Depth of each of the five named taps, in order."""
        early, middle, late = (block + 1 for block in self.global_blocks[:3])
        return {"patch": 0, "early": early, "middle": middle, "late": late, "neck": self.blocks + 1}

    def depth_of(self, tap: str) -> int:
        """Depth of a tap: one of the five names, or `block:N`.

        Raises:
            ConfigError: There is no such tap.
        """
        depth = self.named_depths.get(tap)
        if depth is not None:
            return depth
        number = tap.removeprefix("block:")
        if tap.startswith("block:") and number.isascii() and number.isdigit() and int(number) < self.blocks:
            return int(number) + 1
        message = (
            f"{self.name} has no tap {tap!r}; valid taps: {', '.join(self.named_depths)}, "
            f"and block:0 to block:{self.blocks - 1}"
        )
        raise ConfigError(message)

    def describe(self, depth: int) -> str:
        """What is computed last at a depth, in the words of `depth_of`."""
        return {0: "patch", self.blocks + 1: "neck"}.get(depth, f"block:{depth - 1}")

    def channels_at(self, depth: int) -> int:
        """Channels of the feature map at a depth."""
        return self.neck if depth == self.blocks + 1 else self.width

    def build(self) -> ImageEncoderViT:
        """The official module, its parameters shapes only (on the `meta` device) until a checkpoint is assigned."""
        import torch
        from segment_anything.modeling import ImageEncoderViT
        from torch import nn

        with torch.device("meta"):
            return ImageEncoderViT(
                img_size=self.input_px,
                patch_size=self.patch_px,
                embed_dim=self.width,
                depth=self.blocks,
                num_heads=self.heads,
                out_chans=self.neck,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=self.window,
                global_attn_indexes=self.global_blocks,
            )


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            Architecture("sam_vit_b", width=768, blocks=12, heads=12, global_blocks=(2, 5, 8, 11)),
            Architecture("sam_vit_l", width=1024, blocks=24, heads=16, global_blocks=(5, 11, 17, 23)),
            Architecture("sam_vit_h", width=1280, blocks=32, heads=16, global_blocks=(7, 15, 23, 31)),
            Architecture(
                "sam_demo", width=96, blocks=6, heads=3, global_blocks=(1, 3, 5), window=7, neck=64, input_px=256
            ),
        )
    }
)


def architecture_named(name: str) -> Architecture:
    """Look an architecture up.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in ARCHITECTURES:
        message = f"there is no encoder {name!r}; valid encoders: {', '.join(ARCHITECTURES)}"
        raise ConfigError(message)
    return ARCHITECTURES[name]
