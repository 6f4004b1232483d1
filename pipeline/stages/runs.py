"""All runs below a folder as rows of one table: what each is, in words, what it came to, when, and on which store."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.errors import RunError
from pipeline.train import trained_model

Report = dict[str, Any]
_SCORES = ("auc", "acc", "balanced_acc")


def list_runs(folder: Path) -> Report:
    """Look at every run below a folder, the oldest first.

    Args:
        folder: Of runs, of a study, or of anything that has some below it.

    Returns:
        JSON values: `folder`, and `runs`: `run`, `state`, `data`, `model`, `training`, `val` and `test` by score with
        `value`, and `low` and `high` once evaluated, `seconds`, `when`, and `store`: its `encoder`, `data_set`,
        `version`.

    Raises:
        RunError: There is no such folder, or no run below it.
    """
    if not folder.is_dir():
        message = f"there is no folder {str(folder)!r} here: name the folder of your runs, or train one"
        raise RunError(message)
    runs = [_row(found) for found in _run_folders(folder)]
    if not runs:
        message = f"no run lies below {str(folder)!r}: name the folder of your runs, or train one"
        raise RunError(message)
    return {"folder": str(folder), "runs": sorted(runs, key=lambda row: (row["when"] or "", row["run"]))}


def write_runs(report: Mapping[str, Any], path: Path) -> Path:
    """Write the runs as a table with a column per figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_csv(path, [_flat(row) for row in report["runs"]])
    return path


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders that hold the settings or the model of a run; what lies inside a run is its own business."""
    for parent, below, files in os.walk(folder):
        if "settings.json" in files or "model.json" in files:
            below.clear()
            yield Path(parent)
        else:
            below[:] = sorted(name for name in below if not name.startswith("."))


def _row(folder: Path) -> Report:
    """One run; what cannot be read is said in its place."""
    row: Report = {"run": str(folder), "state": "done", "data": None, "model": None, "training": None}
    row |= {"val": {}, "test": {}, "seconds": None, "when": _when(folder), "store": None}
    try:
        row |= _of_finished(folder) if (folder / "model.json").is_file() else _of_unfinished(folder)
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        row["state"] = f"cannot be read ({' '.join(str(error).split()):.80})"
    return row


def _of_finished(folder: Path) -> Report:
    description = trained_model.load_description(folder)
    provenance = description.provenance
    settings = provenance.get("settings") or {}
    store, features = provenance.get("store"), settings.get("features") or {}
    val = description.metrics.get("val") or {}
    found: Report = {
        "data": (provenance.get("data") or {}).get("name"),
        "model": _model_in_words(settings["model"]) if settings else description.model.backbone,
        "training": _training_in_words(description.training),
        "val": {key: {"value": val[key]} for key in _SCORES if val.get(key) is not None},
        "seconds": provenance.get("seconds"),
        "store": None
        if not store
        else {
            "encoder": features.get("encoder"),
            "data_set": (store.get("provenance") or {}).get("data_set"),
            "version": str(store.get("version"))[:12],
        },
    }
    figures = _read(folder / "metrics.json")
    if figures is None:
        return found | {"state": "not evaluated"}
    ends = figures["intervals"]
    found["test"] = {key: {"value": figures[key], **ends.get(key, {})} for key in _SCORES if key in figures}
    found["val"] |= {key: value for key, value in figures.get("val", {}).items() if key in _SCORES}
    return found


def _of_unfinished(folder: Path) -> Report:
    settings = _read(folder / "settings.json") or {}
    history = _read(folder / "history.json") or []
    return {
        "state": f"stopped after epoch {len(history)} of {settings['train'].get('epochs', len(history))}",
        "model": _model_in_words(settings["model"]),
        "training": _training_in_words(settings["train"]),
    }


def _read(file: Path) -> Any:
    """JSON of a file; None where there is none."""
    return records.read_json(file, kind=list if file.name == "history.json" else dict) if file.is_file() else None


def _when(folder: Path) -> str | None:
    """When the run was last written: ISO 8601, local time."""
    times = [path.stat().st_mtime for name in ("model.json", "history.json", "settings.json")
             if (path := folder / name).is_file()]  # fmt: skip
    return datetime.fromtimestamp(times[0]).astimezone().isoformat(timespec="minutes") if times else None


def _model_in_words(model: Mapping[str, Any]) -> str:
    """Such as `resnet18 (imagenet), 224 px, gates from early, neck`."""
    weights = model.get("weights", "none")
    backbone = "no backbone" if model["backbone"] == "none" else str(model["backbone"])
    said = [backbone + (f" ({Path(str(weights)).name})" if weights != "none" else "")]
    if model["backbone"] != "none":
        said.append(f"{model['image_px']} px")
    taps = list(dict.fromkeys(str(tap) for tap, _ in model["gates"]))
    if taps:
        said.append(f"gates from {', '.join(taps)}")
    if (model.get("clip") or {}).get("lora"):
        said.append(f"adapters of rank {model['clip']['lora']}")
    if model.get("fuse"):
        what = "pooled features of" if model["backbone"] == "none" else "late fusion of"
        said.append(f"{what} {', '.join(map(str, model['fuse']))}")
    if model.get("overlay"):
        said.append(f"overlay of {model['overlay']['tap']} ({model['overlay']['palette']})")
    used = taps or model.get("fuse") or model.get("overlay")
    return ", ".join(said) if used else f"{', '.join(said)}, no gates"


def _training_in_words(training: Mapping[str, Any]) -> str:
    """Such as `30 epochs, lr 0.0005, seed 0`, or `probe, C 0.01, seed 0`."""
    said = [f"{training['epochs']} epochs", f"lr {training['lr']:g}"] if "epochs" in training else ["probe"]
    if "c" in training:
        said.append(f"C {training['c']:g}")
    said.append(f"seed {training['seed']}")
    if training.get("fraction", 1.0) != 1.0:
        said.append(f"{training['fraction']:.3g} of the training set")
    if training.get("shots") is not None:
        said.append(f"{training['shots']} of each class")
    return ", ".join(said)


def _flat(row: Mapping[str, Any]) -> Report:
    """A row without nesting: `val_auc`, `test_auc`, `test_auc_low`, ..."""
    store = row["store"] or {}
    flat: Report = {key: row[key] for key in ("run", "state", "data", "model", "training")}
    for split, key in itertools.product(("val", "test"), _SCORES):
        found = row[split].get(key, {})
        flat |= {f"{split}_{key}": found.get("value")} | {
            f"{split}_{key}_{end}": found.get(end) for end in ("low", "high")
        }
    flat |= {"seconds": row["seconds"], "when": row["when"]}
    return flat | {f"store_{key}": store.get(key) for key in ("encoder", "data_set", "version")}
