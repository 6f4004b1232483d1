"""A store as a data set of torch's: for a training loop of one's own, with `DataLoader` and its workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

import cache
from pipeline.data import Reading, pixel_digest, read_image
from pipeline.data.resize import squared
from pipeline.errors import DataError
from pipeline.image_tap import IMAGE, stored_px
from pipeline.train.feeding.packed import read_tensors

Item = dict[str, Any]


class FeatureDataset(torch.utils.data.Dataset[Item]):
    """The rows of a store, each with its image and its label where there are any.

    `DataLoader` asks for whole batches at once, which one read of the store answers. A store pickles by its path, so
    workers of any start method open it themselves; rows are checked as they are read.

    Args:
        store: An open store, or the path or URL of one.
        images: The folder whose files the ids name; or a function from an id to the image, which workers that are
            spawned must be able to pickle. None: the images of the store's own tap `image`, or else none.
        labels: A label for each row, or by id; whole numbers or (K,) of 0 and 1. None: the store's own, where labels
            travel with it, or else none.
        taps: The taps to read; all that are no images if not given.
        split: Only the rows of `"train"`, `"val"` or `"test"`, as the store's own labels say.
        image_px: Side to which images of a folder are resized, px, as training does it.

    Attributes:
        store: The store.
        rows: (n,) int64, the row behind each item.
        ids: Name of each item.
        taps: Names of the taps of an item.
        labels: (n,) or (n, K) of all items; None where there are none.
        class_names: Names of the classes; None where the store does not say.

    Raises:
        DataError: The labels or the folder do not fit the store, or there is no such split or tap.
        cache.StoreError: There is no such store.
    """

    def __init__(
        self,
        store: cache.Store | str | os.PathLike[str],
        images: str | os.PathLike[str] | Callable[[str], Any] | None = None,
        labels: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        taps: Sequence[str] | None = None,
        split: str | None = None,
        image_px: int = 224,
    ) -> None:
        self.store = store if isinstance(store, cache.Store) else cache.open_store(store)
        told = self.store.labels
        self.class_names = None if told is None else told.class_names
        self.rows = self._rows_of(split)
        ids = self.store.ids
        self.ids = tuple(ids[row] for row in self.rows)
        self.taps = self._checked(taps)
        self.labels = self._labels(told.labels if labels is None and told is not None else labels)
        self._image_px = image_px
        self._images = Path(images) if isinstance(images, str | os.PathLike) else images
        self._stores_images = self._images is None and stored_px(self.store.taps) is not None
        self._reading = _reading_of(self.store)
        self._extents = torch.from_numpy(self.store.extents[self.rows])
        self._digests = (
            self.store.digests[self.rows] if len(self.store.digests) and isinstance(self._images, Path) else None
        )
        if isinstance(self._images, Path) and self.ids and not (self._images / self.ids[0]).is_file():
            message = (
                f"{self._images}: there is no file {self.ids[0]!r}, the first sample of {self.store.path}: name the "
                f"folder that the ids are relative to, or give a function from an id to its image"
            )
            raise DataError(message)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        parts = [*self.taps, *(["image"] if self._has_images else []), *([] if self.labels is None else ["label"])]
        return f"FeatureDataset({str(self.store.path)!r}): {len(self)} samples of {', '.join(parts)}"

    def __getitem__(self, index: int) -> Item:
        """Read one sample; see `__getitems__`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Read some samples at once.

        Args:
            indices: Of items, in any order.

        Returns:
            Of each: `id`; `features`, tap to (C, h, w) in the stored type; `extents` (2,) float32, the part of the
            features' grid that is image; `image`, (3, S, S) uint8 or what a function gave; `label`, an int64 or (K,).
        """
        at = np.asarray(indices, np.int64)
        names = (*self.taps, *([IMAGE] if self._stores_images else ()))
        read = read_tensors(self.store, self.rows[at], names)
        items = []
        for i, index in enumerate(at.tolist()):
            item: Item = {
                "id": self.ids[index],
                "features": {tap: read[tap][i] for tap in self.taps},
                "extents": self._extents[index],
            }
            if self._has_images:
                item["image"] = read[IMAGE][i] if self._stores_images else self._image(index)
            if self.labels is not None:
                item["label"] = self.labels[index]
            items.append(item)
        return items

    @property
    def _has_images(self) -> bool:
        return self._stores_images or self._images is not None

    def _image(self, index: int) -> Any:
        name = self.ids[index]
        if not isinstance(self._images, Path):
            assert self._images is not None
            return self._images(name)
        image = read_image(self._images / name, self._reading)
        if self._digests is not None and pixel_digest(image) != self._digests[index].tobytes():
            message = (
                f"{self._images / name}: the features of {name!r} in {self.store.path} were made from other pixels: "
                f"run `pipeline extract` again, or name the folder that the store was made from"
            )
            raise DataError(message)
        return squared(image, self._image_px)

    def _rows_of(self, split: str | None) -> Any:
        """The rows of a split, all without one: (n,) int64."""
        count = len(self.store)
        if split is None:
            return np.arange(count)
        told = self.store.labels
        if told is None or split not in told.splits:
            known = "no labels travel with it" if told is None else f"it knows {', '.join(sorted(set(told.splits)))}"
            message = f"{self.store.path}: there is no split {split!r}: {known}; leave `split` out"
            raise DataError(message)
        return np.array([row for row in range(count) if told.splits[row] == split], np.int64)

    def _checked(self, taps: Sequence[str] | None) -> tuple[str, ...]:
        known = [tap for tap, spec in self.store.taps.items() if not spec.holds_pixels]
        absent = [tap for tap in taps or () if tap not in known]
        if absent:
            message = f"{self.store.path}: there is no tap {absent[0]!r}; it has {', '.join(known)}"
            raise DataError(message)
        return tuple(known if taps is None else taps)

    def _labels(self, given: Sequence[Any] | Mapping[str, Any] | None) -> Tensor | None:
        """Labels of the items in their order: (n,) or (n, K)."""
        if given is None:
            return None
        if isinstance(given, Mapping):
            absent = [name for name in self.ids if name not in given]
            if absent:
                message = f"{len(absent)} samples have no label, {absent[0]!r} for one: give one by id for each"
                raise DataError(message)
            return torch.as_tensor(np.asarray([given[name] for name in self.ids]))
        if len(given) != len(self.store):
            message = f"there are {len(given)} labels for {len(self.store)} rows: give one for each row, or by id"
            raise DataError(message)
        return torch.as_tensor(np.asarray(given)[self.rows])


def _reading_of(store: cache.Store) -> Reading:
    """How files became the pixels of a store, as its fingerprint says."""
    rules: Any = store.fingerprint.fields.get("reading")
    if not isinstance(rules, Mapping):
        return Reading()
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in rules.items() if key != "version"
    }
    try:
        return Reading(**values)
    except TypeError:  # rules of another version of this program
        return Reading()
