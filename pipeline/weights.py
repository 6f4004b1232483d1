"""Files of weights for backbones: read without running code, matched by name and shape, fetched only when asked."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, ConfigError, from_extra

# What torch's unpickler raises on bytes that are no checkpoint, besides what it means to raise.
TORN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
TIMM = "timm:"  # what the names of timm's backbones begin with
_HEADS = ("fc.", "head.", "classifier.", "last_linear.")


def imagenet_file(backbone: str) -> Path:
    """Say where the ImageNet weights of a backbone are kept: torch's own folder, `$TORCH_HOME/hub/checkpoints`.

    Raises:
        ConfigError: There are none for this backbone.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if backbone.startswith(TIMM):
        return folder / f"timm-{backbone.removeprefix(TIMM)}.safetensors"
    return folder / _imagenet_url(backbone).rsplit("/", 1)[-1]


def download_imagenet(backbone: str) -> Path:
    """Fetch the ImageNet weights of a backbone unless they are there.

    torchvision's are checked by the digest in their name, timm's by the hub client.

    Raises:
        ConfigError: There are none, or they cannot be fetched.
    """
    file = imagenet_file(backbone)
    if file.is_file():
        return file
    try:
        if backbone.startswith(TIMM):
            net = import_timm().create_model(backbone.removeprefix(TIMM), pretrained=True, features_only=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            safetensors.torch.save_file(net.state_dict(), partial)
            partial.replace(file)
        else:
            torch.hub.load_state_dict_from_url(
                _imagenet_url(backbone), progress=False, check_hash=True, weights_only=True, map_location="cpu"
            )
    except (OSError, RuntimeError) as error:
        msg = f"The ImageNet weights of {backbone!r} cannot be fetched ({error}): copy them to {str(file)!r} by hand."
        raise ConfigError(msg) from error
    return file


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, hexadecimal; reckoned once per process for as long as the file stays the same."""
    status = file.stat()
    return _sha256(file.resolve(), (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, unchanged: tuple[int, ...]) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read tensors by name from `.safetensors`, or from a torch file that holds nothing but tensors.

    Raises:
        CheckpointError: No such file, or not such a file.
    """
    if not file.is_file():
        msg = f"There is no file of weights at {str(file)!r}: check the path."
        raise CheckpointError(msg)
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, *TORN) as error:
        msg = f"{str(file)!r} cannot be read as weights ({type(error).__name__}): copy or download it again."
        raise CheckpointError(msg) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    named = isinstance(state, Mapping) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        msg = f"{str(file)!r} holds something other than a mapping of names to tensors: save the model's state_dict()."
        raise CheckpointError(msg)
    return dict(state)


def load_weights(net: nn.Module, file: Path) -> None:
    """Load a file into a library's uncut model; a head for other classes is left out and starts anew.

    Raises:
        CheckpointError: The file misses a tensor, or has an unknown or misshapen one.
    """
    given, wanted = read_weights(file), net.state_dict()
    for key in [key for key in given if key.startswith(_HEADS)]:
        if key not in wanted or wanted[key].shape != given[key].shape:
            del given[key]
    missing = [
        key
        for key in wanted.keys() - given.keys()
        if not key.startswith(_HEADS) and not key.endswith("num_batches_tracked")  # younger than some published files
    ]
    misshapen = [key for key in wanted.keys() & given.keys() if wanted[key].shape != given[key].shape]
    for what, keys in (("misses", missing), ("has unknown", given.keys() - wanted.keys()), ("misshapes", misshapen)):
        if keys:
            first = ", ".join(repr(key) for key in sorted(keys)[:3])
            msg = (
                f"{str(file)!r} is of another backbone: it {what} {len(keys)} tensors ({first}). Name its own backbone."
            )
            raise CheckpointError(msg)
    net.load_state_dict(given, strict=False)


def import_timm() -> ModuleType:
    """Import timm, which is an extra.

    Raises:
        ConfigError: It is not installed.
    """
    with from_extra("A backbone named 'timm:...'", "timm"):
        import timm
    module: ModuleType = timm
    return module


def _imagenet_url(backbone: str) -> str:
    import torchvision.models

    try:
        url: str = torchvision.models.get_model_weights(backbone).DEFAULT.url
    except ValueError as error:
        msg = f"There are no ImageNet weights for {backbone!r}: set weights to 'none' or to a local file."
        raise ConfigError(msg) from error
    return url
