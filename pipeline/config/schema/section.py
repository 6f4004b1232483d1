"""What every section of the configuration is, and the kinds of values that many have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from pipeline.url import AnyPath, any_path, is_url


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


_PATH: Literal["path_type"] = "path_type"


def _here(given: Any) -> Any:
    """Refuse a URL where only a path of this machine will do."""
    if isinstance(given, str) and is_url(given):
        expected = "a path of this machine, and this is a URL"
        raise PydanticCustomError(_PATH, expected)
    return given


def _anywhere(given: Any) -> AnyPath:
    """A path of this machine, or a URL."""
    if not isinstance(given, str):
        expected = "a path or a URL"
        raise PydanticCustomError(_PATH, expected)
    return any_path(given)


def _tables(given: Any) -> AnyPath | dict[str, AnyPath]:
    """A table, or one for each split."""
    splits = given if isinstance(given, dict) and given.keys() <= {"train", "val", "test"} else {}
    if isinstance(given, str):
        return any_path(given)
    if not splits or not all(isinstance(path, str) for path in splits.values()):
        expected = "a path or a URL, or a mapping with one for train, val and test each"
        raise PydanticCustomError(_PATH, expected)
    return {split: any_path(path) for split, path in splits.items()}


def _texts(tables: AnyPath | Mapping[str, AnyPath]) -> str | dict[str, str]:
    """The same as text, without what gives access."""
    return {split: str(path) for split, path in tables.items()} if isinstance(tables, Mapping) else str(tables)


Local = Annotated[Path, BeforeValidator(_here)]
Anywhere = Annotated[
    AnyPath, PlainValidator(_anywhere), PlainSerializer(str, str, when_used="json"), WithJsonSchema({"type": "string"})
]
Tables = Annotated[
    AnyPath | dict[Literal["train", "val", "test"], AnyPath],
    PlainValidator(_tables),
    PlainSerializer(_texts, Any, when_used="json"),
    WithJsonSchema({}),
]


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # of torch and numpy
