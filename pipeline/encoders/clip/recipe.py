"""CLIP's image towers: their depths, how they want their images, and what their features depend on.

The tap `embedding` (E, 1, 1) is the projected image feature as `encode_image` gives it, of any length: whoever compares
it with texts divides it by its length first. A plain ViT has maps as well, under the five names and as `block:N`; a
depth counts as everywhere. `early`, `middle` and `late` are after a third, two thirds and all of the blocks, and `neck`
is the map of the last block with the norm and the projection of the image feature, in the space of the texts. Which
depths these are is our choice. Other towers (ResNets, those of timm, pooling by attention) have the image feature
alone. What a name means is open_clip's knowledge, so that a recipe imports it, and torch with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import clip
from pipeline.encoders.family import JSON
from pipeline.encoders.recipe import PREPROCESSINGS, Geometry, Recipe
from pipeline.errors import ConfigError

EMBEDDING = "embedding"
OWN, WHOLE = "clip", "clip_whole"  # open_clip's own preprocessing, and the whole image squeezed to a square
ARITHMETIC = 1  # raise when the same pixels and weights give other features
_RESNET_PX = 32  # of a cell of the last map


@dataclass(frozen=True)
class Tower(Geometry):
    """An image tower.

    Attributes:
        name: What configurations call it.
        input_px: Side of the square image that it was made for, px.
        embedding: E, length of the image feature.
        blocks: Of a plain ViT; 0 for other towers.
        width: Channels of its tokens.
        patch_px: Side of a patch, px; of other towers what an image's side has to be a multiple of.
        scaling: How it wants its images, as open_clip has it: `mean`, `std`, `interpolation`, `resize_mode`.
        preprocessings: open_clip's own, or the whole image.
    """

    name: str
    input_px: int
    embedding: int
    blocks: int
    width: int
    patch_px: int
    scaling: Mapping[str, Any]
    preprocessings: tuple[str, ...] = (OWN, WHOLE)

    one_grid = False
    arithmetic = ARITHMETIC

    @property
    def steps(self) -> int:
        """Blocks of a plain ViT."""
        return self.blocks

    @property
    def named_depths(self) -> dict[str, int]:
        """Depth of each named tap, in order; of the image feature the last."""
        if not self.blocks:
            return {EMBEDDING: 0}
        early, middle, late = (round(self.blocks * third / 3) for third in (1, 2, 3))
        return {
            "patch": 0, "early": early, "middle": middle, "late": late, "neck": self.blocks + 1,
            EMBEDDING: self.blocks + 2,
        }  # fmt: skip

    def describe(self, depth: int) -> str:
        """What is computed last at a depth."""
        return EMBEDDING if depth == self.named_depths[EMBEDDING] else super().describe(depth)

    def channels_at(self, depth: int) -> int:
        """Channels of the map at a depth."""
        return self.embedding if not 0 <= depth <= self.blocks or not self.blocks else self.width

    def stride_px(self, depth: int | None) -> int:
        """Side of a patch, px."""
        return self.patch_px

    def grid(self, depth: int, input_px: int) -> int:
        """Cells along a side: one for the image feature."""
        return 1 if depth == self.named_depths[EMBEDDING] else input_px // self.patch_px

    def preprocessing_fields(self, name: str) -> dict[str, JSON]:
        """What a preprocessing does to an image, as a fingerprint has it."""
        squash = {"resize_mode": "squash"} if name == WHOLE else {}
        return {**PREPROCESSINGS[name], **self.scaling, **squash}


def tower_named(name: str) -> Tower:
    """Look an image tower up.

    Raises:
        ConfigError: There is no such CLIP, or open_clip is not installed.
    """
    found = clip.architecture(name)
    vision = found.config["vision_cfg"]
    plain = "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int)
    vit = plain and not vision.get("attentional_pool", False)
    scaling = {"mean": list(found.mean), "std": list(found.std), **clip.resizing(name)}
    patch = vision.get("patch_size", 16)
    return Tower(
        name,
        input_px=found.image_px,
        embedding=found.config["embed_dim"],
        blocks=vision.get("layers", 12) if vit else 0,
        width=vision.get("width", 768) if vit else 0,
        patch_px=patch if plain else _RESNET_PX if "timm_model_name" not in vision else found.image_px,
        scaling=scaling,
    )


def make_recipe(name: str, *options: Any) -> Recipe:
    """A recipe for an image tower by its name; see `Recipe.of` for the options and `family.make_recipe`.

    Raises:
        ConfigError: Also for maps of a preprocessing that may cut the image: nothing would say where in it they are.
    """
    tower = tower_named(name)
    recipe = Recipe.of(tower, *options)
    fields = tower.preprocessing_fields(recipe.preprocessing)
    maps = [tap for tap, (depth, _) in recipe.sources.items() if depth != tower.named_depths[EMBEDDING]]
    if maps and fields["resize_mode"] != "squash":
        message = (
            f"encoder.taps: {maps[0]!r} is a map, and the preprocessing {recipe.preprocessing!r} cuts off what an "
            f"image has beside its central square: set encoder.preprocessing to {WHOLE}, which squeezes the whole "
            f"image (a square one is the same either way), or ask for {EMBEDDING!r} alone"
        )
        raise ConfigError(message)
    return recipe
