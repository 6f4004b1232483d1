"""TinyViT's image encoder for stage one: weights of a checkpoint, or drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.encoders.checkpoint import encoder_state, require_same, shapes_of
from pipeline.encoders.frozen import FrozenEncoder
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.masks.weights import load_everything
from pipeline.encoders.recipe import Recipe
from pipeline.encoders.tiny_vit.network import Network
from pipeline.encoders.tiny_vit.recipe import TINY_VITS, TinyVit
from pipeline.encoders.untrained import write_whole
from pipeline.encoders.weight_files import weights_sha256
from pipeline.errors import CheckpointError

_OF_THE_CLASSIFIER = ("norm_head.", "head.")  # MobileSAM's checkpoint still has what TinyViT classified with


def build(recipe: Recipe, checkpoint: Path | None, device: str) -> TinyVitEncoder:
    """Load an encoder onto a device; see `family.build_encoder`.

    Raises:
        CheckpointError: The file is missing or not of this encoder.
    """
    tiny = TINY_VITS[recipe.architecture.name]
    if checkpoint is None:
        message = f"{tiny.name} needs a file of weights: set encoder.checkpoint"
        raise CheckpointError(message)
    state = load_state(tiny, checkpoint)
    everything = load_everything(recipe, checkpoint)
    return TinyVitEncoder(recipe, tiny, state, weights_sha256(checkpoint), everything).to(device).eval()


def load_state(tiny: TinyVit, path: Path) -> dict[str, Tensor]:
    """The image encoder's tensors in a checkpoint of a whole model or of its image encoder alone.

    Raises:
        CheckpointError: The file is missing or no checkpoint, or a key is missing, unknown or misshapen.
    """
    state = {name: value for name, value in encoder_state(path).items() if not name.startswith(_OF_THE_CLASSIFIER)}
    require_same(path, tiny.name, shapes_of(state), tiny.shapes())
    return {name: value.float() for name, value in state.items()}


def write_untrained(name: str, path: Path, generator: torch.Generator) -> int:
    """Write a checkpoint in the key layout of MobileSAM's image encoder; see `family.write_untrained_encoder`.

    Batch norms pass on what they get, so that every block does something; TinyViT's own start has the last of each
    block of convolutions at zero.
    """
    state = {key: _drawn(key, shape, generator) for key, shape in TINY_VITS[name].shapes().items()}
    write_whole(path, partial(torch.save, state))
    return sum(value.numel() for key, value in state.items() if ".running_" not in key and value.ndim)


def _drawn(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Biases and means zero, scales and variances one, matrices normal with the fan-in's scale."""
    if not shape:
        return torch.zeros((), dtype=torch.int64)
    if key.endswith(("bias", "attention_biases", "running_mean")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


class TinyVitEncoder(FrozenEncoder):
    """TinyViT's image encoder with taps and a local average for each, frozen."""

    def __init__(
        self,
        recipe: Recipe,
        tiny: TinyVit,
        state: Mapping[str, Tensor],
        digest: str,
        everything: Everything | None = None,
    ) -> None:
        """Make an encoder of a checkpoint's tensors.

        Args:
            recipe: What is computed, and how.
            tiny: Its geometry.
            state: As `load_state` gives them.
            digest: Of the file that they came from.
            everything: What finds masks, where they are asked for.
        """
        super().__init__(recipe, digest, everything)
        self.network = Network(tiny, state, getattr(torch, recipe.precision))

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Maps at each depth; see `FrozenEncoder`."""
        return self.network.maps(images)
