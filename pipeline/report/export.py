"""A trained classifier as a folder to hand on: weights, all they need to be used rightly, a card, and a short script.

The folder reads as a run does (`model.json` beside `model.safetensors`). Its fingerprint is narrowed to the taps that
the classifier reads. The frozen encoder is not in it, for others have its licence and size; its file is checked by
digest.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache import Fingerprint
from pipeline import data, encoders, records
from pipeline.clip import without_folder
from pipeline.errors import CheckpointError, RunError
from pipeline.evaluate.predict import Predictor
from pipeline.model.backbones import IMAGENET_MEAN, IMAGENET_STD
from pipeline.model.tasks import Task
from pipeline.report.caveats import caveats
from pipeline.report.evidence import read_figures
from pipeline.report.model_card import render_card
from pipeline.report.onnx_file import write_onnx
from pipeline.report.reproduce import sections
from pipeline.train import trained_model

SCRIPT = '''\
"""Class probabilities of image files, one JSON object a line; needs the package slca-pipeline."""

import argparse
import json
import sys
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.report.export import load_export

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", nargs="+", type=Path)
parser.add_argument("--checkpoint", type=Path, help="weights of the frozen encoder; README.md says which")
arguments = parser.parse_args()
try:
    model = load_export(Path(__file__).parent, checkpoint=arguments.checkpoint)
    for image, row in zip(arguments.images, model.predict(arguments.images), strict=True):
        print(json.dumps({"image": str(image), **dict(zip(model.class_names, row.tolist(), strict=True))}))
except PipelineError as error:
    sys.exit(f"error: {error}")
'''


@dataclass(frozen=True)
class Exported:
    """A model that was handed on, ready to predict.

    Attributes:
        folder: Where it is.
        class_names: What its probabilities are of.
        task: What its labels mean.
        reading: How image files become RGB.
        encoder: The frozen encoder; None for a model without gates of its features.
        fingerprint: Of the features that it gives.
        device: Where the classifier computes.
    """

    folder: Path
    class_names: tuple[str, ...]
    task: Task
    reading: data.Reading
    encoder: encoders.Encoder | None
    fingerprint: Fingerprint | None
    device: str

    def predict(self, paths: Iterable[Path]) -> Iterator[npt.NDArray[np.float64]]:
        """Classify image files: probabilities (K,) each.

        Raises:
            DataError: A file cannot be read.
        """
        return self.classify(data.read_image(path, self.reading) for path in paths)

    def classify(self, images: Iterable[data.Image]) -> Iterator[npt.NDArray[np.float64]]:
        """Classify images, uint8 (H, W, 3) each: probabilities (K,) each."""
        predictor = self.predictor()
        return predictor(map(predictor.take, images))

    def predictor(self) -> Predictor:
        """The classifier in memory, with its encoder."""
        return Predictor(self.folder, encoder=self.encoder, fingerprint=self.fingerprint, device=self.device)


def export(
    folder: Path,
    target: Path,
    facts: Mapping[str, Any],
    *,
    reading: data.Reading,
    license_name: str = "unknown",
    citation: str = "",
    generated: bool = False,
    untrained: bool = False,
    onnx: bool = False,
) -> dict[str, Any]:
    """Write the folder, whole or not at all; one that holds the same already is left as it is.

    Args:
        folder: An evaluated run.
        target: The folder to write.
        facts: About the data, see `provenance.data_in_numbers`.
        reading: How image files became RGB.
        license_name: Of the data.
        citation: Of the data.
        generated: Whether the images are drawn by a program.
        untrained: Whether the encoder's weights are drawn from a seed.
        onnx: Write `model.onnx` too.

    Returns:
        JSON values: `folder`, `files`, whether it was `unchanged`, and `onnx` (see `write_onnx`).

    Raises:
        RunError: The run is not evaluated, its weights are not there or damaged, it reads masks that no new image has,
            or `target` holds something else.
    """
    description = trained_model.load_description(folder)
    figures, weights = read_figures(folder, description), trained_model.read_weights(folder, description)
    if description.fingerprint is not None and "masks_sha256" in description.fingerprint.fields:
        msg = f"The model in {str(folder)!r} reads the known masks, which new images do not have: export another run."
        raise RunError(msg)
    narrowed = _without_paths(replace(description, fingerprint=_narrowed(description)))
    scratch = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        report = write_onnx(folder, scratch / "model.onnx") if onnx else None
        with records.replacing(scratch / "model.safetensors") as file:
            file.write(weights)
        trained_model.save_description(scratch, narrowed)
        records.write_json(scratch / "classes.json", list(description.class_names))
        records.write_json(scratch / "config.json", _configuration(narrowed, facts, reading))
        records.write_json(scratch / "metrics.json", figures)
        records.write_json(scratch / "preprocessing.json", _preprocessing(narrowed, reading))
        card = render_card(
            narrowed,
            figures,
            facts,
            caveats(description, figures, facts, generated=generated, untrained=untrained, leaks=None),
            license_name=license_name,
            citation=citation,
            onnx=report,
        )
        for name, text in (("README.md", card), ("predict.py", SCRIPT)):
            with records.replacing(scratch / name) as file:
                file.write(text.encode())
        unchanged = _put(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    files = sorted(path.name for path in target.iterdir())
    return {"folder": str(target), "files": files, "unchanged": unchanged, "onnx": report}


def load_export(folder: Path, *, checkpoint: Path | None = None, device: str = "cpu") -> Exported:
    """Make a model that was handed on ready to predict.

    Args:
        folder: What `export` wrote.
        checkpoint: Weights of the frozen encoder; None where the model needs none, or where published ones are on this
            machine already.
        device: Where to compute.

    Raises:
        RunError: The folder is none that `export` wrote.
        CheckpointError: The encoder's weights are missing, or others than in training.
    """
    description = trained_model.load_description(folder)
    reading = reading_of(folder)
    encoder = identity = None
    if description.fingerprint is not None:
        fields = description.fingerprint.fields
        encoder = encoders.build_encoder(
            fields["encoder"],
            checkpoint=_checked(fields, checkpoint),
            taps=tuple(fields["taps"]),
            input_px=fields["input_px"],
            pool=fields["pool"],
            precision=fields["precision"],
            preprocessing=fields["preprocessing"]["name"],
            masks=encoders.mask_settings(fields),
            device=device,
        )
        made = {**encoder.fingerprint(), "reading": data.reading_rules(reading), "dtype": fields["dtype"]}
        identity = Fingerprint(made)
    return Exported(folder, description.class_names, description.task, reading, encoder, identity, device)


def reading_of(folder: Path) -> data.Reading:
    """How image files become RGB before a model that was handed on.

    Raises:
        RunError: The folder is none that `export` wrote.
    """
    try:
        rules = records.read_json(folder / "preprocessing.json")["reading"]
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in rules.items()
        }
        values.pop("version")
        return data.Reading(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{str(folder)!r} is no exported model ({error}): name a folder that `pipeline export` wrote."
        raise RunError(msg) from None


def _narrowed(description: trained_model.Description) -> Fingerprint | None:
    """The fingerprint of a store with the classifier's own taps and no others."""
    if description.fingerprint is None:
        return None
    return Fingerprint(encoders.of_taps(description.fingerprint.fields, description.taps))


