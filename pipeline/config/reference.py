"""Every key of the configuration: its type, its default and what it does, read from the schema.

What a key does is the text below it in `schema`, or comes with its type where several sections have it.
`pipeline config --explain KEY` shows it, and `python -m pipeline.config.reference` writes the page that is
`docs/configuration.md`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config.schema import Config, Section
from pipeline.errors import ConfigError

_HEAD = """# Configuration

An experiment is one file of YAML 1.2, read strictly: an unknown key or a wrong type is an error that names the nearest
valid one. `--set section.key=value` overrides a key, and `configs/default.yaml` is an example that runs. A key without
a default has to be given.

<!-- Generated from pipeline/config/schema: uv run python -m pipeline.config.reference > docs/configuration.md -->
"""


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        place: The section that it is in; empty for the whole.
        layout: The layout of data that alone has it; empty where all have.
        name: The key itself.
        kind: Its type, in words.
        default: Its default, in words.
        does: What it does.
        section: Whether it holds other keys.
    """

    place: str
    layout: str
    name: str
    kind: str
    default: str
    does: str
    section: bool

    @property
    def dotted(self) -> str:
        """As `--set` takes it."""
        return f"{self.place}.{self.name}" if self.place else self.name


@dataclass(frozen=True)
class _Table:
    """A section of the configuration."""

    place: str
    layout: str
    says: str
    keys: tuple[Key, ...]


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *(line for table in _tables("", "", Config) for line in _markdown(table))])


def find(name: str) -> list[Key]:
    """Keys by name: dotted as `--set` takes it, or the end of that; with a section come the keys in it.

    Raises:
        ConfigError: There is none; the message names the nearest ones.
    """
    keys = [key for table in _tables("", "", Config) for key in table.keys]
    found = [key for key in keys if key.dotted == name] or [key for key in keys if key.dotted.endswith(f".{name}")]
    if not found:
        dotted = list(dict.fromkeys(key.dotted for key in keys))
        last = {key.name: key.dotted for key in reversed(keys)}
        near = difflib.get_close_matches(name, dotted, n=3, cutoff=0.7)
        near = near or [last[word] for word in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=3)]
        near = near or [key.dotted for key in keys if name.replace("_", " ").lower() in key.does.lower()][:3]
        valid = f"did you mean {', '.join(near)}?" if near else f"sections: {', '.join(Config.model_fields)}"
        message = f"--explain {name}: there is no such key; {valid}"
        raise ConfigError(message)
    places = {key.dotted for key in found if key.section}
    return found + [key for key in keys if key.place in places]


def _markdown(table: _Table) -> Iterator[str]:
    place = f"{table.place} (layout: {table.layout})" if table.layout else table.place
    yield f"## {f'`{place}`' if place else 'The whole'}\n"
    yield f"{table.says}\n"
    yield "| key | type | default | what it does |"
    yield "| --- | --- | --- | --- |"
    for key in table.keys:
        yield f"| `{key.name}` | {key.kind} | {key.default} | {key.does} |"
    yield ""


def _tables(place: str, layout: str, section: type[Section]) -> Iterator[_Table]:
    """A section's keys, then the sections inside it."""
    does = _descriptions(section)
    keys: list[Key] = []
    inner: list[tuple[str, str, type[Section]]] = []
    for name, field in section.model_fields.items():
        sections = list(_sections(field.annotation))
        where = f"{place}.{name}" if place else name
        inner += [(where, _layout(found) if len(sections) > 1 else layout, found) for found in sections]
        kind = "section" if sections else _spell(field.annotation, field)
        if sections and get_origin(field.annotation) is tuple:
            kind = "list of sections"
        keys.append(Key(place, layout, name, kind, _default(field, bool(sections)), does[name], bool(sections)))
    yield _Table(place, layout, " ".join((section.__doc__ or "").split()), tuple(keys))
    for where, only, found in inner:
        yield from _tables(where, only, found)


@cache
def _descriptions(section: type[Section]) -> dict[str, str]:
    """What each key does: the description of its type, or the text below it in the source, which no run has to read."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    says = {name: field.description for name, field in section.model_fields.items() if field.description}
    for key, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(written))):
                    says[key.target.id] = " ".join(written.split())
                case _:
                    pass
    missing = set(section.model_fields) - set(says)
    assert not missing, f"{section.__name__}: write below {sorted(missing)} what they do"
    return says


def _layout(section: type[Section]) -> str:
    """The layout of data that a section is for."""
    (layout,) = get_args(section.model_fields["layout"].annotation)
    return str(layout)


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
    return {
        "str": "text",
        "int": "whole number",
        "float": "number",
        "bool": "true or false",
        "Path": "path",
        "Url": "URL",
    }.get(getattr(kind, "__name__", ""), str(kind))


def _bound(mark: Any) -> str:
    """A bound of a number, such as `>= 1`."""
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if hasattr(mark, name):
            return f"{sign} {getattr(mark, name)}"
    return ""


def _default(field: FieldInfo, section: bool) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if section:
        return "`[]`" if value == () else "as below"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(part) for part in value)}]`"
    return f"`{value}`" if value != "" else "empty"


if __name__ == "__main__":
    sys.stdout.write(page())
