"""The whole configuration as it counts: what was given, and every default that fills the rest."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

from pipeline.config.schema import Config, Section, to_dict


class _Representer(RoundTripRepresenter):
    """Writes what is not there as `null`, where a round trip would leave the place empty."""

    def represent_none(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def defaults_of(config: Config) -> list[str]:
    """Dotted keys whose value is a default that nobody gave."""
    return list(_defaults(config, "", given=True))


def as_yaml(config: Config) -> str:
    """The whole configuration in YAML that is itself a configuration; what is a default is marked so."""
    yaml, text = YAML(), StringIO()
    yaml.Representer = _Representer
    yaml.width = 2**16  # a list stays on its line
    yaml.dump(_commented(to_dict(config), "", frozenset(defaults_of(config))), text)
    return text.getvalue()


def _defaults(section: Section, place: str, *, given: bool) -> Iterator[str]:
    for name in type(section).model_fields:
        value, here = getattr(section, name), given and name in section.model_fields_set
        dotted = f"{place}.{name}" if place else name
        if isinstance(value, Section):
            yield from _defaults(value, dotted, given=here)
        elif not here:
            yield dotted


def _commented(value: Any, place: str, defaults: frozenset[str]) -> Any:
    """Plain values as YAML with comments: sections in blocks, lists and what is in them on a line."""
    if isinstance(value, list):
        line = CommentedSeq(_commented(part, "", frozenset()) for part in value)
        line.fa.set_flow_style()
        return line
    if not isinstance(value, dict):
        return value
    section = CommentedMap()
    for key, part in value.items():
        dotted = f"{place}.{key}" if place else key
        section[key] = _commented(part, dotted, defaults)
        if dotted in defaults:
            section.yaml_add_eol_comment("default", key, column=0)
    return section