def _without_paths(description: trained_model.Description) -> trained_model.Description:
    """The same, but of a file of first weights only its name: where it lies is nobody's business."""
    weights, provenance = Path(description.model.weights).name, dict(description.provenance)
    backbone = without_folder(description.model.backbone)
    if "settings" in provenance:
        settings = provenance["settings"]
        model = {**settings["model"], "weights": weights, "backbone": backbone}
        provenance["settings"] = {**settings, "model": model}
    return replace(
        description, model=replace(description.model, weights=weights, backbone=backbone), provenance=provenance
    )


def _configuration(
    description: trained_model.Description, facts: Mapping[str, Any], reading: data.Reading
) -> dict[str, Any]:
    """What the run was configured as, under the keys of a configuration, as far as the run knows."""
    changes = description.provenance.get("settings", {}).get("augmentation", {})
    fields = description.fingerprint.fields if description.fingerprint is not None else {}
    encoder = {key: fields[key] for key in ("weights_sha256", "input_px", "pool", "precision") if key in fields}
    if fields:
        encoder |= {"name": fields["encoder"], "taps": list(fields["taps"])}
    if "preprocessing" in fields:
        encoder["preprocessing"] = fields["preprocessing"]["name"]
    return {
        "data": {"name": facts["name"], "task": description.task, "reading": data.reading_rules(reading)},
        "encoder": encoder or None,
        "store": {"dtype": fields["dtype"]} if "dtype" in fields else None,
        **sections({"model": asdict(description.model), "train": description.training, "augmentation": changes}),
    }


