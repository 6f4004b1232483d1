"""Frozen SAM image encoders: weights in the official layout, features at named depths."""

from __future__ import annotations

from pipeline.encoders.architecture import ARCHITECTURES, Architecture, architecture_named
from pipeline.encoders.checkpoint import load_encoder, weights_sha256
from pipeline.encoders.encoder import Encoder, build_encoder
from pipeline.encoders.preprocessing import Prepared

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Encoder",
    "Prepared",
    "architecture_named",
    "build_encoder",
    "load_encoder",
    "weights_sha256",
]
