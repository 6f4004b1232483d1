"""The commands that give a run again: a configuration, and where the run has it otherwise."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import Fingerprint
from pipeline import data, encoders


@dataclass(frozen=True)
class Commands:
    """Commands that give a run again.

    Attributes:
        lines: Ready for a shell.
        why_none: A sentence where there are none for a reason.
    """

    lines: Sequence[str] = ()
    why_none: str = ""


def commands(
    names: Mapping[str, Sequence[str]],
    arguments: Sequence[str],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    folder: Path,
) -> Commands:
    """Spell out commands, unless they would make other features than the run was trained on.

    Args:
        names: The commands, in order, each with options of its own.
        arguments: That named the configuration: `-c`, and any `--set`.
        config: The configuration in plain values.
        settings: Everything that the run depends on, as `settings.json` has it.
        folder: The run.
    """
    others = _other_features(config, settings["features"]) if settings["features"] else []
    if others:
        why = (
            f"No commands are given, for they would not give this run: the configuration describes other features "
            f"than it was trained on (not the same: {', '.join(others)})."
        )
        return Commands(why_none=why)
    depends = sections(settings)
    if made_by_probe(settings):
        del depends["model"]  # which the probe chooses
        depends["probe"] = {"method": settings["train"].get("method", "linear")}
    overrides = list(_overrides(config, depends))
    if str(config["run"]) != str(folder):
        overrides.append(f"run={folder}")
    words = [*arguments, *(word for override in overrides for word in ("--set", override))]
    return Commands([shlex.join(["pipeline", name, *words, *options]) for name, options in names.items()])


def _other_features(config: Mapping[str, Any], features: Mapping[str, Any]) -> list[str]:
    """Fields in which the features that a configuration describes differ from those of a run.

    Weights that are not here are not asked about: they may be fetched.
    """
    encoder, reading = config["encoder"], config["data"].get("reading")
    if config["data"]["layout"] == "store":
        return []  # the store is all that describes its features
    described: dict[str, Any] = {"encoder": encoder["name"], "dtype": config["store"]["dtype"]}
    if encoder["name"] == features["encoder"]:
        making = (encoder.get(key) for key in ("input_px", "pool", "precision", "preprocessing", "masks"))
        recipe = encoders.make_recipe(encoder["name"], encoder["taps"], *making)
        described |= recipe.fingerprint(_knows(encoder, features))
        rules: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in (reading or {}).items()
        }
        described["reading"] = data.reading_rules(data.Reading(**rules))
    known = {key: features.get(key) for key in described}
    return [difference.field for difference in Fingerprint(described).differences(Fingerprint(known))]


def _knows(encoder: Mapping[str, Any], features: Mapping[str, Any]) -> str:
    """Digest of what the configured encoder knows, or where that is not here, of what the run's encoder knew."""
    if encoders.family_of(encoder["name"]).reads == "mask":
        return str(features["masks_sha256"])
    file = encoders.weights_file(encoder["name"], Path(encoder["checkpoint"]))
    return encoders.weights_sha256(file) if file.is_file() else str(features["weights_sha256"])


def made_by_probe(settings: Mapping[str, Any]) -> bool:
    """Whether `pipeline probe` made a run, from its settings: it has a solver, and no epochs."""
    return "solver" in settings["train"]


def sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run depends on, under the keys that the configuration has for it."""
    model = {"fuse": [], "overlay": None, **settings["model"]}
    own = {key: model.pop(key) for key in ("backbone", "weights", "image_px", "fuse", "overlay")}
    for key in ("head", "cached"):
        model.pop(key, None)  # which the probe chooses
    gates = [{"tap": tap, "stage": stage} for tap, stage in model.pop("gates")]
    asked = model.pop("clip", None)
    of_clip = {} if asked is None else {"clip": {**asked, "words": dict(asked["words"])}}
    later = {"shots": None, "alignment": None, "text_lr": 0.0}
    return {
        "model": {**own, "gates": gates, **of_clip, "slca": model},
        "train": {**later, **settings["train"], "augment": settings["augmentation"]},
    }


def _overrides(config: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key=value` of each leaf that differs."""
    for key, value in wanted.items():
        if key not in config:
            continue
        if isinstance(value, Mapping) and isinstance(config[key], Mapping):
            yield from _overrides(config[key], value, f"{prefix}{key}.")
        elif config[key] != value:
            yield f"{prefix}{key}={json.dumps(value)}"
