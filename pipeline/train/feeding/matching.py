"""Which row of a store belongs to which sample: the one of its id, or the one made from its pixels where ids differ."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cache import Store
from pipeline.data import Dataset, pixel_digest
from pipeline.errors import DataError
from pipeline.overlap import ahead
from pipeline.progress import Progress, silent

NOWHERE = -1  # the store has no row for a sample


def match_rows(
    dataset: Dataset, indices: Sequence[int], store: Store, *, workers: int = 2, progress: Progress = silent
) -> npt.NDArray[np.int64]:
    """Find the row of each sample, so that a store made elsewhere serves whoever has the images, under any file names.

    Images are decoded only where an id is unknown and the store still has the digests of its pixels: copies with
    pseudonyms have neither.

    Args:
        dataset: The samples.
        indices: Which of them to look for.
        store: Where to look.
        workers: Decoding threads.
        progress: Called after each image that has to be decoded.

    Returns:
        (len(indices),) rows of the store, `NOWHERE` where it has none.
    """
    row_of = {sample_id: row for row, sample_id in enumerate(store.ids)}
    rows = np.array([row_of.get(dataset.samples[i].id, NOWHERE) for i in indices], np.int64)
    unknown = np.flatnonzero(rows == NOWHERE)
    if not len(unknown) or not len(store.digests):
        return rows
    row_from = {digest.tobytes(): row for row, digest in enumerate(store.digests)}

    def look(place: int) -> int:
        try:
            image = dataset.read(indices[place])
        except DataError:
            return NOWHERE  # set aside by stage one, too
        return row_from.get(pixel_digest(image), NOWHERE)

    with ThreadPoolExecutor(workers, "match") as pool:
        found = ahead(look, unknown.tolist(), pool, depth=4 * workers)
        for done, (place, row) in enumerate(zip(unknown, found, strict=True), start=1):
            rows[place] = row
            progress("match", done, len(unknown))
    return rows
