"""How much each gate varies over an image, and which gates are flat: a gate that is the same everywhere does nothing.

It is measured while images are scored, on gates that are computed anyway; the cost is that of reading them once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.classifier import Classifier
from pipeline.model.slca import spread

FLAT = 0.05  # spread below which a gate is called flat, of at most .5: our choice
_COLUMN = "gate_spread"


class Spreads:
    """Sums over images of the spread of each gate (`pipeline.model.slca.spread`)."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.images = 0

    def add(self, name: str, gate: Tensor, extents: Tensor | None) -> None:
        """Add the gates (B, C_stage, h, w) of a batch; those with one cell have no places to differ in."""
        if gate.shape[-2:] != (1, 1):
            self.sums[name] = self.sums.get(name, 0.0) + float(spread(gate, extents).sum())


@contextmanager
def watched(classifier: Classifier) -> Iterator[Spreads]:
    """Measure the gates of a classifier on whatever it classifies, until the block ends."""
    spreads = Spreads()

    def watch(name: str) -> Any:
        def keep(module: nn.Module, given: Any, found: tuple[Tensor, Tensor | None]) -> None:
            spreads.add(name, *found)

        return keep

    def count(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        spreads.images += len(given[0])

    handles = [
        slca.register_forward_hook(watch(f"{tap}_{stage}"))
        for (tap, stage), slca in zip(classifier.options.gates, classifier.gates, strict=True)
    ]
    if handles:
        handles.append(classifier.register_forward_pre_hook(count))
    try:
        yield spreads
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_of(parts: Sequence[Spreads]) -> dict[str, float]:
    """The mean spread of each gate, `TAP_STAGE`, over the images of all parts."""
    images = sum(part.images for part in parts)
    return {name: sum(part.sums[name] for part in parts) / images for name in parts[0].sums} if images else {}


def columns(spreads: Mapping[str, float]) -> dict[str, float]:
    """Columns of the history: `gate_spread`, the smallest, as a mean would hide a dead gate; and each gate's own."""
    if not spreads:
        return {}
    return {_COLUMN: min(spreads.values()), **{f"{_COLUMN}_{name}": value for name, value in spreads.items()}}


def from_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Find what `columns` made in a row of a history: the spread of each gate, `TAP_STAGE`."""
    return {key.removeprefix(f"{_COLUMN}_"): row[key] for key in row if key.startswith(f"{_COLUMN}_")}


def flat_gates(figures: Mapping[str, Any]) -> str:
    """Say in a sentence which gates of a run are flat; empty where none is, or where that was not measured.

    Args:
        figures: Of a finished run, `metrics` of its description.
    """
    flat = {name: value for name, value in figures.get(_COLUMN, {}).items() if value < FLAT}
    if not flat:
        return ""
    names = ", ".join(f"{name} ({value:.3f})" for name, value in flat.items())
    which = f"{len(flat)} of {len(figures[_COLUMN])} gates ended" if len(figures[_COLUMN]) > 1 else "The gate ended"
    return (
        f"{which} flat and so change next to nothing: {names}. They vary over an image by less than {FLAT:g} "
        f"(standard deviation over the cells of an image; mean over channels and val images)."
    )
