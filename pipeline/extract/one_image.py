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
from pipeline.errors import ConfigError

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

    SAM and its kin are given the image with its longer side filling their square input: of a wide one only the upper
    part of each map is image then, height / width of it; of a tall one only the left part. The rest is padding. SAM 2
    is given the image squeezed to a square, and its maps are image all over.

    Args:
        image: A file, an image of Pillow's, or an array: uint8 (H, W) or (H, W, 3).
        encoder: A name that `encoder.name` of a configuration takes, or a published checkpoint of one such as
            `medsam_vit_b`.
        checkpoint: File of weights, or what else `encoder.checkpoint` of a configuration takes. None: the published
            ones, where `pipeline prepare` puts them; nothing is downloaded here.
        taps: What is wanted of it.
        input_px: Side of its input, px; None is what it was made for.
        pool: Side of a local average, in cells; 1 for the whole map, and `encoder.pool` for what a store holds.
        precision: Type of the matrix products.
        preprocessing: What the weights were trained with; None is what is known of the published ones.
        device: As torch names it; `"auto"` is a GPU where there is one.

    Returns:
        By tap, (C, h, w) float32.

    Raises:
        DataError: This is no image, or one that cannot be read.
        ConfigError: There is no such encoder, tap, pool or precision.
        CheckpointError: The weights are not there; the message says how to have them.
    """
    pixels = pixels_of(image)
    named = encoder if checkpoint is None else str(checkpoint)
    published = encoders.PUBLISHED.get(encoder)
    name = encoder if published is None else published.architecture
    if encoders.family_of(name).reads != "image":
        message = f"the encoder {name!r} reads masks and not images: choose another one"
        raise ConfigError(message)
    if preprocessing is None and named in encoders.PUBLISHED:
        preprocessing = encoders.PUBLISHED[named].preprocessing
    file = encoders.present_weights(name, Path(named))
    status = file.stat()
    loaded = _load(
        name,
        file,
        (status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        tuple(taps),
        input_px,
        pool,
        precision,
        preprocessing,
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
    stamp: tuple[int, int, int],
    taps: tuple[str, ...],
    input_px: int | None,
    pool: int,
    precision: str,
    preprocessing: str | None,
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
