"""Class probabilities for images that no store holds: encoded on the fly, as stage one would have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache import Fingerprint, Roundings
from pipeline.data import Image, Reading, read_image
from pipeline.data.named import Name
from pipeline.data.resize import squared
from pipeline.errors import DataError, RunError
from pipeline.evaluate.metrics import one_hot, predictions
from pipeline.mask_tap import others_of
from pipeline.model.tasks import Task, probabilities
from pipeline.model.uses import Seen
from pipeline.overlap import ahead, threads
from pipeline.progress import Progress, silent
from pipeline.train import trained_model
from pipeline.train.forward import autocast
from pipeline.train.identity import check_features
from pipeline.url import Url

if TYPE_CHECKING:
    from pipeline.encoders import Encoder, Prepared

BATCH = 8  # images at a time


@dataclass(frozen=True)
class Taken:
    """One image as a batch takes it; the host has done all it does with one image.

    Attributes:
        pixels: (3, S, S) uint8, for the classifier; None where it reads none.
        prepared: For the encoder; None where there is none.
    """

    pixels: Tensor | None
    prepared: Prepared | None


class Predictor:
    """A trained classifier, with the encoder of what it reads, in memory: images in, probabilities out.

    Args:
        folder: A finished run.
        encoder: The frozen encoder of stage one; not needed for a classifier without gates.
        fingerprint: Of the features that `encoder` gives, as a store of them would have it.
        batch_size: Images at a time.
        device: Where the classifier computes.

    Attributes:
        class_names: Of the K classes.
        task: What labels mean.

    Raises:
        RunError: No finished run, no encoder where one is needed, or one that gives other features.
    """

    def __init__(
        self,
        folder: Path,
        *,
        encoder: Encoder | None = None,
        fingerprint: Fingerprint | None = None,
        batch_size: int = BATCH,
        device: str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self._classifier, description = trained_model.load_classifier(folder, device=self._device)
        self.class_names, self.task = description.class_names, description.task
        self._head, self._precision = description.head, description.training["precision"]
        if fingerprint is not None:
            check_features(folder, description.fingerprint, fingerprint)
        self._taps = self._classifier.options.taps
        if self._taps and (encoder is None or fingerprint is None):
            msg = f"The model in {str(folder)!r} needs the taps {list(self._taps)}: give the encoder of its features."
            raise RunError(msg)
        self._encoder = encoder if self._taps else None
        self._dtype = "float32" if fingerprint is None else str(fingerprint.fields.get("dtype", "float32"))
        self._batch_size = batch_size

    def take(self, image: Image) -> Taken:
        """Make of an image, uint8 (H, W, 3), what a batch takes; safe to call from many threads.

        Raises:
            DataError: The encoder takes no such image.
        """
        options = self._classifier.options
        return Taken(
            squared(image, options.image_px) if options.reads_images else None,
            None if self._encoder is None else self._encoder.prepare(image),
        )

    def __call__(self, images: Iterable[Taken]) -> Iterator[npt.NDArray[np.float64]]:
        """Classify images in batches of a size: probabilities (K,) each, in their order."""
        iterator = iter(images)
        while batch := list(islice(iterator, self._batch_size)):
            yield from self._classify(batch)

    @torch.no_grad()
    def _classify(self, batch: Sequence[Taken]) -> npt.NDArray[np.float64]:
        """Probabilities (B, K) of a batch."""
        squares = [taken.pixels for taken in batch if taken.pixels is not None]
        pixels = torch.stack(squares).to(self._device) if squares else None
        prepared = [taken.prepared for taken in batch if taken.prepared is not None]
        features: dict[str, Tensor] = {}
        extents = None
        if self._encoder is not None:
            features, extents = _encode(self._encoder, prepared, self._dtype)
            extents = extents.to(self._device)
        seen = Seen({tap: features[tap].to(self._device) for tap in self._taps}, extents)
        sight = None if pixels is None else self._classifier.see(pixels, seen)
        with autocast(self._precision, self._device):
            logits = self._classifier(sight, seen.features, seen.extents)
        return probabilities(self._head, logits.cpu().double()).numpy()


def predict(
    folder: Path,
    images: Iterable[Image],
    *,
    encoder: Encoder | None = None,
    fingerprint: Fingerprint | None = None,
    batch_size: int = BATCH,
    device: str = "cpu",
) -> Iterator[npt.NDArray[np.float64]]:
    """Classify images, uint8 (H, W, 3) of any size, one after the other.

    Args:
        folder: See `Predictor`, as for the others.
        images: What to classify.
        encoder: The frozen encoder of stage one.
        fingerprint: Of its features.
        batch_size: Images at a time.
        device: Where the classifier computes.

    Yields:
        (K,) probabilities of the classes that `run.load_description(folder).class_names` names.

    Raises:
        RunError: See `Predictor`.
    """
    predictor = Predictor(folder, encoder=encoder, fingerprint=fingerprint, batch_size=batch_size, device=device)
    yield from predictor(map(predictor.take, images))


@dataclass(frozen=True)
class FilePredictor:
    """What says of image files which class they show: a predictor, and how files become what it takes.

    Attributes:
        predictor: In memory.
        reading: How files become RGB.
        workers: Decoding threads.
    """

    predictor: Predictor
    reading: Reading
    workers: int = 1

    def __call__(self, names: Sequence[Name], progress: Progress = silent) -> dict[str, Any]:
        """Decide for each image, by the rule by which the test set is scored.

        Args:
            names: Files.
            progress: Told of each image.

        Returns:
            JSON values, see `verdicts`.
        """
        images = ReadableImages(names, self.reading, self.predictor.take, self.workers)
        return verdicts(
            images, self.predictor(images), self.predictor.class_names, self.predictor.task, progress=progress
        )


@dataclass
class ReadableImages:
    """Image files one after the other, as a predictor takes them, without those that cannot be read.

    Attributes:
        names: The files.
        reading: How they become RGB.
        take: What the host does with an image, see `Predictor.take`.
        workers: Threads that read ahead.
        read: Those that came out so far, in order.
        set_aside: Reason by file, of those that cannot be read.
    """

    names: Sequence[Name]
    reading: Reading
    take: Callable[[Image], Taken]
    workers: int = 1
    read: list[str] = field(default_factory=list)
    set_aside: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Taken]:
        with threads(self.workers, "decode") as pool:
            for name, found in zip(self.names, ahead(self._try, self.names, pool, 4 * self.workers), strict=True):
                if isinstance(found, DataError):
                    self.set_aside[str(name)] = str(found) if str(name) in str(found) else f"{name}: {found}"
                else:
                    self.read.append(str(name))
                    yield found

    def _try(self, name: Name) -> Taken | DataError:
        try:
            return self.take(read_image(name if isinstance(name, Url) else Path(name), self.reading))
        except DataError as error:
            return error


def verdicts(
    images: ReadableImages,
    probabilities: Iterable[npt.NDArray[np.float64]],
    class_names: Sequence[str],
    task: Task,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Decide for each image, by the rule by which the test set is scored.

    Args:
        images: What is classified.
        probabilities: What comes of it, (K,) each.
        class_names: Names of the K classes.
        task: What labels mean.
        progress: Told of each image.

    Returns:
        JSON values: `predictions`, each with `image`, what is `predicted` (a class; of several labels, a list of those
        that are likelier than not) and the `probabilities` by class; and `set_aside`, the reason by file that could not
        be read.
    """
    found: list[dict[str, Any]] = []
    for row in probabilities:
        called = one_hot(task, predictions(task, row[None]), len(class_names))[0]
        names = [name for name, yes in zip(class_names, called, strict=True) if yes]
        found.append(
            {
                "image": images.read[len(found)],
                "predicted": names if task == "multilabel" else names[0],
                "probabilities": dict(zip(class_names, row.tolist(), strict=True)),
            }
        )
        progress("predict", len(found) + len(images.set_aside), len(images.names))
    return {"predictions": found, "set_aside": images.set_aside}


def _encode(encoder: Encoder, prepared: Sequence[Prepared], dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """Encode images into taps (B, C, h, w) rounded as a store would, and the part (B, 2) of the grid that is image."""
    sizes = torch.tensor([item.size for item in prepared])
    roundings = Roundings(dtype)
    pixels = torch.stack([item.pixels for item in prepared])
    found = encoder.encode(pixels, sizes, getattr(torch, roundings.given))
    kept = others_of(found)  # masks and their scores are not rounded
    features = {
        tap: values if tap in kept else torch.from_numpy(roundings.apply(values.cpu().numpy()))
        for tap, values in found.items()
    }
    return features, (sizes / encoder.input_px).float()
