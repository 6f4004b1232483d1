"""A trained model on disk: `model.safetensors`, its weights, and `model.json`, what to build around them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cache import Fingerprint
from pipeline.clip import read_architecture
from pipeline.errors import RunError
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.clip_backbone import ClipOptions
from pipeline.model.overlay import OverlayOptions
from pipeline.model.tasks import Head, Task, outputs_of
from pipeline.model.uses import Shape
from pipeline.records import damage_named, read_json, replacing, write_json

_VERSION = 1


@dataclass(frozen=True)
class Description:
    """What a trained model is, beside its weights.

    Attributes:
        model: How it was built.
        task: What its labels mean.
        head: What its outputs mean.
        class_names: Names of the classes.
        taps: (C, h, w) of each stored tap that it reads.
        fingerprint: Of the features it was trained on; None without gates.
        training: Options of its training, for the reader.
        metrics: Figures on val, and the epoch they are of.
        provenance: How it came about, for the reader (`pipeline.train.provenance`); empty where that was not recorded.
        weights_sha256: Of the file of weights beside it; empty where an older version wrote it.
        clip: Of a CLIP, `architecture` (see `pipeline.clip.Architecture`) and `prompts` by class; None for others.
    """

    model: ModelOptions
    task: Task
    head: Head
    class_names: tuple[str, ...]
    taps: Mapping[str, Shape]
    fingerprint: Fingerprint | None
    training: Mapping[str, Any]
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    clip: Mapping[str, Any] | None = None


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors."""
    content = safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in state.items()})
    with replacing(path) as file:
        file.write(content)


def save_description(folder: Path, description: Description) -> None:
    """Write `model.json`, with the digest of the weights that lie beside it."""
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    values = asdict(replace(description, weights_sha256=digest))
    values["fingerprint"] = None if description.fingerprint is None else dict(description.fingerprint.fields)
    write_json(folder / "model.json", {"version": _VERSION, **values})


def load_description(folder: Path) -> Description:
    """Read `model.json`.

    Raises:
        RunError: There is no finished run in the folder, or not one that this version reads.
    """
    file = folder / "model.json"
    try:
        values = read_json(file)
        if values.pop("version") != _VERSION:
            msg = f"{str(file)!r} is of another version of this program: train again, or use the version that wrote it."
            raise RunError(msg)
        model = values.pop("model")
        model["gates"] = tuple((tap, stage) for tap, stage in model["gates"])
        model["fuse"] = tuple(model.get("fuse", ()))
        model["overlay"] = OverlayOptions(**model["overlay"]) if model.get("overlay") else None
        model["clip"] = _read_clip(model.get("clip"))
        if "norm" not in model:  # until 0.2.0
            model["norm"] = {None: "layer_on_blocks", True: "layer", False: "none"}[model.pop("normalise")]
            model.pop("gain")  # of the first weights, which are long gone
        fingerprint = values.pop("fingerprint")
        return Description(
            model=ModelOptions(**model),
            class_names=tuple(values.pop("class_names")),
            taps={tap: cast(Shape, tuple(shape)) for tap, shape in values.pop("taps").items()},
            fingerprint=None if fingerprint is None else Fingerprint(fingerprint),
            **values,
        )
    except FileNotFoundError as error:
        msg = f"There is no trained model in {str(folder)!r}: run `pipeline train` first, or name another run."
        raise RunError(msg) from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        msg = f"{str(file)!r} is no description of a model ({error}): delete the folder and train again."
        raise RunError(msg) from error


def _read_clip(values: Mapping[str, Any] | None) -> ClipOptions | None:
    """Undo what JSON did to a CLIP's options."""
    if values is None:
        return None
    words = tuple((name, said) for name, said in values["words"])
    return ClipOptions(tuple(values["templates"]), words, values["lora"])


def load_classifier(folder: Path, *, device: torch.device | None = None) -> tuple[Classifier, Description]:
    """Build the model of a finished run, ready to predict.

    Args:
        folder: The run.
        device: Where it goes.

    Raises:
        RunError: No finished run, or weights that are damaged or were not kept.
    """
    description = load_description(folder)
    outputs = outputs_of(description.head, len(description.class_names))
    with damage_named(folder / "model.json"):
        built = None if description.clip is None else read_architecture(description.clip["architecture"])
    options = replace(description.model, weights="none")
    classifier = Classifier(options, description.taps, outputs, architecture=built)
    content = read_weights(folder, description)
    try:
        classifier.load_state_dict(safetensors.torch.load(content))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise RunError(_other_weights(folder, str(error).splitlines()[0])) from error
    return classifier.to(device or torch.device("cpu")).eval(), description


def read_weights(folder: Path, description: Description) -> bytes:
    """The bytes of a finished run's weights, which are those that its description names.

    Raises:
        RunError: They are not, or were not kept.
    """
    file = weights_file(folder)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RunError(_other_weights(folder, str(error))) from error
    if description.weights_sha256 not in ("", hashlib.sha256(content).hexdigest()):
        raise RunError(_other_weights(folder, "they are other weights than those it names by their SHA-256"))
    return content


def _other_weights(folder: Path, why: str) -> str:
    return (
        f"{str(folder / 'model.safetensors')!r} does not hold the weights that model.json describes ({why}): "
        f"delete the folder {str(folder)!r} and train again."
    )


def weights_file(folder: Path) -> Path:
    """The file of a finished run's weights, which is there.

    Raises:
        RunError: It is not, as after a study that keeps no weights.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        msg = (
            f"The weights of the run {str(folder)!r} were not kept: delete this folder and run its study again with "
            f"`keep_weights: true`, or train that configuration on its own (`--set run=runs/NAME`)."
        )
        raise RunError(msg)
    return file
