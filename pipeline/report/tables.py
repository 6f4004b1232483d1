"""Numbers as the report writes them: scores with their intervals, settings as fields, sizes and times with units."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.report.evidence import Study
from pipeline.report.html import Markup, table, tag

SCORES = {
    "auc": "AUC (area under the ROC curve)",
    "ap": "average precision",
    "acc": "accuracy",
    "balanced_acc": "balanced accuracy",
    "f1": "macro F1",
    "kappa": "quadratic kappa",
    "ece": "expected calibration error (0 is best)",
    "brier": "Brier score (0 is best)",
}
_BY_CLASS = ("class_auc", "class_ap", "sensitivity", "specificity")
_LOCALISATION = {
    "mass": "mass on it",
    "lift": "mass over area",
    "pointing": "peak on it",
    "auc": "AUC",
    "auc_elsewhere": "AUC, lesion of another patient",
}


def interval(ends: Mapping[str, float]) -> str:
    """An interval as text."""
    return f"{ends['low']:.3f} to {ends['high']:.3f}"


def with_interval(value: float, ends: Mapping[str, float]) -> str:
    """A value and its interval as text."""
    return f"{value:.3f} ({interval(ends)})"


def cell(value: float, ends: Mapping[str, float]) -> Markup:
    """A value and its interval in a table, where a narrow page breaks the line between them."""
    return Markup(f"{value:.3f} {tag('span', f'({interval(ends)})', class_='ends')}")


def score_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """One row per score: name, value, interval."""
    ends = figures["intervals"]
    return [(SCORES[name], f"{figures[name]:.3f}", interval(ends[name])) for name in SCORES if name in figures]


def class_rows(figures: Mapping[str, Any]) -> list[list[object]]:
    """One row per class: its scores with intervals."""
    ends = figures["intervals"]
    names = figures["class_auc"]
    return [[name, *(cell(figures[key][name], ends[key][name]) for key in _BY_CLASS)] for name in names]


def point_tables(figures: Mapping[str, Any]) -> Iterator[Markup]:
    """One table per operating point, a row per class."""
    for point, classes in figures["operating_points"].items():
        rows = [
            [name, f"{found['threshold']:.3f}"]
            + [cell(found[key]["value"], found[key]) for key in ("sensitivity", "specificity")]
            for name, found in classes.items()
        ]
        head = ["class", "threshold", "sensitivity", "specificity"]
        yield table(head, rows, caption=f"Where the threshold gives {_point(point)}")


def localisation_table(found: Mapping[str, Any]) -> Markup:
    """One row per map, and one for chance; beside a gate's AUC the range of that gate with weights just drawn."""
    drawn = found.get("untrained_auc", {})
    names = [name for name in _LOCALISATION if any(name in scores for scores in found["maps"].values())]
    rows: list[list[object]] = [
        ["chance", *(f"{found['chance'][n]:.3f}" if n in found["chance"] else "" for n in names)]
    ]
    for kind, scores in found["maps"].items():
        rows.append([kind, *(cell(scores[name]["value"], scores[name]) if name in scores else "" for name in names)])
    head = ["map", *(_LOCALISATION[name] for name in names)]
    if drawn:
        head.append(f"AUC, weights just drawn ({max(map(len, drawn.values()))} seeds)")
        for row in rows:
            aucs = drawn.get(row[0], ())
            row.append(f"{min(aucs):.3f} to {max(aucs):.3f}" if aucs else "")
    caption = f"How well the maps find the lesion, on {found['images']} images whose lesion is known"
    return table(head, rows, caption=caption)


def study_table(study: Study) -> Markup:
    """The table of a study, each number beside its interval; columns that are empty throughout are left out."""
    ends = {"mean": ("low", "high"), "difference": ("difference_low", "difference_high")}
    joined = {column for pair in ends.values() for column in pair}
    columns = [
        name
        for name in (study.rows[0] if study.rows else {})
        if name not in joined and any(row[name] for row in study.rows)
    ]

    def content(row: Mapping[str, str], name: str) -> object:
        low, high = (row.get(column, "") for column in ends.get(name, ("", "")))
        if low and high:
            return cell(float(row[name]), {"low": float(low), "high": float(high)})
        return _short(row[name])

    head = [name.replace("_", " ") for name in columns]
    rows = [[content(row, name) for name in columns] for row in study.rows]
    caption = f"Mean over seeds by setting, and paired difference to the baseline, of the study {study.name}"
    return table(head, rows, caption=caption)


def field_rows(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as rows of a dotted name and a value."""
    return [(name.replace("_", " "), text_of(value)) for name, value in _leaves(fields)]


def text_of(value: Any) -> str:
    """A setting as text; of a mapping, its names."""
    if isinstance(value, Mapping):
        value = list(value)
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(text_of(item) for item in value) or "none"
    return "none" if value is None else json.dumps(value)


def size(count: int) -> str:
    """Bytes for a person."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count} bytes"


def span(seconds: float) -> str:
    """Seconds for a person."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 120:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"


def _point(point: str) -> str:
    """An operating point in words."""
    name, _, value = point.partition("=")
    return f"a {name} of {value} on val" if value else "the highest sum of both on val (Youden)"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}: ")
        else:
            yield prefix + key, value


def _short(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return text
    return text if number.is_integer() else f"{number:.4f}".rstrip("0")
