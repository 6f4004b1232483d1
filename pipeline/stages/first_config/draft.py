"""What a person has said of the data, whom to ask for the rest, and the configuration that grows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Ask = Callable[[str, str, str], str]
"""Asks a person: the flag that would answer, the question, and the answer that is taken without one."""

NONE = "none"  # answers that there is nothing of the kind


@dataclass(frozen=True)
class Given:
    """What a person has said about the data and the method; None where it is to be found out.

    Attributes:
        group_pattern: See `data.group_pattern`; `none` for no groups.
        images: Folder that the paths of a table are relative to.
        path_column: Column of the images.
        label_column: Column of the class.
        split_column: Column of the split; `none` to draw splits.
        group_column: Column of the patient; `none` for no groups.
        size_px: Side of the images of a MedMNIST archive.
        encoder: Name of the encoder.
        checkpoint: Its weights.
        backbone: Of the classifier.
    """

    group_pattern: str | None = None
    images: Path | None = None
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    size_px: int | None = None
    encoder: str | None = None
    checkpoint: str | None = None
    backbone: str | None = None


@dataclass
class Draft:
    """A configuration that grows.

    Attributes:
        name: Of the data set, for paths.
        values: The configuration.
        beside: Remarks, by dotted key.
        report: What was found, for the person.
        notes: What the person should know, a sentence each.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def silent(flag: str, question: str, default: str) -> str:
    """Ask nobody and take every guess."""
    return default
