"""The two towers of a CLIP: what a name means, and the model that open_clip builds of it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.clip.files import folder_of, read_config
from pipeline.clip.library import first_line, import_open_clip, offline
from pipeline.clip.names import CLIP, DEMO, is_clip, known, tags
from pipeline.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, and a name can be refused without it
    from torch import nn

# The miniature: a CLIP in open_clip's own layout, small enough to be trained on two cores while one waits. Its image
# tower is a ResNet: a ViT of that size had learnt nothing of outlines when this told them apart (zero-shot AUC .53 and
# .79 after 80 steps of training on the demo's kind of images).
DEMO_WORDS, DEMO_CONTEXT = 2048, 32
_DEMO: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "text_cfg": {"context_length": DEMO_CONTEXT, "vocab_size": DEMO_WORDS, "width": 64, "heads": 2, "layers": 2},
}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}  # where only images are encoded


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a CLIP and to feed it images; plain values, so that a trained model can record it.

    Attributes:
        config: Arguments of open_clip's model.
        mean: Of red, green and blue in 0..1, which its images are centred by.
        std: What they are divided by then.
    """

    config: Mapping[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def image_px(self) -> int:
        """Side of the image that its image tower was made for."""
        size = self.config["vision_cfg"].get("image_size", 224)
        return int(size if isinstance(size, int) else size[0])

    def of_images(self) -> Architecture:
        """The same without its text tower: what a model needs that knows the embeddings of its classes."""
        kept = {key: value for key, value in self.config.items() if key not in ("text_cfg", "multimodal_cfg")}
        return Architecture({**kept, "text_cfg": dict(_NO_TEXT)}, self.mean, self.std)


def read_architecture(values: Mapping[str, Any]) -> Architecture:
    """Undo what JSON does to an architecture.

    Raises:
        KeyError: It is none.
    """
    mean, std = ((float(of[0]), float(of[1]), float(of[2])) for of in (values["mean"], values["std"]))
    return Architecture(values["config"], mean, std)


def architecture(name: str, weights: str | Path = "none") -> Architecture:
    """Say what a name means: the towers, and how their images are scaled.

    Args:
        name: See `pipeline.clip.names`.
        weights: A tag of `tags`, which may want another activation or another scale; anything else leaves both.

    Raises:
        ConfigError: There is no such name, or open_clip is not installed.
        CheckpointError: The folder of the model lacks its configuration.
    """
    open_clip = import_open_clip()
    mean, std = tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD)
    folder = folder_of(name)
    if name == DEMO:
        return Architecture(copy.deepcopy(_DEMO), mean, std)
    if folder is not None:
        said = read_config(name, folder)
        scale = said.get("preprocess_cfg", {})
        return Architecture(said["model_cfg"], tuple(scale.get("mean", mean)), tuple(scale.get("std", std)))
    config = open_clip.get_model_config(name.removeprefix(CLIP)) if is_clip(name) else None
    if config is None:
        near = difflib.get_close_matches(name, known(), n=3, cutoff=0.3)
        msg = (
            f"There is no CLIP {name!r}: the nearest are {', '.join(near)}; `clip:hf-hub:OWNER/NAME` and "
            f"`clip:local-dir:FOLDER` are others."
        )
        raise ConfigError(msg)
    published = [open_clip.get_pretrained_cfg(name.removeprefix(CLIP), tag) for tag in tags(name)]
    if str(weights) in tags(name):
        published = [open_clip.get_pretrained_cfg(name.removeprefix(CLIP), str(weights))]
        if published[0].get("quick_gelu"):
            config["quick_gelu"] = True  # a model of this name without it would compute other features
    scales = {(tuple(of["mean"]), tuple(of["std"])) for of in published}
    if len(scales) == 1:  # that of these weights, or of all that were published for the name
        ((mean, std),) = scales
    return Architecture(config, mean, std)


def resizing(name: str) -> dict[str, str]:
    """Say how open_clip brings an image to a model's size: `interpolation`, and which side `resize_mode` fits.

    Raises:
        ConfigError: There is no such name, or open_clip is not installed.
        CheckpointError: The folder of the model lacks its configuration.
    """
    keys = {"interpolation": "bicubic", "resize_mode": "shortest"}
    folder = folder_of(name)
    if folder is not None:
        said = read_config(name, folder).get("preprocess_cfg", {})
        return {key: said.get(key, usual) for key, usual in keys.items()}
    if name == DEMO:
        return keys
    open_clip = import_open_clip()
    published = [open_clip.get_pretrained_cfg(name.removeprefix(CLIP), tag) for tag in tags(name)]
    found = {key: {of[key] for of in published} for key in keys}
    return {key: values.pop() if len(values) == 1 else keys[key] for key, values in found.items()}


def build(wanted: Architecture, weights: Path | None = None, *, image_px: int | None = None, text: bool = True) -> Any:
    """Build a CLIP, in float32, on the CPU and in evaluation mode.

    Args:
        wanted: What to build.
        weights: A file in open_clip's layout; None draws them from torch's seed.
        image_px: Side of the square images; position embeddings are resampled to it. None is the tower's own.
        text: Whether the text tower is needed; without it nothing but `visual` and the temperature mean anything.

    Returns:
        open_clip's model: `encode_image`, `encode_text`, `logit_scale`, `visual`.

    Raises:
        ConfigError: open_clip or what a tower needs is not installed, or the tower takes no image of this side.
        CheckpointError: The file is not there, or of another model.
    """
    open_clip = import_open_clip()
    config = copy.deepcopy(dict((wanted if text else wanted.of_images()).config))
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if image_px is not None and image_px != wanted.image_px:
        _check_side(image_px, wanted.image_px, vision, trained=weights is not None)
        vision["image_size"] = image_px
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        with offline():
            model = kind(**config)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        msg = f"open_clip cannot build this CLIP: {first_line(error)}"
        raise ConfigError(msg) from error
    if weights is not None:
        _load(open_clip, model, weights)
    if "timm_model_name" in vision and image_px not in (None, wanted.image_px):
        model.visual.set_input_size(image_px)
    return model.float().eval()


def _check_side(image_px: int, own_px: int, vision: Mapping[str, Any], *, trained: bool) -> None:
    """Refuse a side of images that a tower cannot be stretched to."""
    patch = vision.get("patch_size", 16)
    if isinstance(vision.get("layers", 12), list):
        patch = 32  # a ResNet, whose last map is pooled with a position for each cell
        if trained:  # and nobody resamples those
            msg = f"image_px is {image_px}, and this CLIP's ResNet has learnt positions for {own_px} px: take {own_px}."
            raise ConfigError(msg)
    if isinstance(patch, int) and image_px % patch:
        below, above = image_px // patch * patch, (image_px // patch + 1) * patch
        near = f"{below} or {above}" if below else f"{above}"
        msg = f"image_px is {image_px}, and this CLIP reads patches of {patch} px: take {near}."
        raise ConfigError(msg)


def _load(open_clip: ModuleType, model: nn.Module, file: Path) -> None:
    """Load a file of weights, and nothing that runs."""
    from pipeline.weights import read_weights

    read_weights(file)  # says in our words what is wrong with a file; the pages stay in memory for what follows
    try:
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        said = str(error).splitlines()
        msg = f"{str(file)!r} is of another model ({' '.join(said[:2]).strip()[:200]}): name its own."
        raise CheckpointError(msg) from error
