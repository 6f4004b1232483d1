"""Frozen SAM image encoders: weights in the official layout, features at named depths."""

from __future__ import annotations

from pipeline.encoders.architecture import ARCHITECTURES, Architecture, architecture_named
from pipeline.encoders.checkpoint import load_encoder, weights_sha256
from pipeline.encoders.demo import DemoReport, train_demo_encoder
from pipeline.encoders.encoder import Encoder, build_encoder
from pipeline.encoders.preprocessing import Prepared
from pipeline.encoders.published import PUBLISHED, checkpoint_path, fetch_checkpoint
from pipeline.encoders.views import VIEWS

__all__ = [
    "ARCHITECTURES",
    "PUBLISHED",
    "VIEWS",
    "Architecture",
    "DemoReport",
    "Encoder",
    "Prepared",
    "architecture_named",
    "build_encoder",
    "checkpoint_path",
    "fetch_checkpoint",
    "load_encoder",
    "train_demo_encoder",
    "weights_sha256",
]
