"""Whether a store is already what is asked for, told from file sizes and times in less time than importing torch takes.

Anything but a plain yes (a changed file, an image that could not be read, an interrupted run, another fingerprint) is
left to `pipeline.extract.extract`, which finds out more and says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cache
from pipeline import image_tap
from pipeline.data import Dataset
from pipeline.data.scan import Remembered
from pipeline.progress import Progress, silent


def fingerprint(
    encoder: Mapping[str, Any], reading: Mapping[str, Any], dtype: str, image_px: int | None = None
) -> cache.Fingerprint:
    """Everything that the stored numbers depend on, apart from the source pixels that each row names itself.

    Args:
        encoder: What the encoder answers for: weights, preprocessing, precision, taps and pool.
        reading: How files become RGB where that is a choice (see `pipeline.data.reading_rules`).
        dtype: `"float16"` or `"float32"`, the type of the stored numbers.
        image_px: Side of the images stored beside the features; None for none.
    """
    return cache.Fingerprint({**encoder, "reading": dict(reading), "dtype": dtype, **image_tap.describe(image_px)})


def specify(
    shapes: Mapping[str, tuple[int, int, int]], dtype: str, image_px: int | None = None
) -> dict[str, cache.TapSpec]:
    """The arrays of a store, from the shape (C, h, w) of each tap, and of images of a side."""
    return {name: cache.TapSpec(*shape, dtype) for name, shape in shapes.items()} | image_tap.specify(image_px)


def unchanged(
    dataset: Dataset,
    path: Path,
    wanted: cache.Fingerprint,
    taps: Mapping[str, cache.TapSpec],
    known: Remembered,
    progress: Progress = silent,
) -> bool:
    """Say whether a store holds exactly this data set; False where that is not sure.

    Args:
        dataset: The samples, in the order that the rows must have.
        path: Of the store.
        wanted: What the stored numbers must depend on.
        taps: The arrays that must be there.
        known: What is known of the pixels, see `scan.remembered`.
        progress: Told that there is nothing to encode.
    """
    if not path.exists() or path.with_name(path.name + ".partial").exists() or not known.known.all():
        return False
    try:
        with cache.open_store(path) as store:
            same = (
                dict(store.taps) == dict(taps)
                and not store.fingerprint.differences(wanted)
                and not store.set_aside
                and store.ids == tuple(sample.id for sample in dataset.samples)
                and bool((store.digests == known.digests).all())
            )
    except cache.StoreError:
        return False
    if same:
        progress("plan", 1, 1, encode=0, reuse=len(dataset.samples))
    return same
