"""Two stages: features of a frozen Segment Anything encoder, then SLCA classifiers on top of them.

The door for Python: `features` encodes an image, `FeatureDataset` feeds a store to torch, and `gate` puts SLCA on a
classifier of one's own. Each is looked up when it is first used, so that importing `pipeline` stays cheap; the rooms
below are for whoever builds on a part of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.extract.one_image import features
    from pipeline.model.gated import gate
    from pipeline.train.feeding.feature_dataset import FeatureDataset

_MODULES = {
    "FeatureDataset": "train.feeding.feature_dataset",
    "features": "extract.one_image",
    "gate": "model.gated",
}

__all__ = ["FeatureDataset", "features", "gate"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