def _preprocessing(description: trained_model.Description, reading: data.Reading) -> dict[str, Any]:
    """What happens to an image file before the classifier and before the encoder, for those who rebuild it."""
    side = description.model.image_px
    scale = {} if description.clip is None else description.clip["architecture"]
    fields = description.fingerprint.fields if description.fingerprint is not None else {}
    return {
        "reading": data.reading_rules(reading),
        "classifier": None
        if not description.model.reads_images
        else {
            "colours": "RGB, 0 to 255",
            "resize": f"to {side} x {side} px whatever the shape, bilinear with antialiasing, rounded",
            "mean": [255 * value for value in scale.get("mean", IMAGENET_MEAN)],
            "std": [255 * value for value in scale.get("std", IMAGENET_STD)],
            "in_model_onnx": "mean and std are applied inside of model.onnx",
        },
        "encoder": {key: fields[key] for key in ("input_px", "preprocessing", "precision", "pool") if key in fields},
    }


def _checked(fields: Mapping[str, Any], checkpoint: Path | None) -> Path:
    """The encoder's file of weights, of the very digest that the features were made with."""
    name, wanted = fields["encoder"], fields["weights_sha256"]
    what = f"the {name} weights with the SHA-256 {wanted}"
    if checkpoint is None:
        known = (n for n, published in encoders.PUBLISHED.items() if published.digest == f"sha256:{wanted}")
        own = encoders.weights_file(name, Path(name))  # where a family keeps those of that name
        there = [path for path in (*map(encoders.checkpoint_path, known), own) if path.is_file()]
        places = [path for path in there if encoders.weights_sha256(path) == wanted]
        if not places:
            msg = f"The model reads features of a frozen encoder: give {what} with --checkpoint FILE."
            raise CheckpointError(msg)
        return places[0]
    checkpoint = encoders.weights_file(name, checkpoint)
    found = encoders.weights_sha256(checkpoint)
    if found != wanted:
        msg = f"{checkpoint} has the SHA-256 {found}; the model was trained with other weights: give {what}."
        raise CheckpointError(msg)
    return checkpoint


def _put(scratch: Path, target: Path) -> bool:
    """Give the finished folder its name; True where the same was there already.

    Raises:
        RunError: Something else is there.
    """
    if not target.exists():
        scratch.rename(target)
        return False
    ours = {path.name for path in scratch.iterdir()}
    theirs = {path.name for path in target.iterdir()} if target.is_dir() else set()
    same, differing, missing = filecmp.cmpfiles(scratch, target, sorted(ours | theirs), shallow=False)
    if len(same) == len(ours | theirs):
        return True
    listed = ", ".join(sorted([*differing, *missing])) or "it is no folder"
    msg = f"{str(target)!r} holds something else (not the same: {listed}): name another folder, or remove it."
    raise RunError(msg)
