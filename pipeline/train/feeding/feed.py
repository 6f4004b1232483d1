"""What a training step eats: images and features of a batch, from where they fit.

A split's features and decoded images live on the device if they fit there, else in host memory, else they are read from
the store's mapped shards ahead of the step. Reading ahead hides the disk but costs a thread; on the CPU, where that
thread would take a core from the step, what is in memory is gathered in the step's own thread.

A store that holds images of the very side that is wanted spares decoding, and a classifier of features alone reads
none. An image is always one of a file resized once, never a stored one resized again. What a file holds by now goes
unnoticed then, until stage one runs again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache import Store
from pipeline.data import Dataset, Image, Split, pixel_digest
from pipeline.data.resize import squared
from pipeline.errors import RunError
from pipeline.image_tap import IMAGE, stored_px
from pipeline.mask_tap import features_of, is_masks, others_of
from pipeline.overlap import ahead
from pipeline.progress import Progress, silent
from pipeline.train.feeding.in_memory import Held, Holdings, free_host_bytes
from pipeline.train.feeding.matching import NOWHERE, match_rows, why_missing
from pipeline.train.feeding.packed import arrays_read, as_numpy, unpacked

Place = Literal["auto", "device", "host", "stream"]
_AHEAD = 2  # batches read before they are asked for
_SHARE = 0.6  # of free memory that one split may take; the rest is for the step itself


@dataclass(frozen=True)
class Batch:
    """What one step works on, all on the device.

    Attributes:
        positions: (B,) int64 on the CPU, places of the samples in the feed.
        images: (B, 3, S, S) uint8; None where none are fed.
        features: Tap to (B, C, h, w), of the type of the store's numbers (`cache.TapSpec.numbers`).
        extents: (B, 2) float32, the part of the features' grid that is image; None where all of it is.
        labels: (B,) or (B, K) int64.
    """

    positions: Tensor
    images: Tensor | None
    features: dict[str, Tensor]
    extents: Tensor | None
    labels: Tensor


def check_taps(store: Store, taps: Sequence[str]) -> None:
    """Refuse a store that lacks a tap, or that calls something masks which is no map of them.

    Raises:
        RunError: It does.
    """
    known = [*features_of(store.taps), *others_of(store.taps)]
    absent = [tap for tap in taps if tap not in known]
    if absent:
        msg = (
            f"{str(store.path)!r} holds no tap {absent[0]!r}, only {', '.join(known)}: extract it (encoder.taps, then "
            f"`pipeline extract --replace`), or change the "
            f"{'views' if '@' in absent[0] else 'gates, model.fuse, model.overlay or --tap'}."
        )
        raise RunError(msg)
    for tap in taps:
        spec = store.taps[tap]
        if is_masks(tap) and (spec.dtype, spec.channels) != ("uint8", 1):
            msg = (
                f"The tap {tap!r} of {str(store.path)!r} is {spec.dtype} of {spec.channels} channels, and a map of "
                f"masks is uint8 of 1: it holds no masks; name another tap, or extract masks (encoder.taps: [masks])."
            )
            raise RunError(msg)


class Feed:
    """The samples of one split that can be trained on or scored.

    Args:
        dataset: Where images and labels come from.
        split: The split to feed.
        store: Where features come from; None for the plain classifier.
        taps: The taps to read.
        image_px: Side to which images are resized once, with smoothing; None to feed features alone, whose images are
            then never read.
        device: Where batches go.
        place: Where data wait: chosen from the sizes, or forced.
        workers: Decoding threads.
        allow_missing: Leave out samples that the store does not hold, instead of refusing.
        among: Samples of the split to feed, ascending positions in the data set; None for all of them.
        holdings: What other feeds have loaded already, and where this one leaves what it loads; None to share nothing.
        progress: Called while images are decoded.

    Attributes:
        ids: Sample ids, in the data set's order.
        labels: (n,) or (n, K) int64.
        classes: K, how many there are.
        groups: Group of each sample.
        rows: (n,) int64, the row of each sample in the store; zeros without one.
        images_stored: Whether images come from the store: it has them in the very side that is wanted.
        description: One line: how many samples, how large, where they wait.
        waited_seconds: Time that `batches` kept its caller waiting, in total.

    Raises:
        RunError: The store lacks samples or a tap, was made from other pixels, or the place is too small.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        store: Store | None,
        *,
        taps: Sequence[str],
        image_px: int | None,
        device: torch.device,
        place: Place = "auto",
        workers: int = 2,
        allow_missing: bool = False,
        among: Sequence[int] | None = None,
        holdings: Holdings | None = None,
        progress: Progress = silent,
    ) -> None:
        self.device, self.waited_seconds = device, 0.0
        self._dataset, self.split, self._image_px, self._workers = dataset, split, image_px, workers
        self._store = store if taps else None
        self._taps = tuple(taps)
        self._all = dataset.indices(split) if among is None else list(among)
        self._indices, self.rows = self._match(allow_missing, progress)
        self.images_stored = self._store_has_images()
        self._digests = self._stored_digests()
        samples = [dataset.samples[i] for i in self._indices]
        self.ids = tuple(sample.id for sample in samples)
        self.groups = tuple(sample.group for sample in samples)
        self.labels: npt.NDArray[np.int64] = np.asarray(dataset.labels)[self._indices]
        self.classes = len(dataset.class_names)
        self._label_tensor = torch.from_numpy(self.labels).to(device)
        self._extents = self._read_extents()
        self._holdings = holdings or Holdings()
        self._at = np.searchsorted(dataset.indices(split), self._indices)  # places of the samples in what is held
        self._place = self._choose(place)
        if self._place != "stream":
            self._target = device if self._place == "device" else torch.device("cpu")
            self._held_at = torch.from_numpy(self._at).to(self._target)
            self._images = self._hold_images(progress)
            self._features = self._hold_features()
        self.description = self._describe()

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, order: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield the batches whose positions (B,) int64 `order` lists, in that order."""
        source = self._in_turn(order) if self._place != "stream" else self._streamed(order)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self.waited_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _in_turn(self, order: Sequence[Tensor]) -> Iterator[Batch]:
        for positions in order:
            at = self._held_at[positions.to(self._target, non_blocking=True)]
            images = None if self._images is None else self._images[at]
            yield self._batch(positions, images, {name: values[at] for name, values in self._features.items()})

    def _streamed(self, order: Sequence[Tensor]) -> Iterator[Batch]:
        largest = max((len(positions) for positions in order), default=0)
        ring = [_Buffers(self, largest) for _ in range(_AHEAD + 2)]
        with ThreadPoolExecutor(self._workers, "decode") as decoders, ThreadPoolExecutor(1, "feed") as reader:

            def read(item: tuple[int, Tensor]) -> tuple[Tensor, _Buffers]:
                turn, positions = item
                buffers = ring[turn % len(ring)]
                buffers.fill(positions, decoders)
                return positions, buffers

            for positions, buffers in ahead(read, enumerate(order), reader, _AHEAD):
                images, features = buffers.send(len(positions))
                yield self._batch(positions, images, features)

    def _batch(self, positions: Tensor, images: Tensor | None, features: Mapping[str, Tensor]) -> Batch:
        at = positions.to(self.device, non_blocking=True)  # waiting for a copy would be waiting for the step before
        there = {name: values.to(self.device, non_blocking=True) for name, values in features.items()}
        return Batch(
            positions=positions,
            images=None if images is None else images.to(self.device, non_blocking=True),
            features={} if self._store is None else unpacked(self._store, self._taps, there),
            extents=None if self._extents is None else self._extents[at],
            labels=self._label_tensor[at],
        )

    def decode(self, position: int) -> Tensor:
        """Read one image from its file and resize it: (3, S, S) uint8.

        Raises:
            RunError: Its pixels are not those that the store's features were made from.
        """
        assert self._image_px is not None
        image = self._dataset.read(self._indices[position])  # (H, W, 3)
        if self._store is not None or not self._digests[position].any():
            self._see(position, self._digest(position, image))
        return squared(image, self._image_px)

    def _digest(self, position: int, image: Image) -> bytes:
        """Digest of the pixels behind a sample: as its source recorded it, else that of its image."""
        return self._dataset.recorded_digest(self._indices[position]) or pixel_digest(image)

    def pixel_digest(self, position: int) -> bytes | None:
        """Digest of the pixels of one image; None while it has not been read, as when images are read ahead."""
        return self._digests[position].tobytes() if self._digests[position].any() else None

    def read_features(self, positions: npt.NDArray[np.int64], out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Read what is stored of samples into `out`: name of the array to (B, C, h, w)."""
        if self._store is not None:
            self._store.read(self.rows[positions], taps=tuple(out), out=out)

    def stored(self, positions: Tensor, taps: Sequence[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the store holds of samples (B,) at some taps, and their extents (B, 2), without their images."""
        assert self._store is not None
        extents = None if self._extents is None else self._extents[positions.to(self.device)]
        names = arrays_read(self._store, taps)
        if self._place != "stream" and all(name in self._features for name in names):
            at = self._held_at[positions.to(self._target)]
            there = {name: self._features[name][at].to(self.device) for name in names}
            return unpacked(self._store, taps, there), extents
        features = {}
        for tap in taps:
            features[tap] = torch.from_numpy(self._store.read(self.rows[positions.numpy()], taps=(tap,))[tap])
        return {tap: feature.to(self.device) for tap, feature in features.items()}, extents

    def shapes(self) -> dict[str, tuple[tuple[int, int, int], torch.dtype]]:
        """Give shape (C, h, w) and dtype of each array that is read: the taps, and the scales of those of type int8."""
        if self._store is None:
            return {}
        specs = {name: self._store.arrays[name] for name in arrays_read(self._store, self._taps)}
        return {tap: ((s.channels, s.height, s.width), getattr(torch, s.dtype)) for tap, s in specs.items()}

    def _match(self, allow_missing: bool, progress: Progress) -> tuple[list[int], npt.NDArray[np.int64]]:
        """Find the samples that can be fed, and their rows in the store."""
        indices = self._all
        if self._store is None:
            return indices, np.zeros(len(indices), np.int64)
        check_taps(self._store, self._taps)
        rows = match_rows(self._dataset, indices, self._store, workers=self._workers, progress=progress)
        missing = [indices[i] for i in np.flatnonzero(rows == NOWHERE)]
        if missing and (not allow_missing or len(missing) == len(indices)):
            msg = (
                f"{str(self._store.path)!r} lacks {len(missing)} of {len(indices)} samples of split {self.split!r}: "
                f"{why_missing(self._dataset, missing, self._store)}"
            )
            raise RunError(msg)
        kept = np.flatnonzero(rows != NOWHERE)
        return [indices[i] for i in kept], rows[kept]

    def _store_has_images(self) -> bool:
        """Say whether the store holds images of the side that is wanted, and of which pixels they are."""
        store = self._store
        return store is not None and stored_px(store.taps) == self._image_px and len(store.digests) > 0

    def _read_extents(self) -> Tensor | None:
        if self._store is None:
            return None
        extents = torch.from_numpy(np.asarray(self._store.extents)[self.rows])
        return None if bool((extents == 1).all()) else extents.to(self.device)

    def _bytes(self) -> tuple[int, int]:
        """Count the bytes of all images and of all features."""
        features = sum(c * h * w * dtype.itemsize for (c, h, w), dtype in self.shapes().values())
        return len(self) * 3 * (self._image_px or 0) ** 2, len(self) * features

    def _choose(self, place: Place) -> Place:
        if place != "auto":
            return place
        if self.device.type == "cuda":
            free_on_device = torch.cuda.mem_get_info(self.device)[0]
            if self._lacking_bytes(self.device) <= _SHARE * free_on_device:
                return "device"
        return "host" if self._lacking_bytes(torch.device("cpu")) <= _SHARE * free_host_bytes() else "stream"

    def _lacking_bytes(self, target: torch.device) -> int:
        """Count the bytes that are not held yet on a device."""
        held = []
        if self._image_px is not None:
            held.append(self._holdings.images(self._dataset, self.split, self._image_px, target))
        if self._store is not None:
            held += [
                self._holdings.features(self._dataset, self.split, self._store, name, target) for name in self.shapes()
            ]
        return sum(len(one.lacking(self._at)) * one.row_bytes for one in held)

    def _describe(self) -> str:
        images, features = (size / 2**20 for size in self._bytes())
        left_out = len(self._all) - len(self)
        where = {"device": f"on {self.device}", "host": "in host memory", "stream": "read ahead of each step"}
        absent = f", {left_out} more are not in the store" if left_out else ""
        return (
            f"{self.split}: {len(self)} samples{absent}; images {images:.0f} MiB{self._origin()} and features "
            f"{features:.0f} MiB {where[self._place]}"
        )

    def _origin(self) -> str:
        """Say where images come from, if there is a choice."""
        side = None if self._store is None else stored_px(self._store.taps)
        if self._image_px is None:
            return " (not read)"
        if side is None:
            return ""
        if self.images_stored:
            return " (from the store)"
        return f" (decoded, as the store's have {side} px and {self._image_px} px are wanted)"

    def _hold_images(self, progress: Progress) -> Tensor | None:
        """Read or decode the images that are not held yet; returns all that are held."""
        if self._image_px is None:
            return None
        held = self._holdings.images(self._dataset, self.split, self._image_px, self._target)
        lacking = self._positions(held)
        if self.images_stored:
            self._take_stored_images(held, lacking)
            lacking = lacking[:0]

        def decode(position: int, side: int = self._image_px) -> tuple[bytes, Tensor]:
            image = self._dataset.read(self._indices[position])
            return self._digest(position, image), squared(image, side)

        with ThreadPoolExecutor(self._workers, "decode") as pool:
            decoded = ahead(decode, lacking.tolist(), pool, depth=4 * self._workers)
            for done, (position, (digest, image)) in enumerate(zip(lacking, decoded, strict=True), start=1):
                held.put(self._at[[position]], image[None], [digest])
                progress(f"decode {self.split}", done, len(lacking))
        for position, place in enumerate(self._at):
            self._see(position, held.digests[place].tobytes())
        return held.values

    def _take_stored_images(self, held: Held, lacking: npt.NDArray[np.int64], chunk: int = 256) -> None:
        """Fill what is held from the store, with the digests of the pixels that its images were made from."""
        assert self._store is not None
        assert self._image_px is not None
        digests = self._store.digests
        for start in range(0, len(lacking), chunk):
            positions = lacking[start : start + chunk]
            read = torch.empty((len(positions), 3, self._image_px, self._image_px), dtype=torch.uint8)
            rows = self.rows[positions]
            self._store.read(rows, taps=(IMAGE,), out={IMAGE: read.numpy()})
            held.put(self._at[positions], read, (digests[row].tobytes() for row in rows))

    def _hold_features(self, chunk: int = 256) -> dict[str, Tensor]:
        """Read the features that are not held yet; returns all that are held, by name of the array."""
        features = {}
        for tap, (shape, dtype) in self.shapes().items():
            assert self._store is not None
            held = self._holdings.features(self._dataset, self.split, self._store, tap, self._target)
            lacking = self._positions(held)
            for start in range(0, len(lacking), chunk):
                positions = lacking[start : start + chunk]
                read = torch.empty((len(positions), *shape), dtype=dtype)
                self._store.read(self.rows[positions], taps=(tap,), out={tap: as_numpy(read)})
                held.put(self._at[positions], read)
            features[tap] = held.values
        return features

    def _positions(self, held: Held) -> npt.NDArray[np.int64]:
        """Positions in this feed of the samples that are not held yet."""
        return np.searchsorted(self._at, held.lacking(self._at))

    def _stored_digests(self) -> npt.NDArray[np.uint8]:
        """Digests (n, 32) of the pixels that what is stored was made from; zeros where images are yet to be read."""
        store = self._store
        if store is not None and len(store.digests) and (self.images_stored or self._image_px is None):
            return np.array(store.digests[self.rows])
        return np.zeros((len(self._indices), 32), np.uint8)

    def _see(self, position: int, digest: bytes) -> None:
        """Note the digest of an image's pixels; refuse features that were made from other pixels."""
        self._digests[position] = np.frombuffer(digest, np.uint8)
        if self._store is None:
            return
        recorded = self._store.digests  # none in a copy with pseudonyms
        if len(recorded) and digest != recorded[self.rows[position]].tobytes():
            msg = (
                f"The features of sample {self.ids[position]!r} in {str(self._store.path)!r} were made from other "
                f"pixels: run `pipeline extract` again, which encodes what has changed."
            )
            raise RunError(msg)


class _Buffers:
    """Host memory of one batch, pinned for a GPU, filled in one thread and sent from another."""

    def __init__(self, feed: Feed, rows: int) -> None:
        self._feed = feed
        self._pinned = feed.device.type == "cuda"
        side = feed._image_px
        self.images = None
        if side is not None:
            self.images = torch.empty(rows, 3, side, side, dtype=torch.uint8, pin_memory=self._pinned)
        self.features = {
            tap: torch.empty((rows, *shape), dtype=dtype, pin_memory=self._pinned)
            for tap, (shape, dtype) in feed.shapes().items()
        }
        self._sent: torch.cuda.Event | None = None

    def fill(self, positions: Tensor, decoders: ThreadPoolExecutor) -> None:
        """Read a batch, once the copy of the last one has left."""
        if self._sent is not None:
            self._sent.synchronize()
        images, count, stored = self.images, len(positions), dict(self.features)
        decoded: Iterator[Tensor] = iter(())
        if images is not None and self._feed.images_stored:
            stored[IMAGE] = images
        elif images is not None:
            decoded = decoders.map(self._feed.decode, positions.tolist())
        self._feed.read_features(positions.numpy(), {name: as_numpy(part[:count]) for name, part in stored.items()})
        for place, image in enumerate(decoded):
            assert images is not None
            images[place] = image

    def send(self, count: int) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Start copying the batch to the device; on the CPU, lend the memory until the next but one batch."""
        device = self._feed.device
        images = None if self.images is None else self.images[:count].to(device, non_blocking=True)
        features = {tap: part[:count].to(device, non_blocking=True) for tap, part in self.features.items()}
        if self._pinned:
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record(torch.cuda.current_stream(device))
        return images, features
