"""Weights that have learnt nothing: what is left of an encoder without its training. They begin the demo's, too."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from pipeline.errors import naming


def draw(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give a module random weights on the CPU, without touching torch's global generator.

    Biases and relative positions are zero, normalisations one, matrices normal with the fan-in's scale.

    Args:
        module: May be on the `meta` device.
        generator: The same one draws the same weights.
    """
    module = module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        _initialise(name, parameter, generator)
    return module


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its name, then rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).replace(path)


def count(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if "rel_pos" in name or name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif parameter.ndim == 1:
        nn.init.ones_(parameter)
    elif "pos_embed" in name:
        nn.init.normal_(parameter, std=0.02, generator=generator)
    else:
        nn.init.normal_(parameter, std=math.sqrt(1 / parameter[0].numel()), generator=generator)
