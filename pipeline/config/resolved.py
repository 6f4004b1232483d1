"""The whole configuration as it counts: what was given, and every default that fills the rest."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import commented
from pipeline.config.schema import Config, Section, to_dict


def defaults_of(config: Config) -> list[str]:
    """Dotted keys whose value is a default that nobody gave."""
    return list(_defaults(config, "", given=True))


def as_yaml(config: Config) -> str:
    """The whole configuration in YAML that is itself a configuration; what is a default is marked so."""
    return commented.as_yaml(to_dict(config), dict.fromkeys(defaults_of(config), "default"))


def _defaults(section: Section, place: str, *, given: bool) -> Iterator[str]:
    for name in type(section).model_fields:
        value, here = getattr(section, name), given and name in section.model_fields_set
        dotted = f"{place}.{name}" if place else name
        if isinstance(value, Section):
            yield from _defaults(value, dotted, given=here)
        elif not here:
            yield dotted
