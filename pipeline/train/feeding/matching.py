"""Which row of a store belongs to which sample: the one of its id, or the one made from its pixels where ids differ.

And why a sample has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cache import Store, are_pseudonyms
from pipeline.data import Dataset, pixel_digest
from pipeline.errors import DataError
from pipeline.overlap import ahead
from pipeline.progress import Progress, silent

NOWHERE = -1  # the store has no row for a sample
_TRIED = 1000  # missing samples whose images are read to say why they are missing


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


def why_missing(dataset: Dataset, indices: Sequence[int], store: Store) -> str:
    """Say which samples that a store lacks cannot be encoded and which never were, and what to do about each."""
    reasons = {index: reason for index in indices[:_TRIED] if (reason := _why_refused(dataset, index, store))}
    unseen = [repr(dataset.samples[index].id) for index in indices if index not in reasons]
    if unseen and are_pseudonyms(store.ids):
        return (
            f"its ids are pseudonyms, so only the key's owner knows whose its rows are. Use the labels that travel "
            f"with it: `data: {{layout: store, path: {store.path}}}`."
        )
    said = []
    if reasons:
        index, reason = next(iter(reasons.items()))
        said.append(
            f"{len(reasons)} were set aside, as {dataset.samples[index].id!r} ({reason}): leave them out with "
            f"`--set train.allow_missing=true`, or mend the files and run `pipeline extract`."
        )
    if unseen:
        said.append(
            f"{len(unseen)} were never encoded ({', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}): run "
            f"`pipeline extract`, or leave them out with `--set train.allow_missing=true`."
        )
    return " ".join(said)


def _why_refused(dataset: Dataset, index: int, store: Store) -> str:
    """Why stage one has set a sample aside, or would; empty where it has not."""
    recorded = store.set_aside.get(dataset.samples[index].id, "")  # what the encoder refused
    if recorded:
        return recorded
    try:
        dataset.read(index)
    except DataError as error:
        return str(error)
    return ""
