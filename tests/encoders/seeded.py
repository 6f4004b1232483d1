"""SAM's own modules with seeded weights: the oracle of this area's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

from pipeline.encoders import Architecture

TINY = Architecture(
    "sam_tiny", width=24, blocks=5, heads=2, global_blocks=(1, 2, 4), window=3, neck=8, input_px=128, patch_px=16
)


def seeded_state(architecture: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """Weights in the official layout under which every part of the encoder changes its output."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in architecture.build().state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if "rel_pos" in name or name == "pos_embed":
            state[name] = 0.1 * noise
        elif parameter.ndim == 1:
            is_scale = name.endswith(("norm1.weight", "norm2.weight", "neck.1.weight", "neck.3.weight"))
            state[name] = 0.02 * noise + float(is_scale)
        else:
            state[name] = noise / parameter[0].numel() ** 0.5
    return state


def official_encoder(architecture: Architecture, state: dict[str, Tensor], input_px: int) -> ImageEncoderViT:
    """The official module; for another input size its one parameter that cannot adapt is resampled."""
    vit = architecture.build()
    vit.load_state_dict(state, assign=True)
    grid = input_px // architecture.patch_px
    if input_px != architecture.input_px:
        position = state["pos_embed"].permute(0, 3, 1, 2)
        position = F.interpolate(position, (grid, grid), mode="bicubic", antialias=True)
        vit.pos_embed = nn.Parameter(position.permute(0, 2, 3, 1))
        vit.img_size = input_px
    return vit.eval().requires_grad_(False)


@contextmanager
def hooked(vit: ImageEncoderViT) -> Iterator[dict[str, Tensor]]:
    """Collect what flows between the official module's parts, as (B, C, h, w)."""
    seen: dict[str, Tensor] = {}
    hooks = [
        vit.blocks[0].register_forward_pre_hook(
            lambda _, inputs: seen.__setitem__("patch", inputs[0].permute(0, 3, 1, 2).clone())
        ),
        vit.neck.register_forward_hook(lambda _, __, out: seen.__setitem__("neck", out.clone())),
    ]
    for number, block in enumerate(vit.blocks):

        def keep(_: nn.Module, __: object, out: Tensor, name: str = f"block:{number}") -> None:
            seen[name] = out.permute(0, 3, 1, 2).clone()

        hooks.append(block.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def predictor(vit: ImageEncoderViT) -> SamPredictor:
    """The official predictor around an encoder; its decoder is not needed to embed an image."""
    return SamPredictor(Sam(vit, nn.Identity(), nn.Identity()))


def image_like(height: int, width: int, seed: int = 0, *, grey: bool = False) -> npt.NDArray[np.uint8]:
    """A smooth seeded image with some noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(float)
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.01, 0.2, (3, 3))]
    image = np.stack(waves, axis=2) * 90 + 128 + rng.normal(0, 12, (height, width, 3))
    if grey:
        image[:] = image.mean(axis=2, keepdims=True)
    return image.clip(0, 255).astype(np.uint8)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
