"""The known mask as a tap in place of an encoder: would a perfect map help? For experiments, not for patients.

The store is like any other: rows of the same ids and pixel digests, so that everything downstream takes it. Which
channels it has is ours: `inside` is the share of a cell that the finding covers, `edge` how much of its outline runs
through the cell (1 for a straight line across), `around` the share of a cell that lies outside but within a tenth of
the image's longer side of the finding, and `outside` the share that the finding does not cover.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

import cache
from pipeline.data import Dataset, Mask
from pipeline.data.scan import memory_of, scan
from pipeline.errors import ConfigError, DataError
from pipeline.extract.extract import ExtractReport
from pipeline.extract.wanted_rows import Rows
from pipeline.overlap import ahead, threads
from pipeline.progress import Progress, silent

NAME = "mask"  # of the encoder that is none, and of its one tap
CHANNELS = ("inside", "edge", "around", "outside")
_VERSION = 1  # raise when the same masks give other numbers
_PATCH_PX = 16  # as SAM's, so that `input_px` and `pool` give the grid that they give there
_INPUT_PX = 256
_AROUND = 0.1  # of the longer side


def grid_cells(taps: Sequence[str], input_px: int | None, pool: int) -> int:
    """Give the side of the grid: the input's side in patches of 16 px, over the pool.

    Raises:
        ConfigError: Another tap than `mask` is asked for, or the grid is not whole.
    """
    if tuple(taps) != (NAME,):
        message = f"encoder.taps: got {list(taps)!r}; the encoder {NAME!r} has one tap: set encoder.taps to [{NAME}]"
        raise ConfigError(message)
    side_px = _INPUT_PX if input_px is None else input_px
    if side_px % (_PATCH_PX * pool):
        message = (
            f"encoder.input_px: {side_px!r} px do not divide into cells of {_PATCH_PX} x {pool} px; "
            f"choose a multiple of {_PATCH_PX * pool}, or another encoder.pool"
        )
        raise ConfigError(message)
    return side_px // _PATCH_PX // pool


def extract_masks(
    dataset: Dataset,
    path: Path,
    *,
    grid: int,
    reading: Mapping[str, Any],
    dtype: str = "float16",
    shard_mib: int = 64,
    workers: int = 2,
    replace: bool = False,
    strict: bool = False,
    recheck: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> ExtractReport:
    """Leave a store of the data set's masks at `path`, with the one tap `mask`.

    The fingerprint holds a digest of all masks: where one has changed, the store is another, and has to be replaced.

    Args:
        dataset: Images with masks.
        path: `NAME.zarr` or `NAME.h5`.
        grid: Cells along each side; they cover the whole image, whatever its shape.
        reading: How files become RGB (see `pipeline.data.reading_rules`).
        dtype: Of the stored numbers.
        shard_mib: Size of the shard files, MiB.
        workers: Decoding threads.
        replace: Swap out a store of another fingerprint instead of refusing.
        strict: Stop at the first image that cannot be read instead of setting it aside.
        recheck: Decode every image again.
        provenance: What the store should remember about its making.
        progress: Called after each image.

    Raises:
        DataError: A sample has no mask, or no image can be read.
        cache.StoreError: The store refuses, for example for another fingerprint.
    """
    _check_masks(dataset)
    seen = scan(
        dataset,
        memory_of(path),
        recheck=recheck,
        workers=workers,
        strict=strict,
        progress=progress,
    )
    rows = Rows(seen)
    maps = np.empty((len(rows), len(CHANNELS), grid, grid), dtype)
    digest = hashlib.sha256()
    with threads(workers, "mask") as pool:
        masks = ahead(lambda index: _mask_of(dataset, int(index)), seen.rows, pool, depth=4 * workers)
        for number, (mask, row) in enumerate(zip(masks, rows, strict=True)):
            digest.update(f"{row.id} {mask.shape} ".encode() + np.packbits(mask).tobytes())
            maps[number] = map_of(mask, grid).numpy()
            progress("mask", number + 1, len(rows))
    fingerprint = {
        "encoder": NAME,
        "masks_sha256": digest.hexdigest(),
        "taps": {NAME: list(CHANNELS)},
        "grid": grid,
        "version": _VERSION,
        "reading": dict(reading),
        "dtype": dtype,
    }
    with cache.create_store(
        path,
        fingerprint=cache.Fingerprint(fingerprint),
        taps={NAME: cache.TapSpec(len(CHANNELS), grid, grid, dtype)},
        rows=rows,
        provenance=provenance,
        shard_mib=shard_mib,
        replace=replace,
    ) as writer:
        encoded = 0
        for plan in writer.claims():
            at = list(plan.rows)
            writer.write(plan, {NAME: maps[at]}, np.ones((len(at), 2), np.float32))
            encoded += len(at)
        writer.commit().close()
    return ExtractReport(path, len(rows), encoded, writer.reused, dict(seen.set_aside), {})


def map_of(mask: Mask, grid: int) -> Tensor:
    """Turn a mask into the channels of the tap.

    Args:
        mask: bool (H, W).
        grid: Cells along each side.

    Returns:
        float32 (4, grid, grid) in [0, 1]: `CHANNELS`.
    """
    finding = torch.from_numpy(mask.astype(np.float32))[None, None]  # (1, 1, H, W)
    reach = max(1, round(_AROUND * max(mask.shape)))
    inside = F.adaptive_avg_pool2d(finding, grid)
    around = F.adaptive_avg_pool2d(_grown(finding, reach) - finding, grid)
    outline = F.adaptive_avg_pool2d(_grown(finding, 1) - finding, grid)  # one pixel wide
    side = sum(mask.shape) / 2 / grid  # pixels of an outline that crosses a cell
    return torch.cat([inside, (outline * side).clamp(max=1), around, 1 - inside], dim=1)[0]


def _grown(finding: Tensor, reach: int) -> Tensor:
    """Grow a mask (1, 1, H, W) of 0 and 1 by a number of pixels to every side."""
    across = F.max_pool2d(finding, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    return F.max_pool2d(across, (2 * reach + 1, 1), stride=1, padding=(reach, 0))


def _check_masks(dataset: Dataset) -> None:
    """Refuse a data set without masks before its images are read; a layout has masks for all samples or for none."""
    if dataset.mask(0) is None:
        message = (
            f"{dataset.name!r} has no masks, and the encoder {NAME!r} makes its tap from them: "
            f"name data.mask_column of a CSV table, take the demo data, or choose another encoder"
        )
        raise DataError(message)


def _mask_of(dataset: Dataset, index: int) -> npt.NDArray[np.bool_]:
    mask = dataset.mask(index)
    if mask is None:
        message = f"sample {dataset.samples[index].id!r} has no mask: give it one, or leave it out of the data set"
        raise DataError(message)
    return mask
