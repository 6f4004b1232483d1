"""CLIP's image tower for stage one: open_clip's module and its own preprocessing, stopped where it may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from PIL import Image as Pillow
from torch import Tensor

from pipeline import clip
from pipeline.encoders.clip.recipe import Tower
from pipeline.encoders.family import Prepared
from pipeline.encoders.frozen import FrozenEncoder
from pipeline.encoders.preprocessing import require_rgb
from pipeline.encoders.recipe import Recipe
from pipeline.encoders.untrained import count, write_whole
from pipeline.encoders.weight_files import weights_sha256
from pipeline.errors import CheckpointError, ConfigError, DataError


def build(recipe: Recipe, checkpoint: Path | None, device: str) -> ClipEncoder:
    """Load an image tower onto a device; see `family.build_encoder`.

    Raises:
        ConfigError: The weights are published for another form of this CLIP.
        CheckpointError: The file is missing or of another CLIP.
    """
    name = recipe.architecture.name
    if checkpoint is None:
        message = f"{name} needs a file of weights: set encoder.checkpoint"
        raise CheckpointError(message)
    if not checkpoint.is_file():
        message = f"{checkpoint}: there is no such file of weights"
        raise CheckpointError(message)
    wanted = clip.architecture(name)
    _require_same_form(name, wanted, checkpoint)
    model = clip.build(wanted, checkpoint, image_px=recipe.input_px)
    return ClipEncoder(recipe, model.visual, weights_sha256(checkpoint)).to(device).eval()


def _require_same_form(name: str, wanted: clip.Architecture, file: Path) -> None:
    """Refuse published weights that want another activation or other colours than the name has by itself.

    The fingerprint says the name, and the same file has to mean the same features wherever it lies.
    """
    for tag in clip.tags(name):
        if clip.weights_file(name, tag) == file and clip.architecture(name, tag) != wanted:
            message = (
                f"encoder.checkpoint: the weights {tag!r} want another form of {name!r}: set encoder.name to "
                f"{name + '-quickgelu'!r} if it is the activation, or choose others: {', '.join(clip.tags(name))}"
            )
            raise ConfigError(message)


def write_untrained(name: str, path: Path, generator: torch.Generator) -> int:
    """Write weights in open_clip's layout, drawn as open_clip draws them; see `family.write_untrained_encoder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        model = clip.build(clip.architecture(name))
    write_weights(path, model)
    return count(model)


def write_weights(path: Path, model: torch.nn.Module) -> None:
    """Write a whole CLIP in open_clip's layout: `.safetensors`, or else as torch saves tensors."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        write_whole(path, lambda file: file.write(safetensors.torch.save(state)))
    else:
        write_whole(path, partial(torch.save, state))


class ClipEncoder(FrozenEncoder):
    """An image tower with taps, frozen; the text tower is not kept."""

    def __init__(self, recipe: Recipe, tower: Any, digest: str) -> None:
        """Make an encoder of open_clip's image tower.

        Args:
            recipe: What is computed, and how; of a `Tower`.
            tower: open_clip's module.
            digest: Of the file that the weights came from.
        """
        super().__init__(recipe, digest)
        assert isinstance(recipe.architecture, Tower)
        self._says = recipe.architecture.preprocessing_fields(recipe.preprocessing)
        self._blocks = recipe.architecture.blocks
        self._precision = getattr(torch, recipe.precision)
        self.tower = tower.requires_grad_(False)

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Resize and cut one image as open_clip does, on the CPU; safe to call from many threads.

        Args:
            image: uint8 (H, W, 3), RGB.

        Raises:
            DataError: The array is no RGB image.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import center_crop, resize

        require_rgb(image)
        if not image.size:
            message = f"an image of {image.shape[0]}x{image.shape[1]} px has no pixel; leave it out"
            raise DataError(message)
        side, squash = self.input_px, self._says["resize_mode"] == "squash"
        picture = Pillow.fromarray(image)
        how = InterpolationMode(self._says["interpolation"])
        picture = resize(picture, [side, side] if squash else [side], how)
        picture = picture if squash else center_crop(picture, [side, side])
        return Prepared(torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous(), (side, side))

    def normalise(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Scale colours as open_clip does; every pixel is image."""
        mean, std = (torch.tensor(self._says[of]).view(3, 1, 1) for of in ("mean", "std"))
        of_1 = pixels.float().div(255)
        return of_1.sub_(mean.to(of_1.device, non_blocking=True)).div_(std.to(of_1.device, non_blocking=True))

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Compute depth by depth; see `FrozenEncoder.maps`."""
        if not self._blocks:
            with self._autocast():
                found = self.tower(images)
            yield _one_cell(found[0] if isinstance(found, tuple) else found)
            return
        tower = self.tower
        with self._autocast():
            x = tower._embeds(images)
        yield _grid(x)
        for block in tower.transformer.resblocks:
            with self._autocast():
                x = block(x)
            yield _grid(x)
        with self._autocast():
            yield _grid(_projected(tower, tower.ln_post(x)))
            yield _one_cell(_projected(tower, tower._pool(x)[0]))

    def _autocast(self) -> AbstractContextManager[object]:
        """Matrix products in the recipe's type."""
        if self._precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self._precision)


def _projected(tower: Any, x: Tensor) -> Tensor:
    """Into the space of the texts."""
    return x if tower.proj is None else x @ tower.proj


def _grid(tokens: Tensor) -> Tensor:
    """Tokens (B, 1 + h * h, C), the class token first, as a map (B, h, h, C) in float32."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].float().reshape(len(tokens), side, side, -1)


def _one_cell(embedding: Tensor) -> Tensor:
    """An image feature (B, E) as a map (B, 1, 1, E) in float32."""
    return embedding.float()[:, None, None, :]
