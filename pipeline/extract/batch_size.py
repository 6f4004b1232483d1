"""How many images the encoder takes at once: measured on a GPU before long runs, else by input size.

On a CPU a batch of 1024 x 1024 pixels fills the cores, and larger ones pay nothing: `sam_demo` at 256 px took 12.0,
12.5 and 12.8 ms an image in batches of 4, 16 and 64. On a GPU the largest batch that pays is searched for, but only
where tens of thousands of images wait: blocks are compiled anew for each size that is tried. That part, and the size
that shorter runs on a GPU take, have not been measured on one.

Shards are encoded one by one, and a short batch is filled up. So a full shard is cut into batches as equal as whole
images allow: 409 rows, of which 256 may go at once, are two batches of 205. In batches of 256 the network would see 512
images, and 256 for a shard of 25 rows.

The last bits of a feature depend on the size of the batch, so that depends on nothing but the rows of a full shard and
how many images may go at once: never on how many wait. The latter is kept in `NAME.batch.json` beside the store, and
every later run and every process of this run takes the same.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import cache
from pipeline.errors import naming

if TYPE_CHECKING:
    from pipeline.encoders import Encoder

CPU_BATCH, GPU_BATCH = 1, 16  # at 1024 px; other inputs take as many more as they have fewer pixels
LARGEST_BATCH = 256
PAYS = 1.03  # a batch of twice the size must be faster by this much an image
SEARCH_FROM_IMAGES = 20_000  # at 1024 px: a quarter of an hour and more on today's devices


class BatchSize:
    """How many images the encoder takes at once.

    Args:
        encoder: Whose batches they are.
        given: What a person allowed; it is halved where memory demands it, like any other size.
        memory: File that remembers what was chosen and what memory forced.

    Attributes:
        most: Images at once at most, whatever the shards.
    """

    def __init__(self, encoder: Encoder, given: int | None, memory: Path) -> None:
        self._encoder, self._given, self._memory = encoder, given, memory
        self._device = encoder.device
        self._per_1024_px = (1024 / encoder.input_px) ** 2
        at_1024_px = CPU_BATCH if self._device.type == "cpu" else GPU_BATCH
        self._fitting = max(1, min(LARGEST_BATCH, int(at_1024_px * self._per_1024_px)))
        self._shard_rows: int | None = None
        self.recall()

    def recall(self) -> None:
        """Take what the file says, if it is about this encoder on this kind of device, else the size that fits."""
        try:
            known = json.loads(self._memory.read_text())
            known = known if all(known[key] == value for key, value in self._key().items()) else {}
            chosen, limit = int(known.get("chosen", 0)), int(known.get("limit", LARGEST_BATCH))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            chosen, limit = 0, LARGEST_BATCH  # nothing is remembered
        self._chosen, self._limit = max(0, chosen), max(1, limit)
        self.most = min(self._given or self._chosen or self._fitting, self._limit)

    @property
    def images(self) -> int:
        """Images in a batch."""
        return evenly(self.most, self._shard_rows)

    def fit(self, shard_rows: int) -> None:
        """Make equal batches of the rows of a full shard; of several times the last one counts."""
        self._shard_rows = shard_rows

    def search(self, rows: int, seconds: Callable[[int], float] | None = None) -> None:
        """Find the largest size that pays, and remember it; nothing happens where that would not.

        Only sizes are tried that full shards, of the rows said before, are encoded in.

        Args:
            rows: Images to encode, about.
            seconds: Time of one batch of a size, raising where memory ends; None measures it on the device.
        """
        needless = self._given or self._chosen or rows < SEARCH_FROM_IMAGES * self._per_1024_px
        if needless or (seconds is None and self._device.type != "cuda"):
            return
        allowed = (min(2**power, self._limit) for power in range(self._limit.bit_length() + 1))
        choice = sorted({evenly(most, self._shard_rows) for most in allowed})
        start = evenly(max(1, self._fitting // 4), self._shard_rows)
        self._chosen = self.most = largest_that_pays(seconds or self._measure, choice, start)
        self._remember()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def halve(self, images: int | None = None) -> bool:
        """Take half as many from now on, in later runs too; False if one image is too many already.

        Args:
            images: How many were too many; None for a batch of today's size.
        """
        images = images or self.images
        if images == 1:
            return False
        self._limit = min(self._limit, math.ceil(images / 2))
        self.most = min(self.most, self._limit)
        self._remember()
        if self._device.type == "cuda":
            torch.compiler.reset()  # graphs of the size before count against the compiler's limit
        return True

    def _measure(self, images: int) -> float:
        """Seconds of a batch on the device, compiled for its size."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.compiler.reset()  # graphs of the sizes before count against the compiler's limit
        side = self._encoder.input_px
        pixels = torch.zeros(images, 3, side, side, dtype=torch.uint8, device=self._device)
        sizes = torch.full((images, 2), side)
        best = float("inf")
        for turn in range(4):
            if on_gpu:
                torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            self._encoder.encode(pixels, sizes)
            if on_gpu:
                torch.cuda.synchronize(self._device)
            if turn:  # the first one compiles
                best = min(best, time.perf_counter() - start)
        return best

    def _key(self) -> dict[str, str]:
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        return {"device": name, "encoder": cache.Fingerprint(self._encoder.fingerprint()).digest()}

    def _remember(self) -> None:
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        with naming(self._memory):
            self._memory.write_text(json.dumps({**self._key(), "chosen": self._chosen, "limit": self._limit}))


class Told:
    """A size that somebody else has chosen, who hears of it where it is too large."""

    def __init__(self, images: int) -> None:
        """Take it."""
        self.images = images

    def recall(self) -> None:
        """Keep it."""

    def fit(self, shard_rows: int) -> None:
        """Keep it."""

    def search(self, rows: int) -> None:
        """Keep it."""

    def halve(self) -> bool:
        """Keep it: others encode in batches of this size, too."""
        return False


def evenly(most: int, rows: int | None) -> int:
    """Size of the batches that rows are encoded in: as equal as whole images allow, and `most` at most.

    Args:
        most: Images at once at most.
        rows: How many there are; None where that is not known, and `most` is taken.
    """
    return most if rows is None else math.ceil(rows / math.ceil(rows / most))


def largest_that_pays(seconds: Callable[[int], float], sizes: Sequence[int], start: int) -> int:
    """Take the next larger size of a batch while that makes an image faster by `PAYS` and memory suffices.

    Args:
        seconds: Time of one batch of a size, raising where memory ends.
        sizes: To choose from, ascending, each about twice the one before.
        start: The first size tried is the first one that is no smaller; if it does not fit, those below it.
    """
    place = min(bisect_left(sizes, start), len(sizes) - 1)
    speed = _speed(seconds, sizes[place])
    if speed is None:
        return largest_that_pays(seconds, sizes[:place], sizes[place - 1]) if place else sizes[0]
    best = sizes[place]
    for size in sizes[place + 1 :]:
        try:
            faster = _speed(seconds, size)
        except RuntimeError:
            break  # not for lack of memory: some kernels count elements in 32 bits, and a smaller size works
        if faster is None or faster < PAYS * speed:
            break
        best, speed = size, faster
    return best


def _speed(seconds: Callable[[int], float], images: int) -> float | None:
    """Images a second, None where memory does not suffice."""
    try:
        return images / seconds(images)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a smaller batch may succeed, whoever was refused memory: torch or a library below."""
    said = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )
