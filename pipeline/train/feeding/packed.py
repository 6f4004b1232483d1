"""Packed features on the device: they travel and wait as they are stored, and become numbers there, batch by batch.

A product of float32, rounded to float16, is one rounding a step, so every device gets the bits that `Store.read` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache import SCALE, Store

_AT_ONCE = 1 << 18
"""Numbers that are scaled at a time on the host."""


def arrays_read(store: Store, taps: Sequence[str]) -> tuple[str, ...]:
    """Names of the arrays that the numbers of taps are made of."""
    return tuple(name for tap in taps for name in (tap, tap + SCALE) if name == tap or store.taps[tap].dtype == "int8")


def unpacked(store: Store, taps: Sequence[str], arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of taps (B, C, h, w), of the type `TapSpec.numbers`, on the device of the arrays.

    Args:
        store: Where they come from.
        taps: Their names.
        arrays: Stored rows by name, scales (B, C, 1, 1) among them.
    """
    found = {}
    for tap in taps:
        spec, values = store.taps[tap], arrays[tap]
        numbers = getattr(torch, spec.numbers)
        found[tap] = scaled(values, arrays[tap + SCALE], numbers) if spec.dtype == "int8" else values.to(numbers)
    return found


def scaled(whole: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply int8 numbers (B, C, h, w) by the scales (B, C, 1, 1) of their channels, as float32 rounded to `dtype`.

    The processor does this in pieces that stay in its cache: products of a whole batch would be new memory each time,
    which takes several times as long.
    """
    if whole.device.type != "cpu":
        return (whole * scale).to(dtype)
    made = torch.empty(whole.shape, dtype=dtype)
    cells = whole.shape[2] * whole.shape[3]
    step = max(1, _AT_ONCE // cells)  # channels
    product = torch.empty((min(step, whole.shape[0] * whole.shape[1]), cells))
    numbers, of, out = whole.reshape(-1, cells), scale.reshape(-1, 1), made.view(-1, cells)
    for first in range(0, len(out), step):
        part = slice(first, first + step)
        out[part] = product[: len(out[part])].copy_(numbers[part]).mul_(of[part])
    return made


def read_tensors(store: Store, rows: npt.NDArray[np.int64], taps: Sequence[str]) -> dict[str, Tensor]:
    """Read rows (n, C, h, w) of taps as `Store.read` gives them; torch makes float16 of int8 faster than numpy does."""
    specs = {name: store.arrays[name] for name in arrays_read(store, taps)}
    read = {
        name: torch.empty((len(rows), *spec.shape), dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()
    }
    store.read(rows, tuple(specs), out={name: as_numpy(values) for name, values in read.items()})
    return unpacked(store, taps, read)


def as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The memory of a tensor as a store fills it: bfloat16, which numpy does not know, as its bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
