"""Repair of a store: exactly its damaged rows go through the encoder again, from images that have not changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cache
from pipeline import image_tap, mask_tap
from pipeline.data import Dataset, Image, pixel_digest
from pipeline.errors import DataError
from pipeline.extract.batch_size import BatchSize
from pipeline.extract.encode import Clock, Encoding
from pipeline.extract.extract import ExtractReport
from pipeline.extract.plan import Contents
from pipeline.progress import Progress, silent

if TYPE_CHECKING:
    from pipeline.encoders import Encoder


def repair(
    dataset: Dataset,
    encoder: Encoder,
    path: Path,
    *,
    reading: Mapping[str, Any],
    workers: int = 2,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> ExtractReport:
    """Encode exactly the damaged rows of a store again; the result has the bytes it had before.

    Args:
        dataset: The images that the store was made from.
        encoder: The encoder that it was made with.
        path: The store.
        reading: See `Contents`.
        workers: Decoding threads.
        batch_size: Images per encoder call; see `extract`.
        progress: Called after each batch.

    Raises:
        DataError: A damaged row's image is not in the data set any more, or has other pixels.
        cache.StoreError: The encoder is another one, or the store is beyond repair.
    """
    clock = Clock()
    with clock("total"), cache.repair_store(path) as writer:
        names = [row.id for row in writer.rows]
        if writer.identity is None:
            return ExtractReport(path, len(names), 0, len(names), {}, clock.seconds)
        taps = cache.taps_of(writer.identity.taps)
        dtype = next((taps[tap].dtype for tap in mask_tap.features_of(taps)), "float16")
        image_px = image_tap.stored_px(taps)
        ours = Contents(encoder.fingerprint(), encoder.taps, reading, dtype, image_px)
        differences = writer.identity.fingerprint.differences(ours.fingerprint)
        if differences:
            listed = "; ".join(f"{d.field} is {d.ours!r} there, {d.theirs!r} here" for d in differences)
            message = f"{path} was made with other settings ({listed}); repair it with its own configuration"
            raise cache.FingerprintMismatchError(message, differences)
        sizes = BatchSize(encoder, batch_size, path.with_name(path.name + ".batch.json"))
        image = _images_of(writer.rows, dataset, path)
        encoding = Encoding(
            encoder,
            image,
            names,
            ours,
            sizes,
            workers,
            strict=True,
            clock=clock,
            progress=progress,
        )
        encoding.run(writer)
        writer.commit().close()
    return ExtractReport(path, len(names), encoding.encoded, len(names) - encoding.encoded, {}, clock.seconds)


def _images_of(rows: Sequence[cache.Row], dataset: Dataset, path: Path) -> Callable[[int], Image]:
    """Reads the image that a row was made from, and no other."""
    index_of = {sample.id: index for index, sample in enumerate(dataset.samples)}

    def image(row: int) -> Image:
        wanted = rows[row]
        if wanted.id not in index_of:
            message = f"{path}: sample {wanted.id!r} is damaged and its image is not in {dataset.name!r}"
            raise DataError(message)
        pixels = dataset.read(index_of[wanted.id])
        if any(wanted.digest) and pixel_digest(pixels) != wanted.digest:
            message = f"{path}: sample {wanted.id!r} is damaged and its image has changed; run `pipeline extract`"
            raise DataError(message)
        return pixels

    return image
