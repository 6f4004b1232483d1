"""The known masks of a data set as an encoder: all are read first, because they are what it knows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pipeline.data import Dataset
from pipeline.data.scan import memory_of, scan
from pipeline.encoders.known_mask import KnownMask
from pipeline.encoders.known_mask_recipe import NAME, MaskRecipe
from pipeline.errors import DataError
from pipeline.extract.plan import Rows
from pipeline.overlap import ahead, threads
from pipeline.progress import Progress, silent


def known_mask(
    dataset: Dataset,
    path: Path,
    recipe: MaskRecipe,
    *,
    workers: int = 2,
    strict: bool = False,
    recheck: bool = False,
    progress: Progress = silent,
) -> KnownMask:
    """Read all masks of the images that can be read, and make the encoder that knows them.

    Args:
        dataset: Images with masks.
        path: Of the store that is to be made.
        recipe: Of what grid.
        workers: Decoding threads.
        strict: Stop at the first image that cannot be read.
        recheck: Decode every image again.
        progress: Called after each image and each mask.

    Raises:
        DataError: A sample has no mask, or no image can be read.
    """
    if dataset.mask(0) is None:  # a layout has masks for all samples or for none
        message = (
            f"{dataset.name!r} has no masks, and the encoder {NAME!r} makes its tap from them: "
            f"name data.mask_column of a CSV table, take the demo data, or choose another encoder"
        )
        raise DataError(message)
    rows = Rows(scan(dataset, memory_of(path), recheck=recheck, workers=workers, strict=strict, progress=progress))
    digest = hashlib.sha256()
    with threads(workers, "mask") as pool:
        masks = ahead(rows.mask, range(len(rows)), pool, depth=4 * workers)
        for number, (mask, sample) in enumerate(zip(masks, rows.ids, strict=True)):
            digest.update(f"{sample} {mask.shape} ".encode() + np.packbits(mask).tobytes())
            progress("mask", number + 1, len(rows))
    return KnownMask(recipe, digest.hexdigest())
