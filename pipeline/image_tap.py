"""The images themselves as one more tap of a store, `image`: decoding once for everybody, at the price of pixel data.

They are resized as stage two would (`pipeline.data.resize`) and kept as bytes, so a run whose images have that side
trains on the very same pixels without reading a file. Off by default: features hardly show a person, images do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cache

IMAGE = "image"
FIELD = "image"  # of the fingerprint
_RULE = {"resize": "whole image to a square, bilinear with smoothing, bytes", "version": 1}


def describe(image_px: int | None) -> dict[str, Any]:
    """The part of a fingerprint that says how images were stored; nothing where none are."""
    return {} if image_px is None else {FIELD: {"side_px": image_px, **_RULE}}


def specify(image_px: int | None) -> dict[str, cache.TapSpec]:
    """The array of images (3, S, S); none where none are stored."""
    return {} if image_px is None else {IMAGE: cache.TapSpec(3, image_px, image_px, "uint8")}


def stored_px(taps: Mapping[str, cache.TapSpec]) -> int | None:
    """Side of the images that a store holds, px; None if it holds none, or others than this module describes."""
    side = taps[IMAGE].width if IMAGE in taps else None
    return side if side is not None and taps[IMAGE] == specify(side)[IMAGE] else None


def of_features(fingerprint: cache.Fingerprint) -> cache.Fingerprint:
    """What the features depend on: the same whether images lie beside them or not."""
    return cache.Fingerprint({key: value for key, value in fingerprint.fields.items() if key != FIELD})
