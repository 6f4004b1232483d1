"""A frozen encoder of images, whatever its family: turned views, maps depth by depth, the average of each tap."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.encoders.family import JSON, Prepared, Reads
from pipeline.encoders.pooling import average
from pipeline.encoders.preprocessing import normalise, prepare, turned
from pipeline.encoders.recipe import Recipe
from pipeline.errors import ConfigError


class FrozenEncoder(nn.Module):
    """What all families do with images; one adds the computation of its maps.

    Attributes:
        name: Of the architecture.
        input_px: Side S of the square input, px.
        taps: Shape (C, g, g) of each tap's map after its pool, in the order asked for.
        reads: Images.
    """

    reads: Reads = "image"

    def __init__(self, recipe: Recipe, digest: str) -> None:
        """Make an encoder; a family's own adds the weights.

        Args:
            recipe: What is computed, and how.
            digest: Of the file that the weights came from.
        """
        super().__init__()
        if recipe.masks is not None:
            message = f"encoder.taps: {recipe.architecture.name!r} makes no masks yet; leave 'masks' out"
            raise ConfigError(message)
        self.name = recipe.architecture.name
        self.input_px = recipe.input_px
        self.taps = recipe.shapes
        self._recipe = recipe
        self._digest = digest

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Compute depth by depth; what is not asked for is not computed.

        Args:
            images: float32 (B, 3, S, S), normalised and padded.

        Yields:
            float32 (B, h, w, C) at each depth of the family's geometry, from the first.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def fingerprint(self) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels."""
        return self._recipe.fingerprint(self._digest)

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Resize one image for this encoder on the CPU; safe to call from many threads.

        Args:
            image: uint8 (H, W, 3), RGB.

        Raises:
            DataError: See `preprocessing.prepare`.
        """
        return prepare(image, self.input_px, self._recipe.preprocessing)

    @torch.no_grad()
    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            pixels: uint8 (B, 3, S, S), as `prepare` gives them; on any device.
            sizes: int (B, 2), height and width of each image within `pixels`, px.
            dtype: Type that features are stored in, to which maps are rounded before the pool and after each of its
                steps, which `cache.pool_steps` describes.

        Returns:
            (B, C, g, g) of every tap, of type `dtype`, on the encoder's device.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        features: dict[str, Tensor] = {}
        for view in dict.fromkeys(view for _, view in self._recipe.sources.values()):
            taps = {tap: depth for tap, (depth, of) in self._recipe.sources.items() if of == view}
            maps = self.maps(normalise(*turned(pixels, sizes, view), self._recipe.preprocessing))
            for depth, found in zip(range(max(taps.values()) + 1), maps, strict=False):
                for tap in (tap for tap, wanted in taps.items() if wanted == depth):
                    features[tap] = average(found, self._recipe.pools[tap], dtype)
        return {tap: features[tap] for tap in self._recipe.sources}
