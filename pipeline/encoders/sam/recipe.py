"""SAM's image encoders before a weight is read: their geometry and depths, and what features depend on. No torch.

A depth counts what has been computed: 0 after the position embedding, i + 1 after block i, `depth + 1` after the
neck. `early`, `middle` and `late` are the first three blocks with global attention: our choice, because no public
code of SLCA says which blocks it means. A run that finds its store unchanged ends within the time that importing torch
would take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline.encoders.masks.rules import BOXES
from pipeline.encoders.recipe import Geometry, Recipe
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT


MASKS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"sam": {"prompts": "points"}, "medsam": BOXES})
ARITHMETIC = 3  # raise when the same pixels and weights give other features


@dataclass(frozen=True)
class Architecture(Geometry):
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
        decoder_heads: Attention heads of the mask decoder, whose width is the neck's.
        preprocessings: What weights in this layout were trained with.
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
    decoder_heads: int = 8
    preprocessings: tuple[str, ...] = ("sam", "medsam")

    one_grid = True
    arithmetic = ARITHMETIC
    masks = MASKS

    @property
    def steps(self) -> int:
        """Blocks."""
        return self.blocks

    @property
    def named_depths(self) -> dict[str, int]:
        """Depth of each of the five named taps, in order."""
        early, middle, late = (block + 1 for block in self.global_blocks[:3])
        return {"patch": 0, "early": early, "middle": middle, "late": late, "neck": self.blocks + 1}

    def channels_at(self, depth: int) -> int:
        """Channels of the feature map at a depth."""
        return self.neck if depth == self.blocks + 1 else self.width

    def stride_px(self, depth: int | None) -> int:
        """Side of a patch, px: every depth has the grid of patches."""
        return self.patch_px

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


class Miniature(Architecture):
    """A small one, trained for seconds.

    Such a decoder expects less of its masks than SAM's, and their edges are less steep, so thresholds are lower; what
    it looks for is not small, so points are fewer.
    """

    masks = MappingProxyType(
        {
            "sam": {"prompts": "points", "points": 8, "predicted_iou": 0.6, "stability": 0.7},
            "medsam": {"prompts": "boxes"},
        }
    )


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            Architecture("sam_vit_b", width=768, blocks=12, heads=12, global_blocks=(2, 5, 8, 11)),
            Architecture("sam_vit_l", width=1024, blocks=24, heads=16, global_blocks=(5, 11, 17, 23)),
            Architecture("sam_vit_h", width=1280, blocks=32, heads=16, global_blocks=(7, 15, 23, 31)),
            Miniature(
                "sam_demo",
                width=96,
                blocks=6,
                heads=3,
                global_blocks=(1, 3, 5),
                window=7,
                neck=64,
                input_px=256,
                decoder_heads=4,
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


def make_recipe(name: str, *options: Any) -> Recipe:
    """A recipe for an encoder by its name; see `Recipe.of` for the options and `family.make_recipe`."""
    return Recipe.of(architecture_named(name), *options)
