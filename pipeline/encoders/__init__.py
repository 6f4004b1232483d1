"""Frozen SAM image encoders: weights in the official layout, features at named depths.

Names are looked up when they are first used, so that asking what features depend on does not import torch.
Images come in, a feature map per tap goes out, and what the numbers depend on. May import no other room. Open
`encoder.py` first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.encoders.architecture import ARCHITECTURES, Architecture, architecture_named
    from pipeline.encoders.checkpoint import load_encoder
    from pipeline.encoders.demo import DemoReport, train_demo_encoder, write_untrained_encoder
    from pipeline.encoders.digest import weights_sha256
    from pipeline.encoders.encoder import Encoder, build_encoder
    from pipeline.encoders.preprocessing import Prepared
    from pipeline.encoders.published import PUBLISHED, checkpoint_path, fetch_checkpoint
    from pipeline.encoders.recipe import VIEWS, Recipe, make_recipe

_MODULES = {
    "ARCHITECTURES": "architecture",
    "Architecture": "architecture",
    "DemoReport": "demo",
    "Encoder": "encoder",
    "PUBLISHED": "published",
    "Prepared": "preprocessing",
    "Recipe": "recipe",
    "VIEWS": "recipe",
    "architecture_named": "architecture",
    "build_encoder": "encoder",
    "checkpoint_path": "published",
    "fetch_checkpoint": "published",
    "load_encoder": "checkpoint",
    "make_recipe": "recipe",
    "train_demo_encoder": "demo",
    "weights_sha256": "digest",
    "write_untrained_encoder": "demo",
}

__all__ = [
    "ARCHITECTURES",
    "PUBLISHED",
    "VIEWS",
    "Architecture",
    "DemoReport",
    "Encoder",
    "Prepared",
    "Recipe",
    "architecture_named",
    "build_encoder",
    "checkpoint_path",
    "fetch_checkpoint",
    "load_encoder",
    "make_recipe",
    "train_demo_encoder",
    "weights_sha256",
    "write_untrained_encoder",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
