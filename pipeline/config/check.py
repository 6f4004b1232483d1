"""What is wrong with a configuration, a line a problem: place, key, value, what was expected, the nearest valid key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import ConfigError

_LAYOUTS = ("csv", "demo", "folder", "medmnist", "store")
AnyModel = TypeVar("AnyModel", bound=BaseModel)


def validate(
    kind: type[AnyModel], values: Mapping[str, Any], where: str, *, overridden: Sequence[str] = ()
) -> AnyModel:
    """Check plain values against a section of the configuration.

    Args:
        kind: The section, such as `Config`.
        values: What was read.
        where: How the messages begin: the file, and the place in it.
        overridden: Dotted keys that `--set` gave, which a message about them names instead.

    Raises:
        ConfigError: One line for each problem: where, key, value, what was expected, the nearest valid key.
    """
    fill = getattr(kind, "fill", dict)  # of a section that knows what some values say of others
    try:
        return kind.model_validate_json(json.dumps(fill(values)), strict=True)
    except ValidationError as error:
        problems = _gathered(_problem(kind, problem) for problem in error.errors(include_url=False))
        raise ConfigError("\n".join(_placed(where, overridden, *problem) for problem in problems.items())) from None


def _gathered(problems: Iterable[tuple[str, str]]) -> dict[str, str]:
    """One problem for each key, where a value may be of several kinds: what each of them expects."""
    gathered: dict[str, str] = {}
    for key, problem in problems:
        expected = problem.rpartition(", expected ")[2]
        gathered[key] = f"{gathered[key]}, or {expected}" if key in gathered else problem
    return {key: said for key, said in gathered.items() if not any(other.startswith(f"{key}.") for other in gathered)}


def _placed(where: str, overridden: Sequence[str], key: str, problem: str) -> str:
    """One line: where the key was given, the key, and what is wrong with it."""
    given = [name for name in overridden if key == name or key.startswith(f"{name}.")]
    if not given:
        return f"{where}: {key}: {problem}"
    return f"--set {key}: {problem}" if key in given else f"--set {given[-1]}: {key}: {problem}"


def _problem(kind: type[BaseModel], problem: Mapping[str, Any]) -> tuple[str, str]:
    """The key that a problem is about, and what is wrong."""
    kinds = kind.model_json_schema().get("$defs", {})  # a value that may be of several kinds has each in its location
    location = [
        str(part)
        for i, part in enumerate(problem["loc"])
        if not (i == 1 and part in _LAYOUTS) and part not in kinds and not re.match(r"constrained-|\w*\[", str(part))
    ]
    key = ".".join(location)
    what, value = problem["type"], problem["input"]
    if what == "extra_forbidden":
        return key, f"unknown key (value {value!r}); {_hint(kind, problem['loc'])}"
    if what == "missing":
        return key, "missing; expected a value for this key"
    if what == "union_tag_not_found":
        return f"{key}.layout", f"missing; expected one of {', '.join(_LAYOUTS)}"
    if what == "union_tag_invalid":
        given = value.get("layout") if isinstance(value, dict) else value
        return f"{key}.layout", f"{given!r} is no layout; expected one of {', '.join(_LAYOUTS)}"
    if what == "value_error":  # about several keys of a section, which it names
        return key, problem["msg"].removeprefix("Value error, ")
    expected = problem["msg"].removeprefix("Input should be ")
    expected = {"an object": "a mapping", "a valid array": "a list"}.get(expected, expected)
    return key, f"got {value!r}, expected {expected}"


def _hint(kind: type[BaseModel], location: Sequence[object]) -> str:
    """What an unknown key may have been meant to be."""
    *section, last = location
    if len(section) == 2 and section[1] in _LAYOUTS:
        owners = [layout for layout in _LAYOUTS if last in _keys_at(kind, (section[0], layout))]
        if owners:
            return f"it belongs to layout {' and '.join(owners)}, and the layout here is {section[1]}: leave it out"
    valid = _keys_at(kind, section)
    near = difflib.get_close_matches(str(last), valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(valid)}"


def _keys_at(kind: type[BaseModel], location: Sequence[object]) -> list[str]:
    """Valid keys of the section at a location of the configuration."""
    schema: dict[str, Any] = kind.model_json_schema()
    at = schema
    for part in location:
        at = _resolve(at, schema)
        mapping = at.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            at = {"$ref": mapping[part]}
        elif isinstance(part, int):
            at = at.get("items", {})
        else:
            at = at.get("properties", {}).get(str(part), {})
    return sorted(_resolve(at, schema).get("properties", {}))


def _resolve(at: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follow a schema node to the object that it stands for."""
    while "$ref" in at or "allOf" in at or ("anyOf" in at and "discriminator" not in at):
        if "$ref" in at:
            at = schema["$defs"][at["$ref"].rsplit("/", 1)[1]]
        else:
            options = at.get("allOf") or [o for o in at["anyOf"] if o.get("type") != "null"]
            at = options[0]
    return at
