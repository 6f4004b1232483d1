"""Features in fewer bytes: int8 with a scale for each row and channel, bfloat16 as its bits; and back, at memory speed.

A packed tap is made from features of `TapSpec.numbers`. Beside it lie, each as an array of its own, the scales
(`TAP.scale`, int8 only) and how far each row is from what it was made from (`TAP.error`).

int8: scale = float32(max |x| of the channel) / 127, and x is stored as x / scale rounded to the nearest whole number,
half to even; a channel of zeros has the scale 0. A number is read as float32(int8) * scale, and as float16 that rounded
once more. A channel with a number that is not finite has the scale NaN, and is NaN throughout when it is read. All of
this is float32 arithmetic with one rounding a step, so numpy and torch, on whichever device, get the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import ERROR, PACKED, SCALE, TapSpec
from cache.errors import StoreError

Array = npt.NDArray[Any]

_LEVELS = np.float32(127)
_AT_ONCE = 1 << 16
"""Numbers that are worked on at a time: with what is kept of each meanwhile, what a processor's cache holds."""

_HALF_BIAS = np.float32(2.0**-112)
"""What brings a float32 that is none of float16's subnormals to the exponent that float16 has for it."""
_LEAST_NORMAL = np.float32(2.0**-14)
_MOST_SCALE = np.float32(515.8)
"""127 times this is still rounded to the largest float16."""
_DROPPED, _ONE, _BELOW_HALF = np.uint32(13), np.uint32(1), np.uint32((1 << 12) - 1)
"""Bits that float32 has more than float16, and how just under half of their worth is spelled."""
_SIGN = np.int16(-0x8000)


def pack(name: str, tap: TapSpec, values: Array) -> dict[str, Array]:
    """The arrays that a store keeps of a tap's features.

    Args:
        name: Of the tap.
        tap: Its shape and type.
        values: (n, C, h, w) of the type `tap.numbers`.

    Returns:
        By name of the array, (n, ...) of its type; the features themselves where the tap is not packed.
    """
    if tap.dtype not in PACKED:
        return {name: values}
    shape = (len(values), *tap.shape)
    packed = {name: np.empty(shape, tap.array_dtype), name + ERROR: np.empty((len(values), 1, 1, 1), np.float16)}
    if tap.dtype == "int8":
        packed[name + SCALE] = np.empty((len(values), tap.channels, 1, 1), np.float32)
    read = np.empty(tap.shape, np.float32)
    with np.errstate(all="ignore"):  # numbers that are not finite are kept so
        for i, row in enumerate(values):
            wide = row.astype(np.float32)
            if tap.dtype == "int8":
                _quantise(wide, packed[name][i], packed[name + SCALE][i], read)
                scale_up(packed[name][i], packed[name + SCALE][i], read)
            else:
                packed[name][i] = _bits(wide)
                widen(packed[name][i], read)
            packed[name + ERROR][i] = _error(wide, read)
    return packed


def packed_all(arrays: Mapping[str, TapSpec], features: Mapping[str, Array]) -> dict[str, Array]:
    """What a store keeps of features by tap; those of a packed tap that are stored numbers already stay as they are.

    Raises:
        StoreError: The features of a packed tap have another shape or type than it is made from.
    """
    found: dict[str, Array] = {}
    for name, values in features.items():
        tap = arrays.get(name)
        if tap is None or tap.dtype not in PACKED or values.dtype == tap.array_dtype:
            found[name] = values
            continue
        if values.shape[1:] != tap.shape or values.dtype != tap.numbers:
            message = (
                f"tap {name!r}: got a {values.dtype} array of shape {values.shape}; expected {tap.numbers} of shape "
                f"(n, {', '.join(map(str, tap.shape))}), of which {tap.dtype} is made"
            )
            raise StoreError(message)
        found |= pack(name, tap, values)
    return found


def _quantise(row: Array, whole: Array, scale: Array, work: Array) -> None:
    """Fill `whole` (C, h, w) int8 and `scale` (C, 1, 1) float32 from a row (C, h, w) float32; `work` is overwritten."""
    np.divide(np.abs(row, out=work).max((1, 2), keepdims=True), _LEVELS, out=scale)
    scale[~np.isfinite(scale)] = np.nan
    np.divide(row, scale, out=work)
    np.clip(np.rint(work, out=work), -_LEVELS, _LEVELS, out=work)
    work[~(scale > 0)[:, 0, 0]] = 0  # nothing, or nothing that can be told
    np.copyto(whole, work, casting="unsafe")


