"""Features of one image in one call, for a notebook: the encoder is loaded once and kept for the next."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import encoders
from pipeline.data import Image, pixels_of
from pipeline.errors import CheckpointError, ConfigError

TAPS = ("patch", "early", "middle", "late", "neck")


def features(
    image: str | os.PathLike[str] | npt.NDArray[Any] | Any,
    encoder: str = "lite_medsam",
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    taps: Sequence[str] = TAPS,
    input_px: int | None = None,
    pool: int = 1,
    precision: str = "float32",
    preprocessing: str | None = None,
    device: str = "auto",
) -> dict[str, npt.NDArray[np.float32]]:
    """Encode one image, as stage one would before it pools and rounds.

    The longer side of the image fills the encoder's square input. Of a wide image only the upper part of each map is
    image, height / width of it; of a tall one only the left part. The rest is padding.

    Args:
        image: A file, an image of Pillow's, or an array: uint8 (H, W) or (H, W, 3).
        encoder: A name that `encoder.name` of a configuration takes, or a published checkpoint of one such as
            `medsam_vit_b`.
        checkpoint: File of weights. None: where `pipeline prepare` puts the published ones; nothing is downloaded here.
        taps: What is wanted of it.
        input_px: Side of its input, px; None is what it was made for.
        pool: Side of a local average, in cells; 1 for the whole map, and `encoder.pool` for what a store holds.
        precision: Type of the matrix products.
        preprocessing: What the weights were trained with; None is what is known of published ones, and else `"sam"`.
        device: As torch names it; `"auto"` is a GPU where there is one.

    Returns:
        By tap, (C, h, w) float32.

    Raises:
        DataError: This is no image, or one that cannot be read.
        ConfigError: There is no such encoder, tap, pool or precision.
        CheckpointError: The weights are not there; the message says how to have them.
    """
    pixels = pixels_of(image)
    name, file, known = _named(encoder, checkpoint)
    status = file.stat()
    loaded = _load(
        name,
        file,
        (status.st_size, status.st_mtime_ns),
        tuple(taps),
        input_px,
        pool,
        precision,
        preprocessing or known,
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
    )
    return _encode(loaded, pixels)


def _encode(encoder: encoders.Encoder, pixels: Image) -> dict[str, npt.NDArray[np.float32]]:
    prepared = encoder.prepare(pixels)
    with torch.no_grad():
        maps = encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]), torch.float32)
    return {tap: values[0].cpu().numpy() for tap, values in maps.items()}


@functools.lru_cache(maxsize=1)
def _load(
    name: str,
    file: Path,
    stamp: tuple[int, int],
    taps: tuple[str, ...],
    input_px: int | None,
    pool: int,
    precision: str,
    preprocessing: str,
    device: str,
) -> encoders.Encoder:
    """Load an encoder, or give the last one if it is the same; `stamp` tells files of one name apart."""
    return encoders.build_encoder(
        name,
        checkpoint=file,
        taps=taps,
        input_px=input_px,
        pool=pool,
        precision=precision,
        preprocessing=preprocessing,
        device=device,
    )


def _named(encoder: str, checkpoint: str | os.PathLike[str] | None) -> tuple[str, Path, str]:
    """The architecture, its file of weights, which is there, and what they were trained with.

    Raises:
        ConfigError: There is no such encoder, or it reads no images.
        CheckpointError: The file is not there.
    """
    published = encoders.PUBLISHED.get(encoder)
    name, known = (encoder, "sam") if published is None else (published.architecture, published.preprocessing)
    if encoders.family_of(name).reads != "image":
        message = f"the encoder {name!r} reads masks and not images: choose another one"
        raise ConfigError(message)
    if checkpoint is not None:
        file, remedy = Path(checkpoint), "check the path"
    elif published is not None:
        file = encoders.checkpoint_path(encoder)
        remedy = (
            f"fetch them ( `pipeline.encoders.fetch_checkpoint({encoder!r})` or `pipeline prepare`, or put them there"
        )
    else:
        message = (
            f"there are no published weights of {encoder!r}: give checkpoint=, a file of them, or choose one of "
            f"{', '.join(encoders.PUBLISHED)}"
        )
        raise CheckpointError(message)
    if not file.is_file():
        message = f"the weights of {encoder!r} are not at {str(file)!r}: {remedy}"
        raise CheckpointError(message)
    return name, file, known
