"""Repair of a store: exactly its damaged rows go through the encoder again, from images that have not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cache
from pipeline import image_tap
from pipeline.data import Dataset, Image, Mask, pixel_digest
from pipeline.encoders.known_mask.encoder import KnownMask
from pipeline.errors import DataError
from pipeline.extract.batch_size import BatchSize
from pipeline.extract.encode import Clock, Encoding
from pipeline.extract.extract import ExtractReport
from pipeline.extract.plan import Contents, mask_of, masks_sha256
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
        source = _Source(writer.rows, dataset, path)
        if isinstance(encoder, KnownMask):
            encoder.check(dataset.name, dataset.mask(0))
            encoder.know(masks_sha256(source.mask, names, workers=workers, progress=progress))
        dtype = _dtype_of(writer.identity, path)
        image_px = image_tap.stored_px(cache.taps_of(writer.identity.taps))
        ours = Contents(encoder.fingerprint(), encoder.taps, reading, dtype, image_px)
        differences = writer.identity.fingerprint.differences(ours.fingerprint)
        if differences:
            listed = "; ".join(f"{d.field} is {d.ours!r} there, {d.theirs!r} here" for d in differences)
            message = f"{path} was made with other settings ({listed}); repair it with its own configuration"
            raise cache.FingerprintMismatchError(message, differences)
        sizes = BatchSize(encoder, batch_size, path.with_name(path.name + ".batch.json"))
        encoding = Encoding(
            encoder,
            source.mask if encoder.reads == "mask" else source.image,
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


def _dtype_of(identity: Any, path: Path) -> str:
    """The type that the encoder's features were stored as; an encoder cannot give what a conversion made of them."""
    fields = identity.fingerprint.fields
    roundings = cache.Roundings(str(fields.get("dtype", "float16")))
    if len(roundings.steps) > 1:
        message = (
            f"{path} was converted: its features are {roundings.said}, which no encoder gives; repair the store that "
            f"it was made from, and convert that again"
        )
        raise cache.StoreError(message)
    return roundings.said


@dataclass(frozen=True)
class _Source:
    """What the rows of a store were made from, and nothing else."""

    rows: Sequence[cache.Row]
    dataset: Dataset
    path: Path

    @cached_property
    def _index_of(self) -> Mapping[str, int]:
        return {sample.id: index for index, sample in enumerate(self.dataset.samples)}

    def _index(self, row: int) -> int:
        name = self.rows[row].id
        if name not in self._index_of:
            message = f"{self.path}: sample {name!r} of the store is not in {self.dataset.name!r}"
            raise DataError(message)
        return self._index_of[name]

    def image(self, row: int) -> Image:
        """Decoded image of a row."""
        pixels, wanted = self.dataset.read(self._index(row)), self.rows[row]
        if any(wanted.digest) and pixel_digest(pixels) != wanted.digest:
            message = f"{self.path}: sample {wanted.id!r} is damaged and its image has changed; run `pipeline extract`"
            raise DataError(message)
        return pixels

    def mask(self, row: int) -> Mask:
        """Mask of a row's sample; that none has changed is told by the fingerprint."""
        return mask_of(self.dataset, self._index(row))
