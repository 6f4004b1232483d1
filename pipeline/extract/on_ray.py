"""Stage one on a Ray cluster: nodes look at images and encode shards, this process plans, writes and commits.

Two shards a worker are on their way at most; that bounds what waits here. Each image is decoded twice, by the scan and
by the encoder: the pixels of a cluster's data sets fit into nobody's memory. The bytes are those of one process. What
happens on a node is `on_node`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import cache
from pipeline.cluster import Cluster, Lost, Need, Pool, hired
from pipeline.data import Dataset
from pipeline.data.scan import Looked, Looker
from pipeline.errors import ClusterError, DataError, naming
from pipeline.extract.batch_size import evenly
from pipeline.extract.encode import Clock, report_encoding
from pipeline.extract.on_node import SAME_PATH, Encoded, Job, NodeEncoder, Part, Plain, Size, SizeFor, files_of
from pipeline.extract.plan import Contents, Rows
from pipeline.overlap import threads
from pipeline.progress import Progress

_SLICE = 256  # images that a worker looks at before it reports, at most
_SLICES = 64  # that a scan has at least, so that many workers share it


@dataclass(frozen=True)
class OnRay:
    """A cluster that does the work of stage one in place of this process.

    Attributes:
        cluster: Where.
        plain: The encoder.
        need: What a worker takes of a node.
        threads: Decoding threads of a worker; None for one for each of its processors.
        batch_size: Images per encoder call at most; None chooses, on a worker.
        strict: Stop at a bad image.
    """

    cluster: Cluster
    plain: Plain
    need: Need
    threads: int | None = None
    batch_size: int | None = None
    strict: bool = False
    tell: Callable[[str], None] = lambda said: None

    def look(self, dataset: Dataset, indices: Sequence[int]) -> Iterator[Looked]:
        """Look at images on the nodes, in slices; see `pipeline.data.scan.Look`.

        Raises:
            DataError: A node cannot read an image that this machine can.
        """
        if not indices:
            return
        size = min(_SLICE, math.ceil(len(indices) / _SLICES))
        slices = (tuple(indices[k : k + size]) for k in range(0, len(indices), size))
        cpus = min(1.0, self.need.cpus or 1.0)
        most = None if self.need.max is None else math.ceil(self.need.max * (self.need.cpus or 1.0) / cpus)
        need = Need(0.0, cpus, 1, most)
        look = partial(Looker, dataset.source, self.threads or 1)
        with hired(self.cluster, look, need=need, name="scan", tell=self.tell) as pool:
            for outcome in pool.map(slices, split=_halves, named=lambda part: f"images {part[0]} to {part[-1]}"):
                if isinstance(outcome, Lost):
                    (index,) = outcome.item
                    yield Looked(index, error=DataError(f"{dataset.samples[index].id}: {outcome.reason}"))
                    continue
                digests, reasons = outcome.result
                for place, index in enumerate(outcome.item):
                    if index in reasons:
                        yield Looked(index, error=_read_here(dataset, index, reasons[index], outcome.node))
                    else:
                        yield Looked(index, digests[place].tobytes())

    def encoding(
        self, dataset: Dataset, rows: Rows, contents: Contents, memory: Path, clock: Clock, progress: Progress
    ) -> RayEncoding:
        """What encodes the shards of a store in place of `Encoding`.

        Args:
            dataset: The samples.
            rows: Of the store.
            contents: Of the store.
            memory: The file that remembers the size of batches; see `BatchSize`.
            clock: Where the time goes.
            progress: Called after each shard.
        """
        need = self.cluster.settled(replace(self.need, gpus=0.0) if self.plain.device == "cpu" else self.need)
        job = Job(
            source=dataset.source,
            plain=self.plain,
            contents=replace(contents, encoder=dict(contents.encoder), shapes=dict(contents.shapes)),
            files=() if self.cluster.local else files_of(self.plain.weights),
            threads=self.threads or max(1, min(16, round(need.cpus or 1.0))),
            device="cuda" if need.gpus else "cpu",
            batch_size=self.batch_size,
            strict=self.strict,
        )
        return RayEncoding(self, job, need, rows, memory, clock, progress)


class _Sizes:
    """How many images the encoder takes at once, as a worker chooses and everyone then does.

    Attributes:
        known: What is remembered of that, as text; see `BatchSize`.
        device: Where a worker encodes, as people call it.
    """

    def __init__(self, ask: Callable[[SizeFor], Size], memory: Path) -> None:
        self._ask, self._memory = ask, memory
        self._most, self._shard_rows = 0, 1
        self.known, self.device = "", ""

    @property
    def images(self) -> int:
        """Images in a batch."""
        return evenly(self._most, self._shard_rows)

    def fit(self, shard_rows: int) -> None:
        """Make equal batches of the rows of a full shard."""
        self._shard_rows = shard_rows

    def search(self, rows: int) -> None:
        """Have a worker choose."""
        with suppress(OSError):
            self.known = self._memory.read_text()
        self.take(self._ask(SizeFor(rows, self._shard_rows, self.known)))

    def take(self, size: Size) -> None:
        """Do as a worker says, and remember it; never more at once than another one had room for."""
        self.device = size.device
        if self._most and size.images > self._most:
            return  # it has tried an older size
        self._most = size.images
        if size.memory != self.known:
            self.known = size.memory
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with naming(self._memory):
                self._memory.write_text(size.memory)


@dataclass
class _Gathering:
    """The parts of a shard that have come back."""

    plan: cache.ShardPlan
    parts: list[tuple[int, Encoded]] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    rows: int = 0

    def whole(self, contents: Contents) -> tuple[Mapping[str, npt.NDArray[Any]], npt.NDArray[np.float32]]:
        """Arrays and extents of all rows; those of a single part as they are."""
        if len(self.parts) == 1 and len(self.parts[0][1].extents) == len(self.plan.rows):
            return self.parts[0][1].features, self.parts[0][1].extents
        rows = len(self.plan.rows)
        arrays = cache.arrays_of(contents.taps)
        features = {name: np.zeros((rows, *array.shape), array.array_dtype) for name, array in arrays.items()}
        extents = np.ones((rows, 2), np.float32)
        for start, part in self.parts:
            of = slice(start, start + len(part.extents))
            extents[of] = part.extents
            for name, values in part.features.items():
                features[name][of] = values
        return features, extents


class RayEncoding:
    """Encodes shards of a store on a cluster; has the part of `Encoding` that `extract` uses.

    Attributes:
        sizes: Images per encoder call.
        clock: Where the time went; the encoder's own parts are those of all workers, added up.
        progress: Called after each shard.
        encoded: Images that went through the encoder.
        nodes: What each node did, once all is done.
    """

    def __init__(
        self, on: OnRay, job: Job, need: Need, rows: Rows, memory: Path, clock: Clock, progress: Progress
    ) -> None:
        """Prepare; the first worker is asked for when the size of a batch is."""
        self._on, self._job, self._need, self._rows = on, job, need, rows
        self.clock, self.progress = clock, progress
        self.sizes = _Sizes(self._ask, memory)
        self.encoded = 0
        self.nodes: list[dict[str, Any]] = []
        self._open = ExitStack()
        self._pool: Pool[Part | SizeFor, Encoded | Size] | None = None
        self._images: dict[str, int] = {}
        self._gathering: dict[int, _Gathering] = {}

    @property
    def workers(self) -> int:
        """Decoding threads of a worker."""
        return self._job.threads

    @property
    def device(self) -> str:
        """Where it encoded, as people call it."""
        workers = sum(node["workers"] for node in self.nodes)
        return f"{workers} x {self.sizes.device} on {len(self.nodes)} nodes"

    def run(self, writer: cache.StoreWriter | cache.StoreWorker) -> None:
        """Have every pending shard encoded, and write each when it comes back."""
        total = sum(len(plan.rows) for plan in writer.pending)
        began = time.perf_counter()
        report = partial(report_encoding, self.progress, self._job.contents, total, began)
        report(0)
        self.sizes.fit(writer.shard_rows)
        todo: Iterable[Part] = map(self._whole, writer.pending)
        plans = {plan.number: plan for plan in writer.pending}
        done = 0
        with self._open, threads(1, "write") as writers:
            writing: Future[None] | None = None
            while True:
                too_large: list[Part] = []
                for part, encoded in self._outcomes(todo, too_large):
                    done += len(part.indices)
                    gathered = self._gather(plans[part.shard], part, encoded)
                    del encoded
                    report(done, workers=self._workers.size)
                    if gathered is None:
                        continue
                    with self.clock("wait for write"):
                        if writing is not None:
                            writing.result()
                        writing = writers.submit(self._write, writer, gathered)
                    del gathered
                if not too_large:
                    break
                todo = [replace(part, images=self.sizes.images, memory=self.sizes.known) for part in too_large]
            with self.clock("wait for write"):
                if writing is not None:
                    writing.result()
            self._settle(time.perf_counter() - began)

    def _outcomes(self, parts: Iterable[Part], too_large: list[Part]) -> Iterator[tuple[Part, Encoded | str]]:
        """Parts with what came of each; those that did not fit into a worker's memory are collected instead."""
        for outcome in self._workers.map(parts, split=_split, named=str):
            part = outcome.item
            assert isinstance(part, Part)
            if isinstance(outcome, Lost):
                yield part, outcome.reason
            elif isinstance(outcome.result, Size):
                self.sizes.take(outcome.result)
                too_large.append(part)
            else:
                self._images[outcome.node] = self._images.get(outcome.node, 0) + len(part.indices)
                self.encoded += len(part.indices)
                for what, seconds in outcome.result.seconds.items():
                    self.clock.add(what, seconds)
                yield part, outcome.result

    def _gather(self, plan: cache.ShardPlan, part: Part, encoded: Encoded | str) -> _Gathering | None:
        """Put a part to the others of its shard; the shard once it is whole.

        Raises:
            DataError: The run is strict, and the image took its workers with it.
        """
        shard = self._gathering.setdefault(plan.number, _Gathering(plan))
        shard.rows += len(part.indices)
        if isinstance(encoded, str):
            if self._job.strict:
                message = f"sample {part.names[0]!r}: {encoded}; without --strict such images are set aside"
                raise DataError(message)
            shard.bad[plan.rows[part.start]] = encoded
        else:
            shard.parts.append((part.start, encoded))
            shard.bad |= {plan.rows[part.start + place]: reason for place, reason in encoded.bad.items()}
        return self._gathering.pop(plan.number) if shard.rows == len(plan.rows) else None

    def _write(self, writer: cache.StoreWriter | cache.StoreWorker, shard: _Gathering) -> None:
        with self.clock("write"):
            features, extents = shard.whole(self._job.contents)
            writer.write(shard.plan, features, extents, shard.bad)

    def _whole(self, plan: cache.ShardPlan) -> Part:
        """A shard as a single part."""
        indices, names, digests = self._rows.samples_of(plan.rows)
        return Part(plan.number, 0, indices, names, digests, self.sizes.images, self.sizes.known)

    def _ask(self, question: SizeFor) -> Size:
        (outcome,) = self._workers.map([question], named=lambda item: "the size of a batch")
        if isinstance(outcome, Lost) or not isinstance(outcome.result, Size):
            reason = outcome.reason if isinstance(outcome, Lost) else "it gave no answer"
            message = f"no worker could say how many images fit into a batch: {reason}; set resources.batch_size"
            raise ClusterError(message)
        return outcome.result

    @property
    def _workers(self) -> Pool[Part | SizeFor, Encoded | Size]:
        """The pool, hired when it is first asked for."""
        if self._pool is None:
            on = self._on
            self._pool = self._open.enter_context(
                hired(on.cluster, partial(NodeEncoder, self._job), need=self._need, name="encode", tell=on.tell)
            )
        return self._pool

    def _settle(self, seconds: float) -> None:
        """Say what each node did."""
        for share in self._workers.shares:
            images = self._images.get(share.node, 0)
            self.nodes.append(
                {
                    "node": share.node,
                    "workers": share.workers,
                    "died": share.died,
                    "images": images,
                    "images_per_s": images / max(seconds, 1e-9),
                    "busy_seconds": share.busy_seconds,
                    "waiting_seconds": share.waiting_seconds,
                }
            )


def _split(item: Part | SizeFor) -> Sequence[Part | SizeFor]:
    return item.halves() if isinstance(item, Part) else []


def _halves(indices: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    middle = len(indices) // 2
    return [indices[:middle], indices[middle:]] if middle else []


def _read_here(dataset: Dataset, index: int, reason: str, node: str) -> DataError:
    """Why an image cannot be read, as this machine says it.

    Raises:
        DataError: Here it can be read.
    """
    try:
        dataset.read(index)
    except DataError as error:
        return error
    message = f"node {node} cannot read an image that this machine can: {reason}"
    of_node = DataError(message)
    of_node.add_note(SAME_PATH)
    raise of_node
