"""Pooled features of the rows of a store, a few rows in memory at a time: what late fusion and a probe read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache import Store
from pipeline.errors import RunError
from pipeline.model.pooled import pool
from pipeline.progress import Progress, silent
from pipeline.train.feeding.packed import read_tensors

_AT_ONCE_BYTES = 2**26  # of features between the store and their pool


def pool_rows(store: Store, rows: npt.NDArray[np.int64], taps: Sequence[str], *, progress: Progress = silent) -> Tensor:
    """Pool stored features (see `pipeline.model.pooled.pool`), not standardised.

    Args:
        store: Where they are.
        rows: (n,), which.
        taps: Their names, in the order of the result.
        progress: Called after each piece, where there are several.

    Returns:
        (n, D) float32, the taps one after the other.

    Raises:
        RunError: A feature is not finite.
    """
    extents = torch.from_numpy(np.asarray(store.extents)[rows])
    whole = bool((extents == 1).all())
    row_bytes = sum(
        spec.channels * spec.height * spec.width * np.dtype(spec.numbers).itemsize
        for spec in (store.taps[tap] for tap in taps)
    )
    at_once = max(1, _AT_ONCE_BYTES // row_bytes)
    pieces = []
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        read = read_tensors(store, rows[some], taps)
        parts = [pool(read[tap], None if whole else extents[some]) for tap in taps]
        for tap, part in zip(taps, parts, strict=True):
            _refuse_infinite(store, rows[some], tap, part)
        pieces.append(torch.cat(parts, dim=1))
        if len(rows) > at_once:
            progress("pool", min(start + at_once, len(rows)), len(rows))
    return torch.cat(pieces)


def _refuse_infinite(store: Store, rows: npt.NDArray[np.int64], tap: str, pooled: Tensor) -> None:
    bad = np.flatnonzero(~pooled.isfinite().all(dim=1).numpy())
    if len(bad):
        msg = (
            f"The stored features of tap {tap!r} are not finite in {len(bad)} of {len(rows)} samples, "
            f"{store.ids[int(rows[bad[0]])]!r} for one: extract them again, or leave the tap out."
        )
        raise RunError(msg)
