"""What the data do not decide: the encoder that suits this machine, SLCA on a small ResNet, and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline import encoders
from pipeline.clip import is_clip
from pipeline.config.schema import Config
from pipeline.data.count import Counts
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.backbones import STAGES
from pipeline.stages.first_config.draft import Draft, Given


def choose_method(given: Given, draft: Draft) -> None:
    """The sections that the data do not decide: the encoder that suits this machine, and SLCA on a small ResNet."""
    known = [name for family in encoders.FAMILIES for name in family.names]
    name = given.encoder or _fitting_encoder(draft)
    if name not in known:
        message = f"--encoder: there is no encoder {name!r}; valid: {', '.join(known)}"
        raise ConfigError(message)
    encoder: dict[str, Any] = {"name": name, "checkpoint": given.checkpoint or _weights_of(name)}
    draft.beside["encoder.checkpoint"] = "had by `pipeline prepare`, or name a file"
    if name == "sam_demo":
        encoder |= {"pool": 2, "training": {"images": 800, "steps": 100, "seed": 1}}
        draft.beside["encoder.name"] = (
            "a miniature SAM, trained by `prepare` on images of its own; no evidence about SAM"
        )
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        encoder["precision"] = "bfloat16"
    draft.values["encoder"] = encoder
    draft.values["store"] = {"path": f"features/{draft.name}.zarr", "license": "unknown", "citation": "unknown"}
    draft.beside["store.license"] = "of your data; it stands on the card of the store"
    draft.beside["store.citation"] = "how to cite your data"
    draft.values["model"] = {"backbone": given.backbone or "resnet18", "weights": "none", "image_px": 224}
    draft.beside["model.weights"] = "`imagenet` is better where it can be downloaded"
    _use_taps(encoders.family_of(name).taps, draft)
    draft.values["train"] = {
        "epochs": 30,
        "batch_size": 32,
        "lr": 5e-4,
        "warmup_epochs": 1,
        "seed": 0,
        "augment": {"flip_horizontal": 0.5},
    }
    draft.beside["train.augment.flip_horizontal"] = "0 where left and right matter"
    draft.values["run"] = f"runs/{draft.name}"


def _use_taps(taps: Sequence[str], draft: Draft) -> None:
    """SLCA where the encoder has a tap for each stage, and late fusion of what it has where not."""
    if len(taps) == len(STAGES):
        draft.values["model"]["gates"] = [{"tap": tap, "stage": stage} for tap, stage in zip(taps, STAGES, strict=True)]
        draft.beside["model.gates"] = "which depth of the encoder gates which stage; [] is the plain classifier"
    else:
        draft.values["model"]["fuse"] = list(taps)
        draft.beside["model.fuse"] = "taps that the last layer reads beside the image; [] is the plain classifier"


def _fitting_encoder(draft: Draft) -> str:
    """The encoder to begin with: SAM's smallest on a GPU, a light one on a CPU."""
    if draft.values["data"]["layout"] == "demo":
        return "sam_demo"
    if torch.cuda.is_available():
        draft.beside["encoder.name"] = "this machine has a GPU"
        return "sam_vit_b"
    draft.beside["encoder.name"] = "light enough for a CPU; sam_vit_b is larger, and slower by far"
    return "lite_medsam"


def _weights_of(name: str) -> str:
    """The weights that go with an encoder: published ones, or a file that `prepare` makes."""
    stands_for_a_file = encoders.weights_file(name, Path(name)) != Path(name)
    made = f"{name.replace(':', '_')}.safetensors" if is_clip(name) else f"{name}.pth"
    return name if stands_for_a_file else f"weights/{made}"


def note_weights(config: Config, draft: Draft) -> None:
    """Say how to have weights that are not here and are not made on the spot."""
    name = config.encoder.name
    if name == "sam_demo" or draft.values["data"]["layout"] == "store" or encoders.family_of(name).reads == "mask":
        return
    try:
        encoders.present_weights(name, config.encoder.checkpoint)
    except CheckpointError as error:
        said = str(error).removeprefix("encoder.checkpoint: ")
        draft.notes.append(f"{said[:1].upper()}{said[1:]}.")


def fit_sizes(draft: Draft, counts: Counts, side: int | None) -> None:
    """Sizes of the classifier's image, batch and training."""
    wanted = 224 if side is None or side >= 224 else max(64, -(-side // 32) * 32)
    draft.values["model"]["image_px"] = wanted
    draft.beside["model.image_px"] = f"the images have {side} px" if side is not None else "as ImageNet has it"
    training = counts.splits["train"]
    if training < 256:
        draft.values["train"] |= {"batch_size": 8 if training < 64 else 16, "epochs": 50}
    drawn = draft.values["data"]["layout"] in ("folder", "csv")
    groups = sum(counts.groups.values())
    if drawn and groups == counts.images and "groups" not in draft.report:
        draft.notes.append(
            f"Every image counts as a patient of its own. If a patient has several, set "
            f"{'group_column' if draft.values['data']['layout'] == 'csv' else 'group_pattern'}: "
            f"else the scores are too good."
        )
    few = [f"{name} ({sum(found.values())})" for name, found in counts.classes.items() if sum(found.values()) < 20]
    if few:
        draft.notes.append(f"Few images of {', '.join(few)}: expect wide intervals.")