def _bits(row: Array) -> Array:
    """The upper half of the float32 numbers, rounded half to even; what is no number stays none."""
    found = np.ascontiguousarray(row).view(np.uint32)
    rounded = (found + (((found >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(row), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _error(row: Array, read: Array) -> float:
    """Root mean square difference over the standard deviation of the row, 0 where that is 0 or next to it.

    Sums are of float64 and it is kept as float16, so that their order does not show. `read` is overwritten.
    """
    mean = float(row.mean(dtype=np.float64))
    np.subtract(row, read, out=read)
    away = float(np.square(read, out=read).mean(dtype=np.float64))
    spread = float(np.square(row, out=read).mean(dtype=np.float64)) - mean**2
    constant = spread <= 1e-12 * mean**2  # but for the last bits of the sums
    return 0.0 if constant else math.sqrt(away / spread)


def scale_up(whole: Array, scale: Array, out: Array) -> None:
    """Multiply int8 numbers by the scales of their channels.

    Args:
        whole: (..., C, h, w) int8, contiguous.
        scale: (..., C, 1, 1) float32.
        out: (..., C, h, w) float32 or float16, contiguous; filled.
    """
    cells = whole.shape[-1] * whole.shape[-2]
    numbers, of, target = whole.reshape(-1, cells), scale.reshape(-1, 1), out.reshape(-1, cells)
    step = max(1, _AT_ONCE // cells)
    into_half = None if out.dtype == np.float32 else _Halves(min(step, len(numbers)), cells)
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, len(numbers), step):
            part = slice(first, first + step)
            if into_half is None:
                np.copyto(target[part], numbers[part])
                np.multiply(target[part], of[part], out=target[part])
            else:
                into_half.fill(numbers[part], of[part], target[part])


class _Halves:
    """Makes float16 of int8 numbers and scales, with room for what is kept meanwhile.

    numpy's own float16 is made number by number, and a table of 256 numbers a channel is looked up no faster than this.
    Here a product gets the exponent of float16 at once, so that its bits, rounded half to even, only need to be moved;
    the sign is added last. That fails where a product would be a subnormal of float16 or none of its numbers: such
    channels are made again in numpy's way.
    """

    def __init__(self, rows: int, cells: int) -> None:
        """Take room for (rows, cells) numbers."""
        self._wide = np.empty((rows, cells), np.float32)
        self._last = np.empty((rows, cells), np.uint32)
        self._sign = np.empty((rows, cells), np.int16)

    def fill(self, numbers: Array, scale: Array, out: Array) -> None:
        """Fill `out` (m, k) float16 from `numbers` (m, k) int8 and `scale` (m, 1) float32."""
        count, half = len(numbers), out.view(np.uint16)
        product, odd, sign = self._wide[:count], self._last[:count], self._sign[:count]
        np.copyto(product, numbers)
        np.multiply(product, scale * _HALF_BIAS, out=product)
        bits = product.view(np.uint32)
        np.right_shift(bits, _DROPPED, out=odd)
        np.bitwise_and(odd, _ONE, out=odd)
        np.add(odd, _BELOW_HALF, out=odd)
        np.add(bits, odd, out=bits)
        np.right_shift(bits, _DROPPED, out=bits)
        np.copyto(half, bits, casting="unsafe")
        np.copyto(sign, numbers)
        np.bitwise_and(sign, _SIGN, out=sign)
        np.bitwise_or(half, sign.view(np.uint16), out=half)
        other = ~(((scale >= _LEAST_NORMAL) & (scale <= _MOST_SCALE)) | (scale == 0))[:, 0]
        if other.any():
            out[other] = numbers[other] * scale[other]


def widen(bits: Array, out: Array) -> None:
    """Make float32 numbers of the bits of bfloat16, uint16 of the same shape; exact."""
    wide = out.view(np.uint32)
    np.copyto(wide, bits)
    np.left_shift(wide, 16, out=wide)


def unpack(tap: TapSpec, stored: Array, scale: Array | None, out: Array) -> None:
    """Fill `out` (n, C, h, w) with the numbers of stored rows of a packed tap; see `scale_up` and `widen`."""
    if scale is not None:
        scale_up(stored, scale, out)
    else:
        widen(stored, out)


def whole_error(errors: Array) -> float:
    """Root mean square of the finite errors of rows, to three digits; an exact sum does not depend on their order."""
    squares = errors[np.isfinite(errors)].astype(np.float64) ** 2
    return float(f"{math.sqrt(math.fsum(squares.tolist()) / max(1, len(squares))):.3g}")
