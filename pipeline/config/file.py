"""A configuration as it is written: a file of YAML 1.2, and the `section.key=value` that override it."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ConfigError


def read_yaml(path: Path, like: str = "configs/*.yaml") -> dict[str, Any]:
    """Read a mapping of plain values from YAML 1.2.

    Args:
        path: The file.
        like: Where such files are found, for the message.

    Raises:
        ConfigError: It cannot be read, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        there = ", ".join(sorted(str(p) for p in Path().glob(like))) or f"no {like} here"
        message = f"{path}: cannot be read ({reason}); name a configuration with -c, such as {there}"
        raise ConfigError(message) from None
    try:
        values = YAML(typ="safe", pure=True).load(StringIO(text))
        json.dumps(values)
    except (YAMLError, TypeError, ValueError) as error:
        message = f"{path}: is not YAML of plain values: {' '.join(str(error).split())}"
        raise ConfigError(message) from None
    if not isinstance(values, dict):
        message = f"{path}: holds {values!r}; expected sections such as data:, encoder:, store:"
        raise ConfigError(message)
    return values


def parse_override(text: str) -> tuple[str, Any, str]:
    """Take `section.key=value` apart: the key, the value, and how to name them in a message.

    Raises:
        ConfigError: There is no key or no value, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    said = f"--set {text!r}"
    if not equals or not all(key.split(".")):
        message = f"{said}: expected section.key=value, such as train.lr=1e-3"
        raise ConfigError(message)
    try:
        return key, YAML(typ="safe", pure=True).load(StringIO(value)), said
    except YAMLError:
        message = f"{said}: {value!r} is not a YAML value; quote it if it is text"
        raise ConfigError(message) from None


def set_key(values: dict[str, Any], key: str, value: object, said: str) -> None:
    """Set a dotted key of nested mappings.

    Args:
        values: Changed in place; sections that are missing are made.
        key: Such as `train.lr`.
        value: What it becomes.
        said: Who asks, for the message.

    Raises:
        ConfigError: A part of the key names a value, not a section.
    """
    *parents, last = key.split(".")
    at = values
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            message = f"{said}: {parent!r} is a value, not a section"
            raise ConfigError(message)
    at[last] = value
