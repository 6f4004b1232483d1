"""How a run came about: data in numbers, versions, device, time. For the reader, and never compared."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache import Store
from pipeline.data import Dataset
from pipeline.data.dataset import SPLITS, positives

_SOFTWARE = ("slca-pipeline", "torch", "torchvision", "numpy", "pillow", "segment-anything")


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _SOFTWARE}}


def device_name(device: str) -> str:
    """A device as a person would name it: the model of the accelerator, or of the processor."""
    import torch  # here, so that asking for versions stays cheap

    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    if where.type != "cpu":
        return str(where)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def data_in_numbers(dataset: Dataset) -> dict[str, Any]:
    """Samples, groups, and samples by class, of each split.

    Returns:
        JSON values: `name`, `samples`, `grouped` (whether groups are known: any is not just its sample's own id), and
        `splits`, by name `samples`, `groups` and `classes`.
    """
    splits = {}
    for split in SPLITS:
        samples = [dataset.samples[i] for i in dataset.indices(split)]
        counts = dict.fromkeys(dataset.class_names, 0)
        for sample in samples:
            for number in positives(sample.label):
                counts[dataset.class_names[number]] += 1
        groups = len({sample.group for sample in samples})
        splits[split] = {"samples": len(samples), "groups": groups, "classes": counts}
    return {
        "name": dataset.name,
        "samples": len(dataset.samples),
        "grouped": any(sample.group != sample.id for sample in dataset.samples),
        "splits": splits,
    }


def of_training(
    dataset: Dataset,
    store: Store | None,
    history: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    trained_on: int,
    device: str,
) -> dict[str, Any]:
    """What `model.json` says of how the model came about.

    Args:
        dataset: What it was trained on.
        store: Its features; None without gates.
        history: One row per epoch.
        settings: Everything that the result depends on.
        trained_on: Samples it was trained on.
        device: Where.

    Returns:
        JSON values: `settings`, `data` (see `data_in_numbers`), `trained_on`, `seconds` of all epochs, `device`,
        `software`, and `store`: its `rows`, `version` and own provenance.
    """
    return {
        "settings": dict(settings),
        "data": data_in_numbers(dataset),
        "trained_on": trained_on,
        "seconds": float(sum(row["seconds"] for row in history)),
        "device": device_name(device),
        "software": versions(),
        "store": None
        if store is None
        else {"rows": len(store), "version": store.version, "provenance": dict(store.provenance)},
    }
