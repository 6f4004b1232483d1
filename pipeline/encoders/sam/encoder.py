"""SAM's image encoder for stage one: images in, a feature map per tap out, and what the numbers depend on."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from pipeline.encoders.checkpoint import load_encoder
from pipeline.encoders.frozen import FrozenEncoder
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.masks.weights import load_everything
from pipeline.encoders.recipe import Recipe
from pipeline.encoders.sam import vit as sam_vit
from pipeline.encoders.sam.recipe import architecture_named
from pipeline.encoders.sam.whole import draw_whole, write_sam
from pipeline.encoders.untrained import count
from pipeline.encoders.weight_files import weights_sha256
from pipeline.errors import CheckpointError

RunBlock = Callable[[nn.Module, Tensor], Tensor]


def build(recipe: Recipe, checkpoint: Path | None, device: str) -> SamEncoder:
    """Load an encoder onto a device; see `family.build_encoder`.

    Raises:
        CheckpointError: The file is missing or not of this encoder.
    """
    name = recipe.architecture.name
    if checkpoint is None:
        message = f"{name} needs a file of weights: set encoder.checkpoint"
        raise CheckpointError(message)
    vit = load_encoder(architecture_named(name), checkpoint)
    encoder = SamEncoder(recipe, vit, weights_sha256(checkpoint), load_everything(recipe, checkpoint))
    if compiles(torch.device(device)):
        encoder.compile_blocks()
    return encoder.to(device).eval()


def compiles(device: torch.device) -> bool:
    """Say whether torch compiles blocks for a device: with Triton, which wants a C compiler and a Volta GPU or later.

    Where it does not, blocks run uncompiled and slower instead of ending the run at its first batch.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def write_untrained(name: str, path: Path, generator: torch.Generator) -> int:
    """Write a whole SAM in the official key layout; see `family.write_untrained_encoder`."""
    sam = draw_whole(architecture_named(name), generator)
    write_sam(sam, path)
    return count(sam)


class SamEncoder(FrozenEncoder):
    """SAM's image encoder with taps and a local average pool, frozen."""

    def __init__(
        self, recipe: Recipe, module: ImageEncoderViT, digest: str, everything: Everything | None = None
    ) -> None:
        """Make an encoder of the official module with its weights.

        Args:
            recipe: What is computed, and how.
            module: Changed in place to fit the recipe.
            digest: Of the file that the weights came from.
            everything: What finds masks, where they are asked for.
        """
        super().__init__(recipe, digest, everything)
        self._run_block: RunBlock = sam_vit.run_block
        sam_vit.fit_to_grid(module, recipe.input_px // recipe.architecture.stride_px(None))
        sam_vit.cast(module, getattr(torch, recipe.precision))
        self.vit = module

    def compile_blocks(self) -> None:
        """Compile the blocks, anew for each size of batch: callers do well to keep to one."""
        self._run_block = torch.compile(sam_vit.run_block, dynamic=False)

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Compute depth by depth; see `FrozenEncoder.maps`."""
        return sam_vit.feature_maps(self.vit, images, self._run_block)
