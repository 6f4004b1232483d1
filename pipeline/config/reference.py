"""The configuration as a page to read: every key, its type and its default, generated from the schema.

`python -m pipeline.config.reference` writes it to standard output; `docs/configuration.md` is that page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config.schema import Config, Section

_HEAD = """# Configuration

An experiment is one file of YAML 1.2, read strictly: an unknown key or a wrong type is an error that names the nearest
valid one. `--set section.key=value` overrides a key, and `configs/default.yaml` is an example that runs. A key without
a default has to be given.

<!-- Generated from pipeline/config/schema.py: uv run python -m pipeline.config.reference > docs/configuration.md -->
"""


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *_section("", Config)])


def _section(place: str, section: type[Section]) -> Iterator[str]:
    """A table of a section's keys, then the sections inside it."""
    title = f"`{place}`" if place else "The whole"
    yield f"## {title}\n"
    yield f"{' '.join((section.__doc__ or '').split())}\n"
    yield "| key | type | default |"
    yield "| --- | --- | --- |"
    inner: list[tuple[str, type[Section]]] = []
    for key, field in section.model_fields.items():
        sections = list(_sections(field.annotation))
        inner += [(_place(place, key, found, len(sections) > 1), found) for found in sections]
        kind = "section" if sections else _spell(field.annotation, field)
        if sections and get_origin(field.annotation) is tuple:
            kind = "list of sections"
        yield f"| `{key}` | {kind} | {_default(field, bool(sections))} |"
    yield ""
    for where, found in inner:
        yield from _section(where, found)


def _place(place: str, key: str, section: type[Section], several: bool) -> str:
    """Where a section stands, with the layout that it is for where there are several."""
    where = f"{place}.{key}" if place else key
    if several:
        (layout,) = get_args(section.model_fields["layout"].annotation)
        return f"{where} (layout: {layout})"
    return where


def _sections(kind: Any) -> Iterator[type[Section]]:
    """The sections that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
    for part in get_args(kind):
        if isinstance(part, type) or get_args(part):
            yield from _sections(part)


def _spell(kind: Any, field: FieldInfo | None = None) -> str:
    """A type as a person would write it, with its bounds."""
    bounds = [_bound(mark) for mark in (field.metadata if field is not None else ())]
    said = " ".join(bound for bound in bounds if bound)
    return f"{_name(kind)} {said}".strip()


def _name(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        marks = [mark for part in parts[1:] for mark in getattr(part, "metadata", ())]
        return " ".join([_name(parts[0]), *filter(None, map(_bound, marks))])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else _name(part) for part in parts)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"list of {_name(parts[0])}"
        return f"{len(parts)} of {_name(parts[0])}"
    if origin is dict:
        return f"mapping from {_name(parts[0])} to {_name(parts[1])}"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Path": "path"}.get(
        getattr(kind, "__name__", ""), str(kind)
    )


def _bound(mark: Any) -> str:
    """A bound of a number, such as `>= 1`."""
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if hasattr(mark, name):
            return f"{sign} {getattr(mark, name)}"
    return ""


def _default(field: FieldInfo, section: bool) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if section:
        return "`[]`" if value == () else "as below"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(part) for part in value)}]`"
    return f"`{value}`" if value != "" else "empty"


if __name__ == "__main__":
    sys.stdout.write(page())
