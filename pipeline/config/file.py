"""A configuration as it is written: a file of YAML 1.2, and the `section.key=value` that override it."""

from __future__ import annotations

import json
import stat
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

from pipeline.errors import ConfigError

_MOST_BYTES, _MOST_VALUES, _DEEPEST = 2**18, 5000, 30


def read_yaml(
    path: Path, like: str = "configs/*.yaml", instead: str = "and `pipeline init` writes one"
) -> dict[str, Any]:
    """Read a mapping of plain values from YAML 1.2.

    Args:
        path: The file.
        like: Where such files are found, for the message.
        instead: Where else to get one, for the message.

    Raises:
        ConfigError: It cannot be read, or is something else.
    """
    try:
        text = _read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        there = ", ".join(sorted(str(p) for p in Path().glob(like)))
        such = f", such as {there}" if there else f"; there is no {like} here, {instead}"
        message = f"{path}: cannot be read ({reason}); name a configuration with -c{such}"
        raise ConfigError(message) from None
    try:
        values = _load(text)
        json.dumps(values)
    except (YAMLError, TypeError, ValueError) as error:
        message = f"{path}: is not YAML of plain values: {' '.join(str(error).split())}"
        raise ConfigError(message) from None
    if not isinstance(values, dict):
        message = f"{path}: holds {values!r}; expected sections such as data:, encoder:, store:"
        raise ConfigError(message)
    return values


def _read_text(path: Path) -> str:
    """Text of a plain file that is no longer than a configuration can be.

    Raises:
        ConfigError: It is longer, or no plain file: a pipe may never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        message = f"{path}: is no plain file; write the configuration into one"
        raise ConfigError(message)
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        message = f"{path}: is longer than 256 KiB, which no configuration is; name another file"
        raise ConfigError(message)
    return data.decode("utf-8")


def _load(text: str) -> Any:
    """Values of a text in YAML, whose number is known before any is made: repeated parts could multiply without end.

    Raises:
        YAMLError: It is no YAML.
        ValueError: It has too many values, a repeated part counted each time, or is nested too deeply.
    """
    values, begun = 0, list[tuple[str | None, int]]()  # collections that are open: anchor, values before it
    repeated: dict[str | None, int] = {}  # values behind each anchor
    for event in YAML(typ="safe", pure=True).parse(StringIO(text)):
        if isinstance(event, CollectionStartEvent):
            begun.append((event.anchor, values))
        values += repeated.get(event.anchor, 1) if isinstance(event, AliasEvent) else isinstance(event, NodeEvent)
        if isinstance(event, CollectionEndEvent):
            anchor, before = begun.pop()
            repeated[anchor] = values - before
        if len(begun) > _DEEPEST or values > _MOST_VALUES:
            message = f"it has more than {_MOST_VALUES} values or {_DEEPEST} levels of nesting"
            raise ValueError(message)
    return YAML(typ="safe", pure=True).load(StringIO(text))


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
        return key, _load(value), said
    except (YAMLError, ValueError):
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
