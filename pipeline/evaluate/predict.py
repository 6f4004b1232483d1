"""Class probabilities for images that no store holds: encoded on the fly, as stage one would have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache import Fingerprint, given, rounded
from pipeline.data import Image, Reading, read_image
from pipeline.data.resize import squared
from pipeline.errors import DataError, RunError
from pipeline.evaluate.metrics import one_hot, predictions
from pipeline.mask_tap import others_of
from pipeline.model.tasks import Task, probabilities
from pipeline.model.uses import Seen
from pipeline.progress import Progress, silent
from pipeline.train import run_folder
from pipeline.train.forward import autocast
from pipeline.train.identity import check_features

if TYPE_CHECKING:
    from pipeline.encoders import Encoder


@dataclass
class ReadableImages:
    """Image files one after the other, uint8 (H, W, 3) each, without those that cannot be read.

    Attributes:
        paths: The files.
        reading: How they become RGB.
        encoder: That has to take them, too; None where there is none.
        read: Those that came out so far, in order.
        set_aside: Reason by path, of those that cannot be read.
    """

    paths: Sequence[Path]
    reading: Reading
    encoder: Encoder | None = None
    read: list[Path] = field(default_factory=list)
    set_aside: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Image]:
        for path in self.paths:
            try:
                image = read_image(path, self.reading)
                if self.encoder is not None:
                    self.encoder.prepare(image)  # done again with its batch, which takes little beside encoding
            except DataError as error:
                self.set_aside[str(path)] = str(error) if str(path) in str(error) else f"{path}: {error}"
                continue
            self.read.append(path)
            yield image


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
        fingerprint: Of the features that `encoder` gives, as a store of them would have it.
        batch_size: Images at a time.
        device: Where the classifier computes.

    Yields:
        (K,) probabilities of the classes that `run.load_description(folder).class_names` names.

    Raises:
        RunError: No finished run, no encoder where one is needed, or one that gives other features.
    """
    where = torch.device(device)
    classifier, description = run_folder.load_classifier(folder, device=where)
    if fingerprint is not None:
        check_features(folder, description.fingerprint, fingerprint)
    taps = classifier.options.taps
    if taps and (encoder is None or fingerprint is None):
        msg = f"The model in {str(folder)!r} needs the taps {list(taps)}: give the encoder of its features."
        raise RunError(msg)
    for batch in _batches(images, batch_size):
        pixels = None
        if classifier.options.reads_images:
            pixels = torch.stack([squared(image, classifier.options.image_px) for image in batch]).to(where)
        features: dict[str, Tensor] = {}
        extents = None
        if taps and encoder is not None and fingerprint is not None:
            features, extents = _encode(encoder, batch, str(fingerprint.fields.get("dtype", "float32")))
        seen = Seen({tap: features[tap].to(where) for tap in taps}, None if extents is None else extents.to(where))
        sight = None if pixels is None else classifier.see(pixels, seen)
        with autocast(description.training["precision"], where):
            logits = classifier(sight, seen.features, seen.extents)
        yield from probabilities(description.head, logits.cpu().double()).numpy()


def verdicts(
    images: ReadableImages,
    probabilities: Iterable[npt.NDArray[np.float64]],
    class_names: Sequence[str],
    task: Task,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Decide for each image, by the rule by which the test set is scored.

    Args:
        images: What `predict` reads.
        probabilities: What it yields.
        class_names: Names of the K classes.
        task: What labels mean.
        progress: Told of each image.

    Returns:
        JSON values: `predictions`, each with `image`, what is `predicted` (a class; of several labels, a list of those
        that are likelier than not) and the `probabilities` by class; and `set_aside`, the reason by file that could not
        be read.

    Raises:
        DataError: No file could be read.
    """
    found: list[dict[str, Any]] = []
    for row in probabilities:
        called = one_hot(task, predictions(task, row[None]), len(class_names))[0]
        names = [name for name, yes in zip(class_names, called, strict=True) if yes]
        found.append(
            {
                "image": str(images.read[len(found)]),
                "predicted": names if task == "multilabel" else names[0],
                "probabilities": dict(zip(class_names, row.tolist(), strict=True)),
            }
        )
        progress("predict", len(found) + len(images.set_aside), len(images.paths))
    if not found:
        raise DataError(next(iter(images.set_aside.values())))
    return {"predictions": found, "set_aside": images.set_aside}


def _encode(encoder: Encoder, images: list[Image], dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """Encode images into taps (B, C, h, w) rounded as a store would, and the part (B, 2) of the grid that is image."""
    prepared = [encoder.prepare(image) for image in images]
    sizes = torch.tensor([item.size for item in prepared])
    found = encoder.encode(torch.stack([item.pixels for item in prepared]), sizes, getattr(torch, given(dtype)))
    kept = others_of(found)  # masks and their scores are not rounded
    features = {
        tap: values if tap in kept else torch.from_numpy(rounded(values.cpu().numpy(), dtype))
        for tap, values in found.items()
    }
    return features, (sizes / encoder.input_px).float()


def _batches(images: Iterable[Image], size: int) -> Iterator[list[Image]]:
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch
