"""A store as a data set: labels and splits that travel with it, for whoever was sent features and has no images.

Images are there only if somebody stored them as a tap (`pipeline.image_tap`), at the side that they were stored at. Ids
may be pseudonyms.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np

import cache
from pipeline import image_tap
from pipeline.data.dataset import SPLITS, Dataset, Image, Mask, Sample, Split, Task, listing
from pipeline.errors import DataError

WITHOUT_IMAGES = (
    "Without images there are: probe, classifiers of features alone (model.backbone: none), and evaluate, compare, "
    "report and study on these"
)


class StoredImages:
    """The images of a store, or a clear word that there are none.

    Args:
        path: The store.
        store: The same, open; it opens itself again in another process.
    """

    def __init__(self, path: Path, store: cache.Store) -> None:
        self._path, self._store = path, store
        self._has_images = image_tap.stored_px(store.taps) is not None

    def read(self, index: int) -> Image:
        """The stored image of a row, uint8 (S, S, 3).

        Raises:
            DataError: The store holds no images.
        """
        if not self._has_images:
            raise DataError(self._absent(self._store.ids[index]))
        pixels = self._store.read([index], (image_tap.IMAGE,))[image_tap.IMAGE][0]
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))

    def stamp(self, index: int) -> str | None:
        """Nothing: what is stored is checked by the store itself."""
        return None

    def mask(self, index: int) -> Mask | None:
        """Nothing: masks do not travel."""
        return None

    def digest(self, index: int) -> bytes | None:
        """Digest of the pixels that a row was made from; None in a copy with pseudonyms."""
        digests = self._store.digests
        return digests[index].tobytes() if len(digests) else None

    def _absent(self, name: str) -> str:
        whose = "a pseudonym" if cache.are_pseudonyms(self._store.ids) else "a sample"
        return (
            f"{self._path}: there is no image of {name!r}, {whose} of a store of features (data.layout: store). "
            f"{WITHOUT_IMAGES}; for anything else configure the data set with its images"
        )


def load_stored(path: Path, *, task: Task | None = None) -> Dataset:
    """Load the labels and splits that travel with a store.

    Args:
        path: The store.
        task: What the labels mean; None for what travels with them, or else what they look like.

    Raises:
        DataError: No labels travel with it, or a split is none.
        cache.StoreError: It cannot be opened.
    """
    store = cache.open_store(path)
    labels = store.labels
    if labels is None:
        message = (
            f"{path}: no labels travel with this store. Ask for a copy that was sent with them (`pipeline store push "
            f"--with-labels`), or configure the data set that has them (data.layout: folder, csv or medmnist)"
        )
        raise DataError(message)
    strange = sorted(set(labels.splits) - set(SPLITS))
    if strange:
        message = f"{path}: its labels name the splits {listing(strange)}; expected {', '.join(SPLITS)}"
        raise DataError(message)
    split_of: dict[str, Split] = {split: split for split in SPLITS}
    samples = tuple(
        Sample(name, label, split_of[split], group)
        for name, label, split, group in zip(
            store.ids, labels.labels, labels.splits, labels.groups or store.ids, strict=True
        )
    )
    return Dataset(
        path.name.removesuffix(path.suffix),
        samples,
        labels.class_names,
        task or _task(labels),
        StoredImages(path, store),
    )


def _task(labels: cache.Labels) -> Task:
    """What labels mean: as whoever sent them said, else what they look like, which cannot tell grades from classes."""
    said = next((task for task in get_args(Task) if task == labels.task), None)
    if said is not None:
        return said  # type: ignore[no-any-return]
    if any(isinstance(label, tuple) for label in labels.labels):
        return "multilabel"
    return "binary" if len(labels.class_names) == 2 else "multiclass"
