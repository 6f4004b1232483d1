"""What a node of a cluster does in stage one: it encodes parts of shards with an encoder of its own.

A node reads the images itself and sends rows back in the store's own types, so it needs no place to write to. It takes
weights from where the driver has them, else from the driver.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import cache
from pipeline import encoders
from pipeline.data.dataset import Source
from pipeline.data.scan import read_again
from pipeline.encoders.known_mask.encoder import KnownMask
from pipeline.encoders.weight_files import user_folder
from pipeline.errors import ClusterError, DataError
from pipeline.extract.batch_size import BatchSize, Told, out_of_memory
from pipeline.extract.encode import Clock, Encoding
from pipeline.extract.plan import Contents

if TYPE_CHECKING:
    from pipeline.encoders.family import Reads, Shape

SAME_PATH = "every node reads the images itself, and must see them under the path that they have on this machine"


@dataclass(frozen=True)
class Plain:
    """An encoder that is loaded elsewhere: the words to build it from, and what this process must know of it.

    Attributes:
        arguments: Of `encoders.build_encoder`, without `checkpoint` and `device`.
        weights: Its file; None where it has none.
        device: `cpu`, or anything else for the GPU of whoever has one.
    """

    arguments: Mapping[str, Any]
    weights: Path | None
    device: str = "auto"

    @property
    def reads(self) -> Reads:
        """What it encodes of a sample."""
        return encoders.family_of(self.arguments["name"]).reads

    @property
    def taps(self) -> Mapping[str, Shape]:
        """Shape of each tap's map."""
        return self._recipe.shapes

    def fingerprint(self) -> dict[str, Any]:
        """Everything that its features depend on, apart from the pixels."""
        assert self.weights is not None
        return dict(self._recipe.fingerprint(encoders.weights_sha256(self.weights)))

    def build(self, weights: Path | None, device: str) -> encoders.Encoder:
        """Load it."""
        return encoders.build_encoder(**self.arguments, checkpoint=weights, device=device)

    @property
    def _recipe(self) -> encoders.Recipe:
        return encoders.make_recipe(**self.arguments)


@dataclass(frozen=True)
class Job:
    """What a worker is made from: the same for all."""

    source: Source
    plain: Plain
    contents: Contents
    files: tuple[tuple[str, npt.NDArray[np.uint8]], ...]
    threads: int
    device: str
    batch_size: int | None
    strict: bool


@dataclass(frozen=True)
class Part:
    """Rows of a shard, all of them at first, with what a worker must know to encode them.

    Attributes:
        shard: Number of the shard.
        start: Place of the first row in the shard.
        indices: Of the samples in the source.
        names: Of the samples.
        digests: uint8 (n, 32), sha256 of their pixels.
        images: In a batch.
        memory: What is remembered of the size of batches; see `BatchSize`.
    """

    shard: int
    start: int
    indices: tuple[int, ...]
    names: tuple[str, ...]
    digests: npt.NDArray[np.uint8]
    images: int
    memory: str

    def halves(self) -> Sequence[Part]:
        """Two parts, or none of a single row."""
        middle = len(self.indices) // 2
        return [self._some(0, middle), self._some(middle, len(self.indices))] if middle else []

    def _some(self, start: int, stop: int) -> Part:
        of = slice(start, stop)
        return replace(
            self,
            start=self.start + start,
            indices=self.indices[of],
            names=self.names[of],
            digests=self.digests[of],
        )

    def __str__(self) -> str:
        return f"shard {self.shard}" + (f" from row {self.start}" if self.start else "")


@dataclass(frozen=True)
class SizeFor:
    """Asks a worker how many images to encode at once.

    Attributes:
        rows: Images to encode, about.
        shard_rows: Rows of a full shard, about.
        memory: What earlier runs remember; see `BatchSize`.
    """

    rows: int
    shard_rows: int
    memory: str


@dataclass(frozen=True)
class Size:
    """Images to encode at once, as a worker has found out; also in place of a shard that did not fit into its memory.

    Attributes:
        images: In a batch at most.
        memory: To remember.
        device: Where, as people call it.
    """

    images: int
    memory: str
    device: str


