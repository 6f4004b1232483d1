"""SAM's image encoder for stage one: images in, a feature map per tap out, and what the numbers depend on."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from pipeline.encoders.checkpoint import load_encoder
from pipeline.encoders.family import JSON, Prepared, Reads
from pipeline.encoders.pooling import average
from pipeline.encoders.preprocessing import normalise, prepare, turned
from pipeline.encoders.sam import vit as sam_vit
from pipeline.encoders.sam.recipe import Recipe, architecture_named
from pipeline.encoders.untrained import count, draw, write_whole
from pipeline.encoders.weight_files import weights_sha256
from pipeline.errors import CheckpointError

RunBlock = Callable[[nn.Module, Tensor], Tensor]


def build(recipe: Recipe, checkpoint: Path | None, device: str) -> SamEncoder:
    """Load an encoder onto a device; see `family.build_encoder`.

    Raises:
        CheckpointError: The file is missing or not of this encoder.
    """
    if checkpoint is None:
        message = f"{recipe.architecture.name} needs a file of weights: set encoder.checkpoint"
        raise CheckpointError(message)
    encoder = SamEncoder(recipe, load_encoder(recipe.architecture, checkpoint), weights_sha256(checkpoint))
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
    """Write a checkpoint in the official key layout; see `family.write_untrained_encoder`."""
    vit = architecture_named(name).build()
    draw(vit, generator)
    write_whole(path, partial(torch.save, vit.state_dict()))
    return count(vit)


class SamEncoder(nn.Module):
    """SAM's image encoder with taps and a local average pool, frozen.

    Attributes:
        name: Of the architecture.
        input_px: Side S of the square input, px.
        taps: Shape (C, g, g) of each tap's map after the pool, in the order asked for.
        reads: Images.
    """

    reads: Reads = "image"

    def __init__(self, recipe: Recipe, module: ImageEncoderViT, digest: str) -> None:
        """Make an encoder of the official module with its weights.

        Args:
            recipe: What is computed, and how.
            module: Changed in place to fit the recipe.
            digest: Of the file that the weights came from.
        """
        super().__init__()
        self.name = recipe.architecture.name
        self.input_px = recipe.input_px
        self.taps = recipe.shapes
        self._recipe = recipe
        self._digest = digest
        self._run_block: RunBlock = sam_vit.run_block
        sam_vit.fit_to_grid(module, recipe.input_px // recipe.architecture.patch_px)
        sam_vit.cast(module, getattr(torch, recipe.precision))
        self.vit = module

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.vit.pos_embed.device
        return device

    def fingerprint(self) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels."""
        return self._recipe.fingerprint(self._digest)

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Resize one image for this encoder on the CPU; safe to call from many threads.

        Args:
            image: uint8 (H, W, 3), RGB.

        Raises:
            DataError: See `preprocessing.prepare`.
        """
        return prepare(image, self.input_px, self._recipe.preprocessing)

    def compile_blocks(self) -> None:
        """Compile the blocks, anew for each size of batch: callers do well to keep to one."""
        self._run_block = torch.compile(sam_vit.run_block, dynamic=False)

    @torch.no_grad()
    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            pixels: uint8 (B, 3, S, S), as `prepare` gives them; on any device.
            sizes: int (B, 2), height and width of each image within `pixels`, px.
            dtype: Type that features are stored in, to which maps are rounded before the pool and after each of its
                steps, which `cache.pool_steps` describes.

        Returns:
            (B, C, g, g) of every tap, of type `dtype`, on the encoder's device.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        features: dict[str, Tensor] = {}
        for view in dict.fromkeys(view for _, view in self._recipe.sources.values()):
            maps = self._maps(normalise(*turned(pixels, sizes, view), self._recipe.preprocessing), view)
            pools = self._recipe.pools
            features |= {tap: average(maps[depth], pools[tap], dtype) for tap, depth in self._depths(view).items()}
        return {tap: features[tap] for tap in self._recipe.sources}

    def _maps(self, images: Tensor, view: str) -> dict[int, Tensor]:
        """Maps (B, h, w, C) by depth, of the depths that a view's taps name; nothing deeper is computed."""
        wanted = set(self._depths(view).values())
        maps = sam_vit.feature_maps(self.vit, images, self._run_block)
        return {depth: found for depth, found in zip(range(max(wanted) + 1), maps, strict=False) if depth in wanted}

    def _depths(self, view: str) -> dict[str, int]:
        return {tap: depth for tap, (depth, of) in self._recipe.sources.items() if of == view}
