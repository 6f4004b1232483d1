"""What `pipeline predict` does: a run or a handed-on model says of images which class they show."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch

from pipeline import data
from pipeline.cluster import Lost, Need, connected, hired
from pipeline.config.schema import Config
from pipeline.data.image import UNREADABLE
from pipeline.errors import DataError
from pipeline.evaluate.in_parts import Part, making
from pipeline.evaluate.predict import BATCH, FilePredictor, Predictor
from pipeline.progress import Progress
from pipeline.report import export
from pipeline.stages.commands import Report
from pipeline.stages.inputs import build_encoder, contents, device, reading, workers
from pipeline.stages.nodes import need_of, on_this_node
from pipeline.train import trained_model
from pipeline.url import is_url


@dataclass(frozen=True)
class OfRun:
    """The run of a configuration; a call loads it."""

    config: Config
    kind: ClassVar = "run"

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self.config.run

    @property
    def reading(self) -> data.Reading:
        """How image files become RGB."""
        return reading(self.config)

    @property
    def need(self) -> Need:
        """What it takes of a node."""
        return need_of(self.config)

    def __call__(self) -> FilePredictor:
        """Load it on this machine."""
        config = self.config
        encoder = features = None
        if trained_model.load_description(config.run).model.taps:
            encoder = build_encoder(config)
            features = changed(contents(config, encoder.fingerprint()), image_px=None).fingerprint
        size = config.resources.batch_size or BATCH
        predictor = Predictor(config.run, encoder=encoder, fingerprint=features, batch_size=size, device=device(config))
        return FilePredictor(predictor, self.reading, workers(config))


@dataclass(frozen=True)
class OfExport:
    """A model that was handed on, and the weights of its encoder; a call loads it."""

    folder: Path
    checkpoint: Path | None
    kind: ClassVar = "model"

    @property
    def reading(self) -> data.Reading:
        """How image files become RGB."""
        return export.reading_of(self.folder)

    @property
    def need(self) -> Need:
        """What it takes of a node."""
        return Need()

    def __call__(self) -> FilePredictor:
        """Load it on this machine."""
        place = "cuda" if torch.cuda.is_available() else "cpu"
        model = export.load_export(self.folder, checkpoint=self.checkpoint, device=place)
        return FilePredictor(model.predictor(), model.reading, min(len(os.sched_getaffinity(0)), 16))


def predict(model: OfRun | OfExport, arguments: Sequence[str], progress: Progress) -> Report:
    """Class probabilities of images; features are made on the fly, as stage one would have.

    Args:
        model: What predicts.
        arguments: See `data.images_named`.
        progress: Told of each image.

    Raises:
        DataError: None of the files can be read; if only some cannot, the report's `set_aside` says why.
    """
    names = data.images_named(arguments)
    found = model()(names, progress)
    if not found["predictions"]:
        raise DataError(next(iter(found["set_aside"].values())))
    return {model.kind: str(model.folder), **found}


def predict_into(
    path: Path,
    model: OfRun | OfExport,
    arguments: Sequence[str],
    progress: Progress,
    *,
    replace: bool = False,
    ray: str | None = None,
) -> Report:
    """Write class probabilities of however many images as a table, continuing what was stopped.

    Args:
        path: `NAME.csv` or `NAME.parquet`; see `making` for what becomes of one that is there.
        model: What predicts.
        arguments: See `data.images_named`.
        progress: Told of each part.
        replace: Make it anew where there is one.
        ray: Have the parts made on the cluster at this address (see `pipeline.cluster.connected`).

    Raises:
        DataError: None of the files can be read, or a node does not see those that are here.
        RunError: See `making`.
    """
    description = trained_model.load_description(model.folder)
    about = {"model": description.weights_sha256, "reading": data.reading_rules(model.reading)}
    names = data.images_named(arguments)
    nodes: list[Report] = []
    with making(path, names, description.class_names, about, replace=replace) as table:
        progress("predict", 0, len(names))
        parts = table.pending()
        answers = _here(model, parts) if ray is None else _on_cluster(model, parts, ray, progress, nodes)
        for part, found in answers:
            table.put(part, found)
            progress("predict", table.done, len(names))
        summary = table.join()
    report = {model.kind: str(model.folder), "out": str(path), **asdict(summary)}
    return {**report, **({"nodes": nodes} if nodes else {})}


Answers = Iterator[tuple[Part, Mapping[str, Any]]]
"""Parts, in any order, and what the model says of their images."""


def _here(model: OfRun | OfExport, parts: Iterator[Part]) -> Answers:
    """Ask the model in this process, which is loaded once there is something to ask."""
    predictor = None
    for part in parts:
        predictor = predictor or model()
        yield part, predictor(part.names)


@dataclass(frozen=True)
class _OnNode:
    """The model on a node that sees it at the same path; a call loads it there."""

    model: OfRun | OfExport

    def __call__(self) -> Callable[[Part], Mapping[str, Any]]:
        with on_this_node("the model and the weights of its encoder"):
            predictor = self.model()
        return lambda part: predictor(part.names)


def _on_cluster(
    model: OfRun | OfExport, parts: Iterator[Part], address: str, progress: Progress, nodes: list[Report]
) -> Answers:
    """Ask workers of a cluster; an image that kills its worker is set aside."""
    first = next(parts, None)
    if first is None:
        return  # no cluster is asked for nothing

    def tell(said: str) -> None:
        progress("ray", 1, 1, note=said)

    make = _OnNode(model)
    images: Counter[str] = Counter()
    began = time.monotonic()
    with connected(address) as cluster, hired(cluster, make, need=model.need, name="predict", tell=tell) as pool:
        for done in pool.map(chain([first], parts), split=Part.halves, named=lambda part: f"part {part.number}"):
            if isinstance(done, Lost):
                yield done.item, {"predictions": [], "set_aside": {str(name): done.reason for name in done.item.names}}
                continue
            for name, reason in done.result["set_aside"].items():
                _check_seen(name, model.reading, reason, done.node)
            images[done.node] += len(done.item.names)
            yield done.item, done.result
        seconds = time.monotonic() - began
        nodes += [
            {**asdict(share), "images": images[share.node], "images_per_s": images[share.node] / seconds}
            for share in pool.shares
        ]


def _check_seen(name: str, rules: data.Reading, reason: str, node: str) -> None:
    """Refuse to set an image aside that a node cannot read, and this machine can.

    Raises:
        DataError: It is one.
    """
    if is_url(name) or not any(said in reason for said in (UNREADABLE, "needs the extra")):
        return  # the encoder refuses it, as it would here
    try:
        data.read_image(Path(name), rules)
    except DataError:
        return
    message = (
        f"{name}: the node {node!r} cannot read this file, and this machine can ({reason}): have every node see it at "
        f"the same path, or name the images by URL"
    )
    raise DataError(message)