@dataclass(frozen=True)
class Encoded:
    """Rows of a shard as the store has them; see `encode.Shard`. Reasons are by place in the part."""

    features: Mapping[str, npt.NDArray[Any]]
    extents: npt.NDArray[np.float32]
    bad: Mapping[int, str]
    seconds: Mapping[str, float]


class NodeEncoder:
    """Encodes parts of shards, on a node."""

    def __init__(self, job: Job) -> None:
        self._job = job
        wants_gpu = job.device == "cuda" and torch.cuda.is_available()
        self._encoder = job.plain.build(weights_here(job), "cuda" if wants_gpu else "cpu")
        if isinstance(self._encoder, KnownMask):
            self._encoder.know(str(job.contents.encoder["masks_sha256"]))
        ours = replace(job.contents, encoder=self._encoder.fingerprint()).fingerprint
        differences = job.contents.fingerprint.differences(ours)
        if differences:
            listed = "; ".join(f"{d.field} is {d.ours!r}, and {d.theirs!r} there" for d in differences)
            message = f"the encoder of a node would make other features ({listed}): give all nodes the same weights"
            raise ClusterError(message)
        self._decoders = ThreadPoolExecutor(job.threads, "decode")

    def __call__(self, asked: Part | SizeFor) -> Encoded | Size:
        """Encode a part, or choose the size of a batch."""
        if isinstance(asked, SizeFor):
            return self._size(asked.memory, partial(_search, asked))
        job, clock = self._job, Clock()
        plan = cache.ShardPlan(asked.shard, tuple(range(len(asked.indices))))
        encoding = Encoding(
            self._encoder,
            partial(self._read, asked),
            asked.names,
            job.contents,
            Told(asked.images),
            job.threads,
            strict=job.strict,
            clock=clock,
        )
        try:
            shard = encoding.encode(plan, self._decoders)
        except RuntimeError as error:
            if not out_of_memory(error) or asked.images == 1:
                raise
            return self._size(asked.memory, lambda sizes: sizes.halve(asked.images))
        return Encoded(shard.features, shard.extents, shard.bad, clock.seconds)

    def _read(self, part: Part, place: int) -> npt.NDArray[Any]:
        """What the encoder reads of a row."""
        index, sample = part.indices[place], part.names[place]
        try:
            if self._encoder.reads == "image":
                return read_again(self._job.source, index, part.digests[place].tobytes(), sample)
            mask = self._job.source.mask(index)
        except DataError as error:
            error.add_note(SAME_PATH)
            raise
        if mask is None:
            message = f"sample {sample!r} has no mask: give it one, or leave it out of the data set"
            raise DataError(message)
        return mask

    def _size(self, memory: str, change: Callable[[BatchSize], object]) -> Size:
        """The size of a batch after a change to it; the memory lies in a file for as long as that takes."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "batch.json")
            file.write_text(memory)
            sizes = BatchSize(self._encoder, self._job.batch_size, file)
            change(sizes)
            device = self._encoder.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
            return Size(sizes.most, file.read_text(), name)


def _search(asked: SizeFor, sizes: BatchSize) -> None:
    """Choose the size of a batch."""
    sizes.fit(asked.shard_rows)
    sizes.search(asked.rows)


def files_of(weights: Path | None) -> tuple[tuple[str, npt.NDArray[np.uint8]], ...]:
    """A file of weights, and the description that some have beside them, as a node takes them over."""
    if weights is None:
        return ()
    files = [weights, *(file for file in [weights.with_name("config.json")] if file.is_file())]
    return tuple((file.name, np.fromfile(file, np.uint8)) for file in files)


def weights_here(job: Job) -> Path | None:
    """The file of weights on this node: where the driver has it, else a copy of what came from there."""
    weights = job.plain.weights
    if weights is None or not job.files:
        return weights
    if weights.is_file() and weights.stat().st_size == len(job.files[0][1]):
        return weights
    digest = str(job.contents.encoder.get("weights_sha256", "weights"))
    folder = user_folder() / "weights" / "from_driver" / digest
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in job.files:
        if not (folder / name).is_file():
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(content.data)
            Path(file.name).replace(folder / name)
    return folder / job.files[0][0]
