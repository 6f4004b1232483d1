"""A model that dies of an image, for other processes, where it is found by the name of this module."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.stages.predictions import OfRun


@dataclass(frozen=True)
class Mortal(OfRun):
    """A run that takes its process with it when it is asked about one image."""

    deadly: str = ""

    def __call__(self) -> Any:
        predictor = super().__call__()

        def predict(names: Sequence[Any]) -> Mapping[str, Any]:
            if self.deadly in map(str, names):
                os._exit(7)
            return predictor(names)

        return predict
