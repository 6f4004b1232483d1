"""The configuration: strict, frozen, and left at the door (models and loops take plain keyword arguments).

A file here is a section or a few that belong together; below each key stands what it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.check import validate
from pipeline.config.file import parse_override, read_yaml, set_key
from pipeline.config.schema.data import CsvData, DataConfig, DemoData, FolderData, MedMnistData, SplitRule, StoreData
from pipeline.config.schema.model import ModelConfig
from pipeline.config.schema.resources import Resources
from pipeline.config.schema.section import Local, Section
from pipeline.config.schema.stage_one import STORED, EncoderConfig, StoreConfig
from pipeline.config.schema.training import FoldConfig, ProbeConfig, TrainConfig

__all__ = [
    "STORED",
    "Config",
    "CsvData",
    "DemoData",
    "FolderData",
    "MedMnistData",
    "Section",
    "SplitRule",
    "StoreData",
    "TrainConfig",
    "load_config",
    "to_dict",
]


class Config(Section):
    """The whole configuration of an experiment."""

    data: DataConfig
    """Where images and labels are."""
    encoder: EncoderConfig
    """The frozen encoder of stage one."""
    store: StoreConfig
    """Where its features are kept."""
    model: ModelConfig
    """The classifier of stage two."""
    train: TrainConfig
    """How it is trained."""
    run: Local
    """Folder that the training leaves everything in."""
    probe: ProbeConfig = ProbeConfig()
    """What the probe fits."""
    fold: FoldConfig | None = None
    """A fold of a cross-validation to train and test on; null takes the data set's own splits."""
    resources: Resources = Resources()
    """What this machine offers; no result rests on it."""

    @staticmethod
    def fill(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Plain values with what a store answers for, where the data are one: features, encoder, and no backbone."""
        data = values.get("data")
        if not isinstance(data, dict) or data.get("layout") != "store" or "path" not in data:
            return values
        answers: dict[str, dict[str, Any]] = {
            "encoder": {"name": STORED, "checkpoint": ""},
            "store": {"path": data["path"]},
            "model": {"backbone": "none"},
            "train": {},
        }
        given = {key: values.get(key, {}) for key in answers}
        return {**values, **{key: {**answers[key], **of} if isinstance(of, dict) else of for key, of in given.items()}}

    @property
    def reads_store(self) -> bool:
        """Whether a gate, late fusion or an overlay reads a store; `own` makes features from the classifier's own."""
        model = self.model
        return bool(model.fuse or model.overlay) or any(gate.tap != "own" for gate in model.gates)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    Args:
        path: YAML 1.2, as DVC reads it: `1e-4` is a number and `yes` a string.
        overrides: Values are YAML too: `train.lr=1e-3`, `model.gates=[]`.

    Raises:
        ConfigError: One line for each problem: file, key, value, what was expected, the nearest valid key.
    """
    values = read_yaml(path)
    parsed = [parse_override(override) for override in overrides]
    for key, value, said in parsed:
        set_key(values, key, value, said)
    return validate(Config, values, str(path), overridden=[key for key, _, _ in parsed])


def to_dict(config: Section) -> dict[str, Any]:
    """The configuration as plain JSON values, defaults included."""
    return config.model_dump(mode="json")
