"""Frozen image encoders: weights in the official layouts, features at named depths.

Names are looked up when they are first used, so that asking what features depend on does not import torch.
Images come in, a feature map per tap goes out, and what the numbers depend on. May import: clip. Open
`family.py` first: the seam.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.encoders.checkpoint import load_encoder
    from pipeline.encoders.clip.demo import ClipDemoReport, train_demo_clip
    from pipeline.encoders.family import (
        FAMILIES,
        Described,
        Encoder,
        Family,
        Prepared,
        Recipe,
        build_encoder,
        family_of,
        fetch_weights,
        make_recipe,
        mask_settings,
        of_taps,
        present_weights,
        weights_file,
        write_untrained_encoder,
    )
    from pipeline.encoders.recipe import VIEWS
    from pipeline.encoders.sam.demo import DemoReport, train_demo_encoder
    from pipeline.encoders.sam.encoder import SamEncoder
    from pipeline.encoders.sam.recipe import ARCHITECTURES, Architecture, architecture_named
    from pipeline.encoders.weight_files import PUBLISHED, checkpoint_path, fetch_checkpoint, weights_sha256

_MODULES = {
    "ARCHITECTURES": "sam.recipe",
    "Architecture": "sam.recipe",
    "ClipDemoReport": "clip.demo",
    "DemoReport": "sam.demo",
    "Described": "family",
    "Encoder": "family",
    "FAMILIES": "family",
    "Family": "family",
    "PUBLISHED": "weight_files",
    "Prepared": "family",
    "Recipe": "family",
    "SamEncoder": "sam.encoder",
    "VIEWS": "recipe",
    "architecture_named": "sam.recipe",
    "build_encoder": "family",
    "checkpoint_path": "weight_files",
    "fetch_checkpoint": "weight_files",
    "load_encoder": "checkpoint",
    "family_of": "family",
    "fetch_weights": "family",
    "make_recipe": "family",
    "mask_settings": "family",
    "of_taps": "family",
    "present_weights": "family",
    "train_demo_clip": "clip.demo",
    "train_demo_encoder": "sam.demo",
    "weights_file": "family",
    "weights_sha256": "weight_files",
    "write_untrained_encoder": "family",
}

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "PUBLISHED",
    "VIEWS",
    "Architecture",
    "ClipDemoReport",
    "DemoReport",
    "Described",
    "Encoder",
    "Family",
    "Prepared",
    "Recipe",
    "SamEncoder",
    "architecture_named",
    "build_encoder",
    "checkpoint_path",
    "family_of",
    "fetch_checkpoint",
    "fetch_weights",
    "load_encoder",
    "make_recipe",
    "mask_settings",
    "of_taps",
    "present_weights",
    "train_demo_clip",
    "train_demo_encoder",
    "weights_file",
    "weights_sha256",
    "write_untrained_encoder",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
