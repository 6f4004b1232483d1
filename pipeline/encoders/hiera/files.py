"""Where SAM 2's two files lie, as transformers saves them: in a folder, or in the Hugging Face hub's cache. No torch.

Nothing is fetched but by `fetch_weights`, which `pipeline prepare` calls.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.encoders.hiera.recipe import HIERAS
from pipeline.encoders.weight_files import user_folder, weights_sha256
from pipeline.errors import CheckpointError, needs_extra
from pipeline.progress import Progress, silent

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def hub_name(checkpoint: Path) -> str | None:
    """The name on the Hugging Face hub that a configured checkpoint may be; None if it can only be a folder here.

    An encoder's own name, such as `sam2.1_hiera_tiny`, stands for the one that its authors published.
    """
    named = checkpoint.as_posix()
    if named in HIERAS:
        return f"facebook/{named.replace('_', '-')}"
    return named if _HUB_NAME.fullmatch(named) and not checkpoint.exists() else None


def weights_file(encoder: str, checkpoint: Path) -> Path:
    """The file of weights that a configured checkpoint means, there or not; nothing is fetched.

    Args:
        encoder: Its name.
        checkpoint: A folder with `config.json` and `model.safetensors`, that file itself, or a name on the hub, of
            which the hub's own cache on this machine is looked at. An encoder's own name is a folder among the
            published weights, too.
    """
    folder = checkpoint
    if checkpoint.as_posix() in HIERAS and not checkpoint.is_dir():
        folder = user_folder() / "weights" / checkpoint
    if checkpoint.suffix == ".safetensors":
        return checkpoint
    name = hub_name(checkpoint)
    cached = None if name is None or folder.is_dir() else _cached(name)
    return Path(cached) if cached else folder / WEIGHTS_FILE


def absent(encoder: str, checkpoint: Path) -> str:
    """What to say where there is no file of weights."""
    name = hub_name(checkpoint)
    on_hub = f", or fetch {name!r} from the Hugging Face hub with `pipeline prepare`" if name else ""
    return f"{_put(encoder, checkpoint)}{on_hub}"


def _put(encoder: str, checkpoint: Path) -> str:
    return (
        f"there is no {str(weights_file(encoder, checkpoint))!r}: put {CONFIG_FILE} and {WEIGHTS_FILE} there as "
        f"transformers saves them, such as those of facebook/sam2.1-hiera-tiny (pickled weights, .pt or .bin, are not "
        f"read)"
    )


def fetch_weights(encoder: str, checkpoint: Path, *, progress: Progress = silent) -> Path:
    """Have the two files, from the Hugging Face hub if they are not here, in the cache of the hub's client.

    Args:
        encoder: Its name.
        checkpoint: See `weights_file`.
        progress: Called after each of the two.

    Returns:
        The file of weights, whose digest is the one that the hub has for it.

    Raises:
        CheckpointError: They cannot be had; the message says which file to put where.
    """
    file, name = weights_file(encoder, checkpoint), hub_name(checkpoint)
    if file.is_file():
        return file
    if name is None:
        message = f"encoder.checkpoint: {absent(encoder, checkpoint)}"
        raise CheckpointError(message)
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(needs_extra(f"{name!r} on the Hugging Face hub", "sam2")) from None
    huggingface_hub.utils.disable_progress_bars()
    progress("download", 0, 2)
    try:
        huggingface_hub.hf_hub_download(name, CONFIG_FILE)
        progress("download", 1, 2)
        file = Path(huggingface_hub.hf_hub_download(name, WEIGHTS_FILE))
    except (OSError, ValueError) as error:  # the client's own are of these kinds
        message = f"encoder.checkpoint: {name!r} cannot be fetched ({error}); {_put(encoder, checkpoint)}"
        raise CheckpointError(message) from None
    progress("download", 2, 2)
    _require_whole(file)
    return file


def _require_whole(file: Path) -> None:
    """Refuse a damaged download: the cache names a large file by the digest that the hub has for it.

    Raises:
        CheckpointError: The file has another one.
    """
    named = file.resolve().name
    if re.fullmatch("[0-9a-f]{64}", named) and weights_sha256(file) != named:
        file.resolve().unlink()
        message = f"{file}: what came from the hub has another digest than {named}; run `pipeline prepare` again"
        raise CheckpointError(message)


def _cached(name: str) -> str | None:
    """The weights of a name on the hub as its client keeps them on this machine."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = [try_to_load_from_cache(name, file) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return found[1] if all(isinstance(file, str) for file in found) else None
