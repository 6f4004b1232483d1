"""The frozen encoder of stage one: images in, a feature map per tap out, and what the numbers depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from pipeline.encoders import preprocessing, vit
from pipeline.encoders.architecture import Architecture, architecture_named
from pipeline.encoders.checkpoint import load_encoder, weights_sha256
from pipeline.encoders.preprocessing import Prepared
from pipeline.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
JSON = str | int | float | list["JSON"] | dict[str, "JSON"]

ARITHMETIC = 1  # raise when the same pixels and weights give other features


def build_encoder(
    name: str,
    *,
    checkpoint: Path,
    taps: Sequence[str],
    input_px: int | None = None,
    pool: int = 1,
    precision: Precision = "float32",
    device: str = "cpu",
) -> Encoder:
    """Load a frozen encoder onto a device.

    Args:
        name: `sam_vit_b`, `sam_vit_l`, `sam_vit_h` or `sam_demo`.
        checkpoint: File of weights, see `load_encoder`.
        taps: Any of `patch early middle late neck` and `block:N`.
        input_px: Side of the square input, px; None is what the weights were trained for.
        pool: Side k of the local average, in tokens; must divide the grid.
        precision: Type of the matrix products.
        device: As torch names it.

    Raises:
        ConfigError: There is no such encoder, tap, pool, precision or input size.
        CheckpointError: The file is missing or not of this encoder.
    """
    architecture = architecture_named(name)
    input_px = architecture.input_px if input_px is None else input_px
    _check(architecture, taps, input_px, pool, precision)
    module = load_encoder(architecture, checkpoint)
    encoder = Encoder(
        architecture,
        module,
        digest=weights_sha256(checkpoint),
        taps=taps,
        input_px=input_px,
        pool=pool,
        precision=precision,
    )
    return encoder.to(device)


class Encoder(nn.Module):
    """SAM's image encoder with taps and a local average pool, frozen.

    Attributes:
        name: Of the architecture.
        input_px: Side S of the square input, px.
        taps: Shape (C, g, g) of each tap's map after the pool.
    """

    def __init__(
        self,
        architecture: Architecture,
        module: ImageEncoderViT,
        *,
        digest: str,
        taps: Sequence[str],
        input_px: int,
        pool: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.name = architecture.name
        self.input_px = input_px
        self._architecture = architecture
        self._digest = digest
        self._pool = pool
        self._precision = precision
        self._depths = {tap: architecture.depth_of(tap) for tap in taps}
        grid = input_px // architecture.patch_px
        vit.fit_to_grid(module, grid)
        vit.cast(module, getattr(torch, precision))
        self.vit = module
        side = grid // pool
        self.taps: Mapping[str, tuple[int, int, int]] = MappingProxyType(
            {tap: (architecture.channels_at(depth), side, side) for tap, depth in self._depths.items()}
        )

    def fingerprint(self) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels."""
        return {
            "encoder": self.name,
            "weights_sha256": self._digest,
            "input_px": self.input_px,
            "preprocessing": {
                "name": preprocessing.NAME,
                "mean": list(preprocessing.MEAN),
                "std": list(preprocessing.STD),
            },
            "precision": self._precision,
            "taps": {tap: self._architecture.describe(depth) for tap, depth in self._depths.items()},
            "pool": self._pool,
            "arithmetic": ARITHMETIC,
        }

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Resize one image for this encoder on the CPU; safe to call from many threads.

        Args:
            image: uint8 (H, W, 3), RGB.

        Raises:
            DataError: See `preprocessing.prepare`.
        """
        return preprocessing.prepare(image, self.input_px)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            pixels: uint8 (B, 3, S, S), as `prepare` gives them; on any device.
            sizes: int (B, 2), height and width of each image within `pixels`, px.

        Returns:
            float32 (B, C, g, g) of every tap, on the encoder's device.
        """
        device = self.vit.pos_embed.device
        images = preprocessing.normalise(pixels.to(device, non_blocking=True), sizes)
        maps = self.maps(images)
        return {tap: _pooled(maps[depth], self._pool) for tap, depth in self._depths.items()}

    def maps(self, images: Tensor) -> dict[int, Tensor]:
        """Feature maps at the depths that the taps need, before the pool; differentiable.

        Args:
            images: float32 (B, 3, S, S), normalised and padded.

        Returns:
            float32 (B, h, w, C) by depth.
        """
        wanted = set(self._depths.values())
        found = {}
        for depth, features in enumerate(vit.feature_maps(self.vit, images)):
            if depth in wanted:
                found[depth] = features
            if depth == max(wanted):
                break
        return found


def _pooled(features: Tensor, pool: int) -> Tensor:
    """Average over pool x pool tokens: (B, h, w, C) to (B, C, h / pool, w / pool)."""
    return F.avg_pool2d(features.permute(0, 3, 1, 2), pool).contiguous()


def _check(architecture: Architecture, taps: Sequence[str], input_px: int, pool: int, precision: str) -> None:
    """Refuse what the architecture cannot do before a gigabyte of weights is read.

    Raises:
        ConfigError: With the valid values.
    """
    for tap in taps:
        architecture.depth_of(tap)
    if not taps or len(set(taps)) < len(taps):
        message = f"taps are {list(taps)!r}; expected at least one, each once"
        raise ConfigError(message)
    patch = architecture.patch_px
    if input_px < patch or input_px % patch:
        message = f"an input of {input_px!r} px does not divide into patches of {patch} px; try {architecture.input_px}"
        raise ConfigError(message)
    grid = input_px // patch
    if pool < 1 or grid % pool:
        divisors = ", ".join(str(k) for k in range(1, grid + 1) if grid % k == 0)
        message = f"a pool of {pool!r} does not divide the {grid}x{grid} grid of {architecture.name}; valid: {divisors}"
        raise ConfigError(message)
    if precision not in get_args(Precision):
        message = f"there is no precision {precision!r}; valid: {', '.join(get_args(Precision))}"
        raise ConfigError(message)
