"""Where the files of a CLIP lie: published weights in torch's folder, a model's own files in a folder together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.clip.library import import_open_clip
from pipeline.clip.names import CLIP, DEMO, FOLDER, HUB, tags
from pipeline.errors import CheckpointError, ConfigError

OWN = "own"  # the weights that lie beside a model's own configuration, in its folder or on the hub
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
TEXT_CONFIG = Path("text", "config.json")  # of a text tower that transformers builds; elsewhere on the hub


def weights_file(name: str, weights: str | Path) -> Path | None:
    """The file that configured weights mean, there or not.

    Args:
        name: See `pipeline.clip.names`.
        weights: `"none"`; a tag of `tags`; `"own"` for the file in the model's folder or on the hub; or a file.

    Returns:
        None for `"none"`.

    Raises:
        ConfigError: There are no such weights for the name.
    """
    if str(weights) == "none":
        return None
    folder = folder_of(name)
    if str(weights) == OWN:
        if folder is None:
            msg = f"{name!r} has no weights of its own: name a file, or one of {listed(name)}."
            raise ConfigError(msg)
        there = [folder / file for file in WEIGHTS if (folder / file).is_file()]
        return there[0] if there else folder / WEIGHTS[0]
    if folder is None and name != DEMO and str(weights) in tags(name):
        return published_file(name, str(weights))
    path = Path(weights)
    if not path.exists() and path.suffix == "" and len(path.parts) == 1:
        msg = f"There are no weights {str(weights)!r} for {name!r}: name a file, 'none', or one of {listed(name)}."
        raise ConfigError(msg)
    return path


def present_weights(name: str, weights: str | Path) -> Path | None:
    """The file that configured weights mean, which is there; None for `"none"`.

    Raises:
        ConfigError: There are no such weights for the name.
        CheckpointError: They are not here; the message says which file goes where.
    """
    file = weights_file(name, weights)
    if file is None or file.is_file():
        return file
    if str(weights) == OWN or str(weights) in tags(name):
        msg = (
            f"The weights {str(weights)!r} of {name!r} are not at {str(file)!r}: `pipeline prepare` downloads them; "
            f"without a network, put the file from {source_of(name, str(weights))} there."
        )
    else:
        msg = f"There is no file of weights at {str(file)!r}: check the path."
    raise CheckpointError(msg)


def folder_of(name: str) -> Path | None:
    """The folder of a model that brings its own configuration, there or not; None for the others."""
    if name.startswith(CLIP + FOLDER):
        return Path(name.removeprefix(CLIP + FOLDER))
    if name.startswith(CLIP + HUB):
        return published_folder() / f"clip-{name.removeprefix(CLIP + HUB).replace('/', '--')}"
    return None


def read_config(name: str, folder: Path) -> dict[str, Any]:
    """Read what a folder says of its model; the text tower's own configuration is taken from beside it."""
    file = folder / CONFIG
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        model, text = said["model_cfg"], said["model_cfg"]["text_cfg"]
        if not isinstance(model["vision_cfg"], dict) or not isinstance(model["embed_dim"], int):
            problem = "no configuration of a CLIP"
            raise ValueError(problem)
    except FileNotFoundError as error:
        what = (
            f"`pipeline prepare` fetches it; without a network, put the files of {name.removeprefix(CLIP + HUB)!r} "
            f"there"
            if name.startswith(CLIP + HUB)
            else "name a folder that open_clip or the hub wrote"
        )
        msg = f"{name!r} has no {CONFIG} in {str(folder)!r}: {what}."
        raise CheckpointError(msg) from error
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{str(file)!r} cannot be read as the configuration of a CLIP ({error}): copy or download it again."
        raise CheckpointError(msg) from error
    if "hf_model_name" in text and (folder / TEXT_CONFIG).is_file():
        text["hf_model_name"] = str((folder / TEXT_CONFIG).parent)
    return dict(said)


def listed(name: str) -> str:
    """The weights of a name that need no path, in a message."""
    own = [OWN] if folder_of(name) is not None else []
    return ", ".join(own or ([] if name == DEMO else tags(name))) or "none are published"


def published_file(name: str, tag: str) -> Path:
    """Where published weights are kept: under the suffix that is there, else that of the best."""
    _, files = hub_files(name, tag)
    stem = f"clip-{name.removeprefix(CLIP).replace('/', '-')}-{tag}"
    places = [published_folder() / (stem + suffix) for suffix in dict.fromkeys(Path(file).suffix for file in files)]
    return next((place for place in places if place.is_file()), places[0])


def published_folder() -> Path:
    """Where published weights are kept for all projects: torch's own folder."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def hub_files(name: str, tag: str) -> tuple[str, tuple[str, ...]]:
    """The repository on the hub and the names that published weights may have there, the best first."""
    if name.startswith(CLIP + HUB):
        return name.removeprefix(CLIP + HUB), WEIGHTS
    said: str = import_open_clip().get_pretrained_cfg(name.removeprefix(CLIP), tag)["hf_hub"]
    owner_and_name, _, file = said.rpartition("/")
    return owner_and_name, (file,) if file else WEIGHTS


def source_of(name: str, tag: str) -> str:
    """Where somebody with a network finds published weights."""
    owner_and_name, files = hub_files(name, tag)
    return f"https://huggingface.co/{owner_and_name} ({' or '.join(files[:3])})"
