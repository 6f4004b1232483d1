"""Where CLIP's files of weights lie, as `pipeline.clip` has it: published ones by open_clip's tags, or any file."""

from __future__ import annotations

from pathlib import Path

from pipeline import clip
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.progress import Progress, silent


def weights_file(name: str, checkpoint: Path) -> Path:
    """The file of weights that a configured checkpoint means to a CLIP, there or not.

    Args:
        name: Of the CLIP.
        checkpoint: A tag that open_clip has for it, `own` for the file in a model's folder, or a file.
    """
    if str(checkpoint) == name:  # where a family keeps weights of an encoder's own name; CLIP's have tags
        return checkpoint
    file = clip.weights_file(name, checkpoint)
    if file is None:
        message = (
            "encoder.checkpoint: 'none' is for a classifier that trains; an encoder needs weights: a tag of open_clip, "
            "a file, or random ones with encoder.training.steps: 0"
        )
        raise ConfigError(message)
    return file


def absent(name: str, checkpoint: Path) -> str:
    """What to say where that file is not there."""
    if name == clip.DEMO:
        return f"there is no file {str(checkpoint)!r}: run `pipeline prepare`, which makes the miniature CLIP"
    try:
        clip.present_weights(name, checkpoint)
    except PipelineError as error:
        return str(error)
    return f"{checkpoint}: try again"  # it has come meanwhile


def fetch_weights(name: str, checkpoint: Path, *, progress: Progress = silent) -> Path:
    """Have the file of weights, downloaded if open_clip publishes it.

    Raises:
        CheckpointError: It cannot be had; the message says which file to put where.
    """
    weights_file(name, checkpoint)
    file = clip.download(name, checkpoint, progress=progress)
    if file is None:
        message = f"encoder.checkpoint: {absent(name, checkpoint)}"
        raise CheckpointError(message)
    return file
