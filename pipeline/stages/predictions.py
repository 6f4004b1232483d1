"""What `pipeline predict` does: a run or a handed-on model says of images which class they show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, ClassVar

import torch

from pipeline import data
from pipeline.config.schema import Config
from pipeline.errors import DataError
from pipeline.evaluate.in_parts import Part, making
from pipeline.evaluate.predict import BATCH, FilePredictor, Predictor
from pipeline.progress import Progress
from pipeline.report import export
from pipeline.stages.commands import Report
from pipeline.stages.inputs import build_encoder, contents, device, reading, workers
from pipeline.train import run_folder


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

    def __call__(self) -> FilePredictor:
        """Load it on this machine."""
        config = self.config
        encoder = features = None
        if run_folder.load_description(config.run).model.taps:
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

    def __call__(self) -> FilePredictor:
        """Load it on this machine."""
        place = "cuda" if torch.cuda.is_available() else "cpu"
        model = export.load_export(self.folder, checkpoint=self.checkpoint, device=place)
        return FilePredictor(model.predictor(), model.reading)


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
) -> Report:
    """Write class probabilities of however many images as a table, continuing what was stopped.

    Args:
        path: `NAME.csv` or `NAME.parquet`; see `making` for what becomes of one that is there.
        model: What predicts.
        arguments: See `data.images_named`.
        progress: Told of each part.
        replace: Make it anew where there is one.

    Raises:
        DataError: None of the files can be read.
        RunError: See `making`.
    """
    description = run_folder.load_description(model.folder)
    about = {"model": description.weights_sha256, "reading": data.reading_rules(model.reading)}
    names = data.images_named(arguments)
    with making(path, names, description.class_names, about, replace=replace) as table:
        progress("predict", 0, len(names))
        for part, found in _answers(model, table.pending()):
            table.put(part, found)
            progress("predict", table.done, len(names))
        summary = table.join()
    return {model.kind: str(model.folder), "out": str(path), **asdict(summary)}


def _answers(model: OfRun | OfExport, parts: Iterator[Part]) -> Iterator[tuple[Part, Mapping[str, Any]]]:
    """What the model says of each part."""
    predictor = None
    for part in parts:
        predictor = predictor or model()
        yield part, predictor(part.names)
