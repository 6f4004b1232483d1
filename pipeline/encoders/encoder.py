"""The frozen encoder of stage one: images in, a feature map per tap out, and what the numbers depend on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from pipeline.encoders import vit
from pipeline.encoders.architecture import Architecture, architecture_named
from pipeline.encoders.checkpoint import load_encoder, weights_sha256
from pipeline.encoders.preprocessing import JSON, PREPROCESSINGS, Prepared, Preprocessing, describe, normalise, prepare
from pipeline.encoders.views import VIEWS, turned
from pipeline.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
RunBlock = Callable[[nn.Module, Tensor], Tensor]

ARITHMETIC = 1  # raise when the same pixels and weights give other features


def build_encoder(
    name: str,
    *,
    checkpoint: Path,
    taps: Sequence[str],
    input_px: int | None = None,
    pool: int = 1,
    precision: Precision = "float32",
    preprocessing: Preprocessing = "sam",
    device: str = "cpu",
) -> Encoder:
    """Load a frozen encoder onto a device.

    Args:
        name: `sam_vit_b`, `sam_vit_l`, `sam_vit_h` or `sam_demo`.
        checkpoint: File of weights, see `load_encoder`.
        taps: Any of `patch early middle late neck` and `block:N`; of a turned image with `@` and one of `VIEWS`.
        input_px: Side of the square input, px; None is what the weights were trained for.
        pool: Side k of the local average, in tokens; must divide the grid.
        precision: Type of the matrix products.
        preprocessing: What the weights were trained with, `sam` or `medsam`.
        device: As torch names it.

    Raises:
        ConfigError: There is no such encoder, tap, pool, precision, preprocessing or input size.
        CheckpointError: The file is missing or not of this encoder.
    """
    architecture = architecture_named(name)
    input_px = architecture.input_px if input_px is None else input_px
    _check(architecture, taps, input_px, pool, precision, preprocessing)
    encoder = Encoder(
        architecture,
        load_encoder(architecture, checkpoint),
        digest=weights_sha256(checkpoint),
        taps=taps,
        input_px=input_px,
        pool=pool,
        precision=precision,
        preprocessing=preprocessing,
    )
    if torch.device(device).type == "cuda" and importlib.util.find_spec("triton"):
        encoder.compile_blocks()
    return encoder.to(device).eval()


class Encoder(nn.Module):
    """SAM's image encoder with taps and a local average pool, frozen.

    Attributes:
        name: Of the architecture.
        input_px: Side S of the square input, px.
        taps: Shape (C, g, g) of each tap's map after the pool, in the order asked for.
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
        preprocessing: Preprocessing = "sam",
    ) -> None:
        super().__init__()
        self.name = architecture.name
        self.input_px = input_px
        self._architecture = architecture
        self._digest = digest
        self._pool = pool
        self._precision = precision
        self._preprocessing = preprocessing
        self._taps = {tap: _parse(architecture, tap) for tap in taps}
        self._run_block: RunBlock = vit.run_block
        grid = input_px // architecture.patch_px
        vit.fit_to_grid(module, grid)
        vit.cast(module, getattr(torch, precision))
        self.vit = module
        side = grid // pool
        self.taps: Mapping[str, tuple[int, int, int]] = MappingProxyType(
            {tap: (architecture.channels_at(depth), side, side) for tap, (depth, _) in self._taps.items()}
        )

    def fingerprint(self) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels."""
        return {
            "encoder": self.name,
            "weights_sha256": self._digest,
            "input_px": self.input_px,
            "preprocessing": describe(self._preprocessing),
            "precision": self._precision,
            "taps": {tap: self._architecture.describe(depth) for tap, (depth, _) in self._taps.items()},
            "views": {tap: view for tap, (_, view) in self._taps.items() if view != "identity"},
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
        return prepare(image, self.input_px, self._preprocessing)

    def compile_blocks(self) -> None:
        """Compile the blocks, anew for each size of batch: callers do well to keep to one."""
        self._run_block = torch.compile(vit.run_block, dynamic=False)

    @torch.no_grad()
    def encode(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            pixels: uint8 (B, 3, S, S), as `prepare` gives them; on any device.
            sizes: int (B, 2), height and width of each image within `pixels`, px.

        Returns:
            float32 (B, C, g, g) of every tap, on the encoder's device.
        """
        pixels = pixels.to(self.vit.pos_embed.device, non_blocking=True)
        features: dict[str, Tensor] = {}
        for view in dict.fromkeys(view for _, view in self._taps.values()):
            maps = self._maps(normalise(*turned(pixels, sizes, view), self._preprocessing), view)
            features |= {tap: _pooled(maps[depth], self._pool) for tap, depth in self._depths(view).items()}
        return {tap: features[tap] for tap in self._taps}

    def _maps(self, images: Tensor, view: str) -> dict[int, Tensor]:
        """Maps (B, h, w, C) by depth, of the depths that a view's taps name; nothing deeper is computed."""
        wanted = set(self._depths(view).values())
        maps = vit.feature_maps(self.vit, images, self._run_block)
        return {depth: found for depth, found in zip(range(max(wanted) + 1), maps, strict=False) if depth in wanted}

    def _depths(self, view: str) -> dict[str, int]:
        return {tap: depth for tap, (depth, of) in self._taps.items() if of == view}


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


def _pooled(features: Tensor, pool: int) -> Tensor:
    """Average over pool x pool tokens: (B, h, w, C) to (B, C, h / pool, w / pool)."""
    return F.avg_pool2d(features.permute(0, 3, 1, 2), pool).contiguous()


def _check(
    architecture: Architecture, taps: Sequence[str], input_px: int, pool: int, precision: str, preprocessing: str
) -> None:
    """Refuse what the architecture cannot do before a gigabyte of weights is read.

    Raises:
        ConfigError: With the valid values.
    """
    for tap in taps:
        _parse(architecture, tap)
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
    choices = ("precision", precision, get_args(Precision)), ("preprocessing", preprocessing, PREPROCESSINGS)
    for what, value, valid in choices:
        if value not in valid:
            message = f"there is no {what} {value!r}; valid: {', '.join(valid)}"
            raise ConfigError(message)
