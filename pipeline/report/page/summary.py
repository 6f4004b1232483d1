"""What stands first, and alone on the first sheet of paper: the verdict, the figures that matter, what they lack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.report.caveats import foremost
from pipeline.report.evidence import Evidence
from pipeline.report.page import figures
from pipeline.report.page.html import Markup, listed, prose, table, tag
from pipeline.report.page.tables import SHARES, interval, point_name, share_cell
from pipeline.report.verdict import judge

_WITHOUT_POSITIVE = (("acc", "accuracy"), ("balanced_acc", "balanced accuracy"), ("ece", "calibration error"))


def summary(evidence: Evidence) -> Iterator[Markup]:
    """The first sheet."""
    yield tag("h1", f"Report on {evidence.name}")
    yield tag("p", *_signed(evidence), class_="signed")
    yield _banner(evidence)
    yield tag("p", *_question(evidence), class_="lead")
    yield tag("ul", *_tiles(evidence), class_="tiles")
    yield tag("div", figures.roc(evidence, of=_shown(evidence)), tag("div", *_beside(evidence)), class_="pair")


def _signed(evidence: Evidence) -> Iterator[str]:
    """Author, date and version."""
    signed = evidence.signed
    trained = evidence.description.provenance.get("software", {}).get("slca-pipeline")
    yield f"Author: {signed.author}. " if signed.author else "Author: not named. "
    if signed.date:
        yield f"Date: {signed.date}. "
    yield f"Written by slca-pipeline {signed.version}; the model was trained with "
    yield f"version {trained}." if trained else "a version that was not recorded."


def _banner(evidence: Evidence) -> Markup:
    found = judge(evidence.description, evidence.figures, evidence.units, untrained=evidence.untrained)
    return tag(
        "div",
        tag("p", found.headline, class_="headline"),
        tag("p", found.grounds),
        tag("p", f"{found.encoder} {found.warning}".strip()),
        class_=f"banner {found.kind}",
        role="note",
        aria_label="Verdict",
    )


def _question(evidence: Evidence) -> Iterator[str]:
    """What was asked, in a sentence or two."""
    description = evidence.description
    model, names = description.model, description.class_names
    what = {
        "ordinal": f"tell the grades {listed(names)}, in that order,",
        "multilabel": f"find {listed(names)}, any number of them at once,",
    }.get(description.task, f"tell {listed(names)} apart")
    asked = f"How well does a {model.backbone} {what} on {evidence.data['name']}"
    if description.fingerprint is not None:
        encoder = f"the frozen encoder {description.fingerprint.fields.get('encoder', '')}".rstrip()
        ways = []
        if any(tap in description.taps for tap, _ in model.gates):
            ways.append(f"gates made from features of {encoder} weigh its feature maps")
        if model.fuse:
            ways.append(f"its last layer also reads pooled features of {encoder}")
        if model.overlay:
            ways.append(f"masks that {encoder} found are painted over its images")
        if model.reads_images:
            yield f"{asked}, when {' and '.join(ways)}? "
        else:
            yield f"How well do pooled features of {encoder} alone {what} on {evidence.data['name']}? "
    elif model.gates:
        yield f"{asked} with gates made from its own feature maps? "
    else:
        yield f"{asked} without gates? "
    if evidence.positive is not None:
        yield f"The class that is looked for (positive) is {evidence.positive}."
    else:
        yield "No class is named as the one that is looked for (data.positive), so each is set against the rest."


def _tiles(evidence: Evidence) -> Iterator[Markup]:
    found, name, point = evidence.figures, evidence.positive, evidence.point
    ends = found["intervals"]
    if name is None:
        yield _tile(f"{found['auc']:.3f}", "mean AUC", interval(ends["auc"]), f"n = {found['n']} images")
        for key, label in _WITHOUT_POSITIVE:
            yield _tile(f"{found[key]:.3f}", label, interval(ends[key]), f"n = {found['n']} images")
        return
    auc, auc_ends = found["class_auc"][name], ends["class_auc"][name]
    yield _tile(f"{auc:.3f}", "AUC", interval(auc_ends), f"n = {found['n']} images")
    if point is None:
        for key in ("sensitivity", "specificity"):
            yield _tile(_percent(found[key][name]), key, _percents(ends[key][name]))
    else:
        at = found["operating_points"][point][name]
        counts = at["counts"]
        rests = {
            "sensitivity": (counts["tp"], counts["tp"] + counts["fn"], "positive"),
            "specificity": (counts["tn"], counts["tn"] + counts["fp"], "negative"),
            "ppv": (counts["tp"], counts["tp"] + counts["fp"], "called"),
            "npv": (counts["tn"], counts["tn"] + counts["fn"], "cleared"),
        }
        for key, label in SHARES.items():
            right, made, what = rests[key]
            yield _share_tile(label, at[key], f"{right} of {made} {what}")
    prevalence = found["prevalence"][name]
    yield _tile(
        _percent(prevalence),
        "prevalence here",
        _percents(ends["prevalence"][name]),
        f"{round(prevalence * found['n'])} of {found['n']} images",
    )


def _share_tile(label: str, found: Mapping[str, float] | None, rests_on: str) -> Markup:
    if found is None:
        return _tile("\N{EN DASH}", label, rests_on)
    return _tile(_percent(found["value"]), label, _percents(found), rests_on)


def _tile(value: str, label: str, *below: str) -> Markup:
    return tag("li", tag("b", value), tag("span", label, class_="label"), *(tag("span", line) for line in below))


def _shown(evidence: Evidence) -> str | None:
    """The class whose ROC curve stands in front; None for all."""
    return evidence.positive


def _beside(evidence: Evidence) -> Iterator[Markup]:
    """Operating points, and what the result lacks above all."""
    name, found = evidence.positive, evidence.figures
    if name is not None and found["operating_points"]:
        rows = [
            [point_name(point), *(share_cell(at[name][key]) for key in ("sensitivity", "specificity"))]
            for point, at in found["operating_points"].items()
        ]
        caption = f"Where one would work: thresholds for {name}, chosen on val; the tiles show the first"
        yield table(["threshold that gives", "sensitivity", "specificity"], rows, caption=caption)
    else:
        rows = [
            [each, *(share_cell({"value": found[key][each], **ends[each]}) for key, ends in _by_class(found).items())]
            for each in evidence.description.class_names
        ]
        yield table(["class", "AUC", "sensitivity", "specificity"], rows, caption="Each class against the rest")
    yield tag("h2", "Before anybody relies on it", class_="plain", id="first-limits")
    limits = foremost(
        evidence.description,
        evidence.figures,
        evidence.data,
        generated=evidence.generated,
        untrained=evidence.untrained,
        leaks=len(evidence.leaks) if evidence.checked else None,
    )
    yield tag("ul", *(tag("li", *prose(sentence)) for sentence in limits))


def _by_class(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {key: found["intervals"][key] for key in ("class_auc", "sensitivity", "specificity")}


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _percents(ends: Mapping[str, float]) -> str:
    return f"{100 * ends['low']:.0f} to {100 * ends['high']:.0f} %"
