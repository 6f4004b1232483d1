"""Checkpoints in SAM's official key layout: read without running code, refused by name and shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from segment_anything.modeling import ImageEncoderViT
from torch import Tensor

from pipeline.encoders.sam.recipe import ARCHITECTURES, Architecture
from pipeline.errors import CheckpointError
from pipeline.weights import read_weights

ENCODER_PREFIX = "image_encoder."
_OTHER_PARTS = ("prompt_encoder.", "mask_decoder.", "pixel_mean", "pixel_std")


def load_encoder(architecture: Architecture, path: Path) -> ImageEncoderViT:
    """Fill the official module from a checkpoint of a whole SAM or of its image encoder alone.

    Args:
        architecture: What the checkpoint must hold.
        path: `.pth` or `.pt` (read with `weights_only=True`), or `.safetensors`.

    Returns:
        The official module in float32 on the CPU, in evaluation mode, without gradients.

    Raises:
        CheckpointError: The file is missing or no checkpoint, or a key is missing, unknown or misshapen.
    """
    state = encoder_state(path)
    vit = architecture.build()
    expected = shapes_of(vit.state_dict())
    require_same(path, architecture.name, shapes_of(state), expected)
    vit.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return vit.eval().requires_grad_(False)


def encoder_state(path: Path) -> dict[str, Tensor]:
    """Tensors of the image encoder in a checkpoint, by their names in the official encoder.

    Raises:
        CheckpointError: The file is missing or no checkpoint.
    """
    state = read_weights(path)
    if not any(key.startswith(ENCODER_PREFIX) for key in state):
        return state
    return {key.removeprefix(ENCODER_PREFIX): value for key, value in state.items() if not key.startswith(_OTHER_PARTS)}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor."""
    return {key: tuple(value.shape) for key, value in state.items()}


def require_same(
    path: Path, name: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a checkpoint of another architecture, and say of which.

    Raises:
        CheckpointError: A key is missing, unknown or misshapen.
    """
    if found == expected:
        return
    missing = [repr(key) for key in expected if key not in found]
    unknown = [repr(key) for key in found if key not in expected]
    misshapen = [
        f"{key!r} {found[key]} instead of {shape}" for key, shape in expected.items() if found.get(key, shape) != shape
    ]
    problems = [
        f"{what} {len(keys)} ({_first(keys)})"
        for what, keys in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
        if keys
    ]
    message = f"{path}: its keys are not those of {name}: {'; '.join(problems)}; {_looks_like(found)}"
    raise CheckpointError(message)


def _first(items: Iterable[str], count: int = 5) -> str:
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def _looks_like(found: Mapping[str, tuple[int, ...]]) -> str:
    """Guess the architecture of a checkpoint from its width and number of blocks, as advice."""
    embedding = found.get("pos_embed", ())
    blocks = {key.split(".")[1] for key in found if key.startswith("blocks.")}
    for name, candidate in ARCHITECTURES.items():
        if embedding[3:] == (candidate.width,) and len(blocks) == candidate.blocks:
            return f"this looks like {name}"
    return "this looks like none of " + ", ".join(ARCHITECTURES)
