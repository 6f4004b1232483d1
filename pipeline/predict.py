"""Class probabilities for images that no store holds: encoded on the fly, as stage one would have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache import Fingerprint
from pipeline import run
from pipeline.backbones import standardise
from pipeline.data import Image
from pipeline.errors import RunError
from pipeline.infer import autocast
from pipeline.resize import squared
from pipeline.tasks import probabilities

if TYPE_CHECKING:
    from pipeline.encoders import Encoder


@torch.no_grad()
def predict(
    folder: Path,
    images: Iterable[Image],
    *,
    encoder: Encoder | None = None,
    fingerprint: Fingerprint | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> Iterator[npt.NDArray[np.float64]]:
    """Classify images one after the other.

    Args:
        folder: A finished run.
        images: uint8 (H, W, 3) each, of any size.
        encoder: The frozen encoder of stage one; not needed for a classifier without gates.
        fingerprint: Of the features that `encoder` gives, as `pipeline.unchanged.fingerprint` makes it.
        batch_size: Images at a time.
        device: Where the classifier computes.

    Yields:
        (K,) probabilities of the classes that `run.load_description(folder).class_names` names.

    Raises:
        RunError: No finished run, no encoder where one is needed, or one that gives other features.
    """
    where = torch.device(device)
    classifier, description = run.load_classifier(folder, fingerprint=fingerprint, device=where)
    taps = classifier.options.taps
    if taps and (encoder is None or fingerprint is None):
        msg = f"The model in {str(folder)!r} needs the taps {list(taps)}: give the encoder of its features."
        raise RunError(msg)
    for batch in _batches(images, batch_size):
        pixels = torch.stack([squared(image, classifier.options.image_px) for image in batch]).to(where)
        features: dict[str, Tensor] = {}
        extents = None
        if taps and encoder is not None and fingerprint is not None:
            features, extents = _encode(encoder, batch, str(fingerprint.fields.get("dtype", "float32")))
        with autocast(description.training["precision"], where):
            logits = classifier(
                standardise(pixels.float()),
                {tap: features[tap].to(where) for tap in taps},
                None if extents is None else extents.to(where),
            )
        yield from probabilities(description.head, logits.cpu().double()).numpy()


def _encode(encoder: Encoder, images: list[Image], dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """Encode images into taps (B, C, h, w) rounded as a store would, and the part (B, 2) of the grid that is image."""
    prepared = [encoder.prepare(image) for image in images]
    sizes = torch.tensor([item.size for item in prepared])
    features = encoder.encode(torch.stack([item.pixels for item in prepared]), sizes)
    rounded = {tap: feature.to(getattr(torch, dtype)) for tap, feature in features.items()}
    return rounded, (sizes / encoder.input_px).float()


def _batches(images: Iterable[Image], size: int) -> Iterator[list[Image]]:
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch
