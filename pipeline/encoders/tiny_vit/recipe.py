"""TinyViT's image encoders (MobileSAM, LiteMedSAM) before a weight is read: geometry, depths and key layout. No torch.

Both have TinyViT-5M's blocks; they differ in the patch embedding, which takes 4 pixels a cell in MobileSAM and every
pixel in LiteMedSAM, so that 1024 px there and 256 px here give the same grids. A depth counts what has been computed: 0
after the patch embedding, i + 1 after layer i with the step to the next grid at its end, 5 after the neck. `early`,
`middle` and `late` are layers 0, 1 and 2: layer 3 is the one left out, because the neck is two convolutions of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipeline.encoders.masks.rules import BOXES
from pipeline.encoders.recipe import Geometry, Recipe

_NAMED = ("patch", "early", "middle", "late", None, "neck")


@dataclass(frozen=True)
class TinyVit(Geometry):
    """Size of one TinyViT in the layout of MobileSAM's image encoder.

    Attributes:
        name: What configurations call it.
        input_px: Side of the square input that its weights were trained for, px.
        patch_px: Side of a cell of the patch embedding, px: 1, or 4 in two steps of 2.
        preprocessings: What its weights were trained with.
        widths: Channels of each layer.
        blocks: Blocks of each layer; those of the first are convolutions.
        heads: Attention heads of each layer.
        windows: Side of the windows of each layer's attention, cells.
        neck: Channels after the neck.
    """

    name: str
    input_px: int
    patch_px: int
    preprocessings: tuple[str, ...]
    widths: tuple[int, ...] = (64, 128, 160, 320)
    blocks: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (2, 4, 5, 10)
    windows: tuple[int, ...] = (7, 7, 14, 7)
    neck: int = 256

    step = "layer"
    one_grid = False
    arithmetic = 1
    masks = MappingProxyType({"sam": {"prompts": "points"}, "lite_medsam": BOXES})

    def arithmetic_in(self, precision: str) -> int:
        """2 outside of float32 since biases stay float32 there, too; see `Geometry`."""
        return self.arithmetic + (precision != "float32")

    @property
    def steps(self) -> int:
        """Layers."""
        return len(self.widths)

    @property
    def named_depths(self) -> dict[str, int]:
        """Depth of each of the five named taps, in order."""
        return {name: depth for depth, name in enumerate(_NAMED) if name}

    def channels_at(self, depth: int) -> int:
        """Channels of the map at a depth; a layer ends with the step to the width of the next."""
        return self.neck if depth > len(self.widths) else self.widths[min(depth, len(self.widths) - 1)]

    def stride_px(self, depth: int | None) -> int:
        """Pixels along a cell at a depth; of the coarsest grid for None. The first two steps halve the grid."""
        return self.patch_px << min(2 if depth is None else depth, 2)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the image encoder in a checkpoint, by its name there."""
        return dict(self._shapes())

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        first, side = self.widths[0], 1 if self.patch_px == 1 else 3
        yield from _normalised("patch_embed.seq.0", first // 2, 3, side)
        yield from _normalised("patch_embed.seq.2", first, first // 2, side)
        for number, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for block in range(blocks):
                here = f"layers.{number}.blocks.{block}"
                yield from _convolutions(here, width) if number == 0 else self._attention(here, number)
            if number + 1 < len(self.widths):
                after, here = self.widths[number + 1], f"layers.{number}.downsample"
                yield from _normalised(f"{here}.conv1", after, width, 1)
                yield from _normalised(f"{here}.conv2", after, 1, 3)
                yield from _normalised(f"{here}.conv3", after, after, 1)
        yield "neck.0.weight", (self.neck, self.widths[-1], 1, 1)
        yield "neck.2.weight", (self.neck, self.neck, 3, 3)
        yield from _affine("neck.1", self.neck)
        yield from _affine("neck.3", self.neck)

    def _attention(self, here: str, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of a block with attention; the hidden layer of its perceptron is four times as wide."""
        width = self.widths[layer]
        yield f"{here}.attn.attention_biases", (self.heads[layer], self.windows[layer] ** 2)
        for norm in ("attn.norm", "mlp.norm"):
            yield from _affine(f"{here}.{norm}", width)
        for linear, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            yield f"{here}.{linear}.weight", (out, into)
            yield f"{here}.{linear}.bias", (out,)
        yield from _normalised(f"{here}.local_conv", width, 1, 3)


def _convolutions(here: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of a block of convolutions: four times as wide inside."""
    yield from _normalised(f"{here}.conv1", 4 * width, width, 1)
    yield from _normalised(f"{here}.conv2", 4 * width, 1, 3)
    yield from _normalised(f"{here}.conv3", width, 4 * width, 1)


def _normalised(here: str, out: int, into: int, side: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of a convolution with a batch norm behind it."""
    yield f"{here}.c.weight", (out, into, side, side)
    yield from _affine(f"{here}.bn", out)
    yield f"{here}.bn.running_mean", (out,)
    yield f"{here}.bn.running_var", (out,)
    yield f"{here}.bn.num_batches_tracked", ()


def _affine(here: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{here}.weight", (width,)
    yield f"{here}.bias", (width,)


TINY_VITS: Mapping[str, TinyVit] = MappingProxyType(
    {
        "lite_medsam": TinyVit("lite_medsam", input_px=256, patch_px=1, preprocessings=("lite_medsam",)),
        "mobile_sam": TinyVit("mobile_sam", input_px=1024, patch_px=4, preprocessings=("sam",)),
    }
)


def make_recipe(name: str, *options: Any) -> Recipe:
    """A recipe for an encoder by its name; see `Recipe.of` for the options and `family.make_recipe`."""
    return Recipe.of(TINY_VITS[name], *options)
