"""The types that features were rounded to on their way into a store, as its fingerprint tells them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache.description import PACKED, SCALE, TapSpec, type_for
from cache.packing import Array, pack, unpack

_OF = " of "
_COARSE = ("int8", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Roundings:
    """Types one after another, the last one first: `float16 of int8` is what an int8 store gave as float16.

    Attributes:
        said: How a fingerprint says it (its key `dtype`).
    """

    said: str

    @property
    def steps(self) -> tuple[str, ...]:
        """The types, the first one first."""
        return tuple(reversed(self.said.split(_OF)))

    @property
    def given(self) -> str:
        """The type of the features as the encoder gives them, before the first rounding that a store does."""
        first = self.steps[0]
        return PACKED.get(first, first)

    @property
    def coarsest(self) -> str:
        """The type whose rounding the features show: those of `float16 of int8` are int8's."""
        return min(self.steps, key=lambda dtype: _COARSE.index(dtype) if dtype in _COARSE else len(_COARSE))

    def then(self, dtype: str) -> Roundings:
        """These, and then another.

        A type that is made from just the features that are stored is the plain one: an int8 store made from a float16
        store is the store that was extracted as int8.
        """
        plain = dtype == self.said or PACKED.get(dtype) == self.said
        return Roundings(dtype if plain else f"{dtype}{_OF}{self.said}")

    def apply(self, values: Array) -> Array:
        """Round features that lie in no store to what is read from a store that does all this.

        Args:
            values: (n, C, h, w) of the type `given`.
        """
        for dtype in self.steps:
            shape = values.shape[1], values.shape[2], values.shape[3]
            tap = TapSpec(*shape, type_for(shape, dtype))
            values = values.astype(tap.numbers, copy=False)
            if tap.dtype in PACKED:
                arrays = pack("tap", tap, values)
                values = np.empty(values.shape, tap.numbers)
                unpack(tap, arrays["tap"], arrays.get("tap" + SCALE), values)
        return values
