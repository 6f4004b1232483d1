"""SAM 2's image encoders before a weight is read: their geometry and depths, and what features depend on. No torch.

Hiera starts with a cell for every 4 px and halves its grid at the first block of each later stage, so taps have grids
of their own. A depth counts what has been computed: 0 after the position embedding, i + 1 after block i, and one more
after the neck. `early`, `middle` and `late` are the ends of the second, third and last stage, which is our choice: with
`patch` they are the four grids. `neck` is the coarsest map that SAM 2's mask decoder gets, on the grid of `middle`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from pipeline.encoders.recipe import Geometry, Recipe

_PATCH_PX = 4


@dataclass(frozen=True)
class Hiera(Geometry):
    """Size of one image encoder of SAM 2 or 2.1.

    Attributes:
        name: What configurations call it.
        width: Channels of a token in the first stage; each later one has twice as many.
        heads: Attention heads in the first stage; each later one has twice as many.
        blocks: Blocks of each of the four stages.
        global_blocks: Blocks (0-based) whose attention spans the whole grid; the others attend within windows.
        windows: Side of a window in each stage, tokens.
        background: Side of the part of the position embedding that is stretched over the whole grid, tokens.
        neck: Channels after the neck.
        input_px: Side of the square input that the weights were trained for, px.
        preprocessings: What they were trained with.
    """

    name: str
    width: int
    heads: int
    blocks: tuple[int, int, int, int]
    global_blocks: tuple[int, ...]
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    background: int = 7
    neck: int = 256
    input_px: int = 1024
    preprocessings: tuple[str, ...] = ("sam2",)

    one_grid = False
    arithmetic = 1
    masks = MappingProxyType({"sam2": {"prompts": "points", "predicted_iou": 0.8}})  # its authors' default

    @property
    def multiple_px(self) -> int:
        """What the input's side must be a multiple of, px: the grid of patches is tiled with embeddings and halved."""
        return _PATCH_PX * math.lcm(self.windows[0], 8)

    @property
    def steps(self) -> int:
        """Blocks of all stages."""
        return sum(self.blocks)

    @property
    def named_depths(self) -> dict[str, int]:
        """Depth of each of the five named taps, in order."""
        _, early, middle, late = accumulate(self.blocks)
        return {"patch": 0, "early": early, "middle": middle, "late": late, "neck": late + 1}

    def channels_at(self, depth: int) -> int:
        """Channels of the feature map at a depth."""
        return self.neck if depth == self.steps + 1 else self.width << self._stage_at(depth)

    def stride_px(self, depth: int | None) -> int:
        """Side of a cell of the grid at a depth, in pixels of the input; of the coarsest grid for None."""
        return _PATCH_PX << (3 if depth is None else self._stage_at(depth))

    def _stage_at(self, depth: int) -> int:
        """Which stage's grid a depth has, from 0; the neck has the third one's."""
        if depth == self.steps + 1:
            return 2
        return sum(depth > end for end in accumulate(self.blocks))

    @property
    def settings(self) -> dict[str, Any]:
        """The geometry as `transformers.Sam2VisionConfig` takes it."""
        widths, heads = ([first * 2**stage for stage in range(4)] for first in (self.width, self.heads))
        return {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": self.width,
                "num_attention_heads": self.heads,
                "blocks_per_stage": list(self.blocks),
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": heads,
                "window_size_per_stage": list(self.windows),
                "window_positional_embedding_background_size": [self.background] * 2,
                "global_attention_blocks": list(self.global_blocks),
            },
            "backbone_channel_list": widths[::-1],
            "fpn_hidden_size": self.neck,
        }


_SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": {"width": 96, "heads": 1, "blocks": (1, 2, 7, 2), "global_blocks": (5, 7, 9)},
    "small": {"width": 96, "heads": 1, "blocks": (1, 2, 11, 2), "global_blocks": (7, 10, 13)},
    "base_plus": {"width": 112, "heads": 2, "blocks": (2, 3, 16, 3), "global_blocks": (12, 16, 20), "background": 14},
    "large": {
        "width": 144, "heads": 2, "blocks": (2, 6, 36, 4), "global_blocks": (23, 33, 43), "windows": (8, 4, 16, 8)
    },
}  # fmt: skip
HIERAS: Mapping[str, Hiera] = MappingProxyType(
    {
        f"{version}_hiera_{size}": Hiera(f"{version}_hiera_{size}", **geometry)
        for version in ("sam2.1", "sam2")  # other weights in the same geometry
        for size, geometry in _SIZES.items()
    }
)


def make_recipe(name: str, *options: Any) -> Recipe:
    """A recipe for an encoder by its name; see `Recipe.of` for the options and `family.make_recipe`."""
    return Recipe.of(HIERAS[name], *options)
