"""Configurations written for people: YAML with a remark beside a value or above a section."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter


class _Representer(RoundTripRepresenter):
    """Writes what is not there as `null`, where a round trip would leave the place empty."""

    def represent_none(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def as_yaml(values: Mapping[str, Any], beside: Mapping[str, str], head: str = "") -> str:
    """Plain values as YAML 1.2: sections in blocks, a list of values on a line, a list of mappings with a line each.

    Args:
        values: Sections of sections of values.
        beside: Remark behind a value, by its dotted key; above it where it is a section or a list.
        head: Lines above everything.
    """
    yaml, text = YAML(), StringIO()
    yaml.Representer = _Representer
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 2**16  # a list stays on its line
    written = _commented(dict(values), "", beside)
    if head:
        written.yaml_set_start_comment(head)
    yaml.dump(written, text)
    return text.getvalue()


def _commented(value: Any, place: str, beside: Mapping[str, str]) -> Any:
    if isinstance(value, list | tuple):
        items = CommentedSeq(_commented(part, "", {}) for part in value)
        for item in items:
            if isinstance(item, CommentedMap):
                item.fa.set_flow_style()
        if not _in_blocks(items):
            items.fa.set_flow_style()
        return items
    if not isinstance(value, dict):
        return value
    section = CommentedMap()
    for key, part in value.items():
        dotted = f"{place}.{key}" if place else key
        section[key] = _commented(part, dotted, beside)
        remark = beside.get(dotted)
        if remark is None:
            continue
        if _in_blocks(section[key]):
            section.yaml_set_comment_before_after_key(key, before=remark, indent=2 * (dotted.count(".")))
        else:
            section.yaml_add_eol_comment(remark, key, column=0)
    return section


def _in_blocks(value: Any) -> bool:
    """Whether a value takes lines of its own below its key."""
    return isinstance(value, CommentedMap) or (
        isinstance(value, CommentedSeq) and bool(value) and isinstance(value[0], dict)
    )
