"""The commands that give a run again: a configuration, and where the run has it otherwise."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def commands(
    names: Sequence[str],
    arguments: Sequence[str],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    folder: Path,
) -> list[str]:
    """Spell out commands, ready for a shell.

    Args:
        names: The commands, in order.
        arguments: That named the configuration: `-c`, and any `--set`.
        config: The configuration in plain values.
        settings: Everything that the run depends on, as `settings.json` has it.
        folder: The run.
    """
    overrides = list(_overrides(config, _sections(settings)))
    if str(config["run"]) != str(folder):
        overrides.append(f"run={folder}")
    words = [*arguments, *(word for override in overrides for word in ("--set", override))]
    return [" ".join(["pipeline", name, *map(shlex.quote, words)]) for name in names]


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run depends on, under the keys that the configuration has for it."""
    model = dict(settings["model"])
    own = {key: model.pop(key) for key in ("backbone", "weights", "image_px")}
    gates = [{"tap": tap, "stage": stage} for tap, stage in model.pop("gates")]
    return {
        "model": {**own, "gates": gates, "slca": model},
        "train": {**settings["train"], "augment": settings["augmentation"]},
    }


def _overrides(config: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key=value` of each leaf that differs."""
    for key, value in wanted.items():
        if key not in config:
            continue
        if isinstance(value, Mapping):
            yield from _overrides(config[key], value, f"{prefix}{key}.")
        elif config[key] != value:
            yield f"{prefix}{key}={json.dumps(value)}"
