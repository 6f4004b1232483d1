"""A frozen encoder of images, whatever its family: turned views, maps depth by depth, the average of each tap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline import mask_tap
from pipeline.encoders.family import JSON, Prepared, Reads
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.pooling import average
from pipeline.encoders.preprocessing import normalise, prepare, turned
from pipeline.encoders.recipe import Recipe


class FrozenEncoder(nn.Module):
    """What all families do with images; one adds the computation of its maps.

    Attributes:
        input_px: Side S of the square input, px.
        taps: Shape (C, g, g) of each tap's map after its pool, in the order asked for.
        reads: Images.
    """

    reads: Reads = "image"

    def __init__(self, recipe: Recipe, digest: str, everything: Everything | None = None) -> None:
        """Make an encoder; a family's own adds the weights.

        Args:
            recipe: What is computed, and how.
            digest: Of the file that the weights came from.
            everything: What finds masks, where they are asked for.
        """
        super().__init__()
        self.input_px = recipe.input_px
        self.taps = recipe.shapes
        self._recipe = recipe
        self._digest = digest
        self.everything = everything

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Compute depth by depth; what is not asked for is not computed.

        Args:
            images: float32 (B, 3, S, S), normalised and padded.

        Yields:
            float32 (B, h, w, C) at each depth of the family's geometry, from the first.
        """
        raise NotImplementedError

    @property
    def mask_depths(self) -> tuple[int, ...]:
        """Depths of the maps that masks are made of."""
        return (self._recipe.architecture.named_depths["neck"],)

    def find_masks(self, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Masks of one image, where they are asked for; see `Everything`.

        Args:
            maps: (h, w, C) at each of `mask_depths`.
            size: Height and width of the image within the input, px.
        """
        assert self.everything is not None
        masks: tuple[Tensor, Tensor] = self.everything(maps[-1], size)
        return masks

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

    def normalise(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Make what the network takes of a batch of bytes; see `preprocessing.normalise`."""
        return normalise(pixels, sizes, self._recipe.preprocessing)

    @torch.no_grad()
    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            pixels: uint8 (B, 3, S, S), as `prepare` gives them; on any device.
            sizes: int (n, 2), height and width of each image within `pixels`, px. What follows the n images fills the
                batch up to its size.
            dtype: Type that features are stored in, to which maps are rounded before the pool and after each of its
                steps, which `cache.pool_steps` describes.

        Returns:
            (n, C, g, g) of every tap, of type `dtype`, on the encoder's device; masks and their scores have types of
            their own (see `pipeline.mask_tap`).
        """
        pixels = pixels.to(self.device, non_blocking=True)
        images = len(sizes)
        sizes = torch.cat([sizes, sizes[-1:].expand(len(pixels) - images, 2)])
        features: dict[str, Tensor] = {}
        kept: list[Tensor] = []  # for the masks
        views = [view for _, view in self._recipe.sources.values()]
        for view in dict.fromkeys(["identity", *views] if self.everything else views):
            taps = {tap: depth for tap, (depth, of) in self._recipe.sources.items() if of == view}
            for_masks = self.mask_depths if self.everything and view == "identity" else ()
            maps = self.maps(self.normalise(*turned(pixels, sizes, view)))
            for depth, found in zip(range(max([*taps.values(), *for_masks]) + 1), maps, strict=False):
                for tap in (tap for tap, wanted in taps.items() if wanted == depth):
                    features[tap] = average(found, self._recipe.pools[tap], dtype)[:images]
                if depth in for_masks:
                    kept.append(found[:images])
        if self.everything:
            real = zip(*kept, sizes[:images].tolist(), strict=True)
            found_masks = [self.find_masks(maps, size) for *maps, size in real]
            for tap, values in zip((mask_tap.MASKS, mask_tap.SCORES), zip(*found_masks, strict=True), strict=True):
                features[tap] = torch.stack(values)
        return {tap: features[tap] for tap in self.taps}
