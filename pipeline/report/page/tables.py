"""Numbers as the report writes them: scores with their intervals, settings as fields, sizes and times with units."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.evaluate.operating import predictive_values
from pipeline.report.evidence import Study
from pipeline.report.page.html import Markup, table, tag
from pipeline.report.verdict import Units, headline_auc

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
SHARES = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}
_PREVALENCES = (0.01, 0.05, 0.1, 0.2, 0.5)
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
    """One table per operating point, a row per class: threshold, shares with intervals, and the counts behind them."""
    head = ["class", "threshold", *SHARES.values(), "TP", "FP", "FN", "TN"]
    for point, classes in figures["operating_points"].items():
        rows = [[name, *_point_cells(found)] for name, found in classes.items()]
        yield table(head, rows, caption=f"Where the threshold gives {_point(point)}; n = {figures['n']} images")


def points_table(figures: Mapping[str, Any], name: str) -> Markup:
    """A row per operating point of one class."""
    head = ["threshold that gives", "threshold", *SHARES.values(), "TP", "FP", "FN", "TN"]
    rows = [[point_name(point), *_point_cells(found[name])] for point, found in figures["operating_points"].items()]
    caption = f"{name} at each operating point, on {figures['n']} {figures['split']} images"
    return table(head, rows, caption=caption)


def _point_cells(found: Mapping[str, Any]) -> list[object]:
    """Threshold, shares with intervals, and the counts behind them."""
    counts = [found["counts"][key] for key in ("tp", "fp", "fn", "tn")]
    return [f"{found['threshold']:.3f}", *(share_cell(found[key]) for key in SHARES), *counts]


def share_cell(found: Mapping[str, float] | None) -> object:
    """A share with its interval in a table; a dash where it has no sample."""
    return "\N{EN DASH}" if found is None else cell(found["value"], found)


def point_name(point: str) -> str:
    """An operating point as a short name."""
    name, _, value = point.partition("=")
    return f"{name} {value} on val" if value else "Youden's point on val"


def elsewhere_table(found: Mapping[str, Any], name: str) -> Markup:
    """Predictive values at other prevalences, by Bayes' rule, from an operating point of one class."""
    se, sp = found["sensitivity"], found["specificity"]
    rows: list[list[object]] = []
    for share in _PREVALENCES:
        point = predictive_values(se["value"], sp["value"], share)
        least, most = (predictive_values(se[end], sp[end], share) for end in ("low", "high"))
        cells = [
            cell(value, {"low": low, "high": high}) if not math.isnan(value + low + high) else "\N{EN DASH}"
            for value, low, high in zip(point, least, most, strict=True)
        ]
        alarms = 1000 * (1 - sp["value"]) * (1 - share)
        missed = 1000 * (1 - se["value"]) * share
        rows.append([f"{100 * share:.0f} %", *cells, f"{alarms:.0f}", f"{missed:.0f}"])
    head = ["prevalence", "PPV", "NPV", "false alarms in 1,000", "missed in 1,000"]
    caption = (
        f"Predictive values of {name} where it is rarer or more common, at the same sensitivity and specificity; in "
        "brackets both at the lower and at the upper ends of their intervals"
    )
    return table(head, rows, caption=caption)


def elsewhere_sets(found: Mapping[str, Mapping[str, Any]], positive: str | None, point: str | None) -> Markup:
    """A row per external test set: how large it is, its AUC, and what the first operating point comes to there."""
    keys = ("sensitivity", "specificity") if positive is not None and point is not None else ()
    rows = []
    for name, figures in found.items():
        _, value, ends = headline_auc(figures)
        at = figures["operating_points"].get(point, {}).get(positive, {})
        rows.append(
            [name, figures["n"], figures["bootstrap"]["groups"], cell(value, ends)]
            + [share_cell(at.get(key)) for key in keys]
        )
    caption = f"{positive} at the threshold that gives {point_name(point)}" if keys and point else "The AUC of each"
    return table(["test set", "images", "groups", "AUC", *keys], rows, caption=caption)


def subgroup_table(column: str, found: Mapping[str, Mapping[str, Any]], units: Units, positive: str | None) -> Markup:
    """A row per subgroup, each score beside how many it rests on."""
    keys = ("auc", "sensitivity", "specificity", "acc") if positive else ("auc", "acc")
    names = {"auc": "AUC", "acc": "accuracy", **SHARES}

    def scored(share: Mapping[str, float] | None) -> object:
        if share is None:
            return "\N{EN DASH}"
        return Markup(f"{share_cell(share)} {tag('span', 'n = ' + str(share['n']), class_='ends')}")

    rows = [
        [value, part["n"]]
        + ([part["groups"]] if units.grouped else [])
        + ([part["positives"]] if positive else [])
        + [scored(part[key]) for key in keys]
        for value, part in found.items()
    ]
    head = [column, "images", *(["patients"] if units.grouped else []), *([positive] if positive else [])]
    return table([*head, *(names[key] for key in keys)], rows, caption=f"By {column}")


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
