"""The figures of the report: curves, the confusion matrix, pictures.

Each says in words what it shows, for who cannot see it and who prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluate import decision, intervals, metrics
from pipeline.report.evidence import Evidence, Pictures, Study
from pipeline.report.page.chart import Axis, Line, Spot, chart, legend
from pipeline.report.page.html import Markup, folded, picture, tag
from pipeline.report.page.tables import point_name, with_interval
from pipeline.train import run_folder

_PROVES_NOTHING = "A map shows where a gate is open, or what Grad-CAM credits; neither proves why the model decided."
_RANGES = 2  # of thresholds that are named, the widest
_SPELLED = 4  # classes that an alternative text gives figures for; with more, the highest and the lowest


def roc(evidence: Evidence, *, of: str | None = None) -> Markup:
    """Draw one ROC curve per class; or that of one class, with the band of its interval and the operating points."""
    if of is not None:
        return _roc_of_one(evidence, of)
    said, figures = evidence.said, evidence.figures
    hits = metrics.one_hot(said.task, said.labels, len(said.class_names))
    names, lines = said.class_names, []
    for name in names:
        number = said.class_names.index(name)
        false, true, _ = metrics.roc_curve(hits[:, number], said.probabilities[:, number])
        lines.append(Line(f"{name}, AUC {figures['class_auc'][name]:.3f}", list(zip(false, true, strict=True))))
    finding = f"AUC {_spelled({name: figures['class_auc'][name] for name in names})}; chance is 0.5."
    alt = f"ROC curves on {figures['n']} {figures['split']} images. {finding}"
    axes = Axis("false positive rate (1 - specificity)"), Axis("true positive rate (sensitivity)")
    drawn = chart(lines, *axes, alt=alt, diagonal=True)
    return framed(drawn, legend([line.name for line in lines], reference="chance"), "ROC", finding)


def _roc_of_one(evidence: Evidence, name: str) -> Markup:
    said, figures, drawn = evidence.said, evidence.figures, evidence.figures["bootstrap"]
    number = said.class_names.index(name)
    hits = metrics.one_hot(said.task, said.labels, len(said.class_names))[:, number]
    scores = said.probabilities[:, number]
    false, true, _ = metrics.roc_curve(hits, scores)
    rates, low, high = intervals.roc_band(hits, scores, said.groups, resamples=drawn["resamples"], seed=drawn["seed"])
    value, ends = figures["class_auc"][name], figures["intervals"]["class_auc"][name]
    band = list(zip(rates.tolist(), low.tolist(), high.tolist(), strict=True))
    line = Line(f"{name}, AUC {value:.3f}", list(zip(false, true, strict=True)), band=band)
    spots = [
        Spot(point_name(point), (1 - found[name]["specificity"]["value"], found[name]["sensitivity"]["value"]))
        for point, found in figures["operating_points"].items()
    ]
    counts = f"{int(hits.sum())} with and {int((~hits).sum())} without {name}"
    finding = f"AUC {value:.3f} (95 % interval {ends['low']:.3f} to {ends['high']:.3f}); chance is 0.5."
    where = "".join(f" {spot.name}: sensitivity {spot.at[1]:.2f}, specificity {1 - spot.at[0]:.2f}." for spot in spots)
    alt = f"ROC curve of {name} on {figures['n']} {figures['split']} images ({counts}). {finding}{where}"
    axes = Axis("false positive rate (1 - specificity)"), Axis("true positive rate (sensitivity)")
    chart_ = chart([line], *axes, alt=alt, diagonal=True, spots=spots)
    names = legend([line.name], band="95 % interval", reference="chance", spots=[spot.name for spot in spots])
    note = "Marks: thresholds chosen on val, as they come out here." if spots else ""
    return framed(chart_, names, f"ROC of {name}", f"{finding} n = {figures['n']} images, {counts}. {note}")


def decision_curve(evidence: Evidence, name: str) -> Markup:
    """Draw what acting on the model is worth beside acting on all and on none (Vickers and Elkin, 2006)."""
    said, figures, drawn = evidence.said, evidence.figures, evidence.figures["bootstrap"]
    number = said.class_names.index(name)
    hits = metrics.one_hot(said.task, said.labels, len(said.class_names))[:, number]
    rows = decision.curve(
        hits, said.probabilities[:, number], said.groups, resamples=drawn["resamples"], seed=drawn["seed"]
    )
    band = [(row["threshold"], row["low"], row["high"]) for row in rows]
    lines = [
        Line("act on what the model calls", [(row["threshold"], row["net_benefit"]) for row in rows], band=band),
        Line("act on all", [(row["threshold"], row["treat_all"]) for row in rows]),
    ]
    prevalence = float(hits.mean())
    top = max(prevalence, *(row["high"] for row in rows)) * 1.05
    ranges, sure = (
        sorted(decision.worthwhile(rows, surely=surely), key=lambda ends: ends[0] - ends[1])[:_RANGES]
        for surely in (False, True)
    )
    finding = (
        f"The model is worth more than acting on all and on none at thresholds of {_ranges(ranges)}, "
        f"{'and with 95 % confidence at ' + _ranges(sure) if sure else 'but nowhere with 95 % confidence'}."
        if ranges
        else "At no threshold is the model worth more than acting on all or on none."
    )
    alt = f"Decision curve of {name} on {figures['n']} {figures['split']} images, {int(hits.sum())} with it. {finding}"
    axes = Axis("threshold probability"), Axis("net benefit", -0.25 * top, top)
    chart_ = chart(lines, *axes, alt=alt, level=0.0)
    names = legend([line.name for line in lines], band="95 % interval", reference="act on none")
    caption = (
        f"{finding} n = {figures['n']}, {int(hits.sum())} with {name}. At a threshold t one missed is held to be as "
        "bad as (1 - t) / t needless actions; the curve takes the model's probabilities at their word, so it holds "
        "only as far as they are calibrated."
    )
    return framed(chart_, names, f"Decision curve of {name}", caption)


def precision_recall(evidence: Evidence) -> Markup:
    """Draw precision over recall, one curve per class."""
    said, figures = evidence.said, evidence.figures
    hits = metrics.one_hot(said.task, said.labels, len(said.class_names))
    lines = []
    for number, name in enumerate(said.class_names):
        recall, precision, _ = metrics.precision_recall(hits[:, number], said.probabilities[:, number])
        steps = [(0.0, float(precision[0]))]
        for x, y in zip(recall.tolist(), precision.tolist(), strict=True):
            steps += [(steps[-1][0], y), (x, y)]
        lines.append(Line(f"{name}, AP {figures['class_ap'][name]:.3f}", steps))
    share = dict(zip(said.class_names, hits.mean(axis=0).tolist(), strict=True))
    finding = (
        f"Average precision {_spelled(figures['class_ap'])}; guessing gives each class's share, {_spelled(share)}."
    )
    alt = f"Precision over recall on {figures['n']} {figures['split']} images. {finding}"
    drawn = chart(lines, Axis("recall (sensitivity)"), Axis("precision"), alt=alt)
    return framed(drawn, legend([line.name for line in lines]), "Precision and recall", finding)


def calibration(evidence: Evidence) -> Markup:
    """Draw how often decisions of each confidence are right, with an interval for each step of confidence."""
    said, figures = evidence.said, evidence.figures
    steps = intervals.reliability(said.task, said.labels, said.probabilities, said.groups)
    most = max(step["count"] for step in steps)
    points = [(step["confidence"], step["accuracy"]) for step in steps]
    ends = [(step["low"], step["high"]) for step in steps]
    line = Line("this model", points, [3 + 7 * (step["count"] / most) ** 0.5 for step in steps], ends)
    weights = [step["count"] for step in steps]
    within = sum(low <= step["confidence"] <= high for step, (low, high) in zip(steps, ends, strict=True))
    confidence, right = (float(np.average(means, weights=weights)) for means in zip(*points, strict=True))
    finding = (
        f"Mean confidence {confidence:.2f}, and {right:.2f} of the decisions are right: the model is "
        f"{_sureness(confidence - right)}. Expected calibration error {figures['ece']:.3f}. In {within} of "
        f"{len(steps)} steps of confidence the 95 % interval of that share holds the mean confidence."
    )
    what = f"Calibration on {figures['n']} {figures['split']} images: share of right decisions over confidence."
    axes = Axis("confidence"), Axis("share that is right")
    drawn = chart([line], *axes, alt=f"{what} {finding}", diagonal=True)
    caption = f"{finding} Larger dots hold more images; bars are the intervals, exact and aware of groups."
    return framed(drawn, legend(["this model"], reference="perfect"), "Calibration", caption)


def loss(evidence: Evidence) -> Markup:
    """Draw the losses of each epoch."""
    rows, kept = evidence.history, evidence.figures["best_epoch"]
    step, steps, mark = _steps(evidence)
    lines = [
        Line(name, [(row["epoch"], row[f"{name}_loss"]) for row in rows], [2.5] * len(rows))
        for name in ("train", "val")
    ]
    top = max(y for line in lines for _, y in line.points) * 1.05
    first, last = rows[0], rows[-1]
    finding = (
        f"Over {len(rows)} {steps} the training loss went from {first['train_loss']:.3f} to "
        f"{last['train_loss']:.3f} and the validation loss from {first['val_loss']:.3f} to {last['val_loss']:.3f}."
    )
    drawn = chart(lines, _epochs(evidence), Axis("loss", 0, top or 1), alt=f"Loss by {step}. {finding}", mark=kept)
    return framed(drawn, legend(["train", "val"], mark=f"kept: {mark}"), f"Loss by {step}", finding)


def val_auc(evidence: Evidence) -> Markup:
    """Draw the AUC on val after each epoch."""
    rows, kept = evidence.history, evidence.figures["best_epoch"]
    step, steps, mark = _steps(evidence)
    line = Line("val", [(row["epoch"], row["val_auc"]) for row in rows], [2.5] * len(rows))
    low = min(0.5, *(y for _, y in line.points))
    finding = (
        f"The AUC on val was highest, {evidence.figures['val_auc']:.3f}, at {mark} of {len(rows)} {steps}, "
        f"whose weights were kept; at the last one it was {rows[-1]['val_auc']:.3f}."
    )
    drawn = chart([line], _epochs(evidence), Axis("AUC", low, 1.0), alt=f"AUC on val by {step}. {finding}", mark=kept)
    return framed(drawn, legend(["val"], mark=f"kept: {mark}"), f"AUC on val by {step}", finding)


def confusion(evidence: Evidence) -> Markup | None:
    """Lay out the confusion matrix as a table whose cells are shaded; None for several labels at once."""
    if "confusion" not in evidence.figures:
        return None
    names, counts = evidence.said.class_names, np.asarray(evidence.figures["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = tag("tr", tag("th", "true \\ said", scope="col"), *(tag("th", name, scope="col") for name in names))
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(
                tag(
                    "td",
                    f"{count}",
                    tag("br"),
                    f"{share:.0%}",
                    style=f"background: rgba(var(--shade), {0.5 * share:.2f})",
                )
                for count, share in zip(counts[number].tolist(), shares[number].tolist(), strict=True)
            ),
        )
        for number, name in enumerate(names)
    ]
    right = int(np.trace(counts))
    finding = f"{right} of {int(counts.sum())} images are classified rightly. {_worst_confusion(counts, names)}"
    matrix = tag("table", tag("thead", head), tag("tbody", *rows), class_="shaded", aria_label=f"Confusion. {finding}")
    scrolled = tag("div", matrix, class_="scroll", role="region", tabindex="0", aria_label="Confusion matrix")
    return framed(scrolled, None, "Confusion", f"{finding} Shares are of each true class.")


def strips(pictures: Pictures) -> Iterator[Markup]:
    """Show heat maps sample by sample, in as many columns as there is room for; two on a phone."""
    blocks: Mapping[str, Sequence[Mapping[str, Any]]] = pictures.found["sheet"]["strips"]
    for heading, shown in blocks.items():
        yield tag("h3", heading)
        if not shown:
            yield tag("p", "There are none to show.")
            continue
        figures = (
            tag(
                "figure",
                picture(pictures.file(one["file"]), one["alt"]),
                tag(
                    "figcaption",
                    tag("strong", f"true {one['true']}, said {one['predicted']}"),
                    f" {100 * one['probability']:.3g} %",
                    tag("span", one["id"], class_="id"),
                ),
            )
            for one in shown
        )
        yield tag("div", *figures, class_="strips")
    first = next((one for shown in blocks.values() for one in shown), None)
    if first is not None:
        maps = [
            name if ends.get("painted") else f"{name} ({_colours(ends)})" for name, ends in first["colours"].items()
        ]
        said = f"From top to bottom: the image, {', '.join(maps)}; dark is low, bright is high."
        yield tag("p", f"{said} {_PROVES_NOTHING}", class_="caption")


def masks(pictures: Pictures) -> Iterator[Markup]:
    """Show what leaving out each mask changes, image by image, and how well the masks hit the lesions."""
    found = pictures.found["overlay"]
    yield tag("h3", "What each mask changes")
    hit = found["localisation"]
    if hit is not None:
        best, recall = (with_interval(hit[name]["value"], hit[name]) for name in ("best_iou", "recall"))
        yield tag(
            "p",
            f"On {hit['images']} images whose lesion is known, the best of the painted masks has an IoU of {best} with "
            f"it in the mean, and one of more than {hit['at']:g} is there in a share of {recall} of the images.",
        )
    yield tag(
        "p",
        f"{found['without_masks']} of {found['images']} images have no mask and are taken as they are; "
        f"{found['masks']:.1f} masks show on an image in the mean. Below, each mask in turn is left out of the picture "
        "that the classifier sees: bars say by how much what it said becomes less likely then.",
    )
    figures = (
        tag(
            "figure",
            picture(pictures.file(one["file"]), one["alt"]),
            tag("figcaption", tag("strong", f"true {one['true']}, said {one['said']}"), f" {_without_any(one)}"),
            class_="wide",
        )
        for one in found["cases"]
    )
    yield folded(f"Mask by mask, on {len(found['cases'])} images", *figures)


def _without_any(one: Mapping[str, Any]) -> str:
    said = one["said"]
    return (
        f"probability {one['probabilities'][said]:.3f}, and {one['plain'][said]:.3f} without any mask "
        f"({one['id']}{', ' + str(one['more']) + ' more masks' if one['more'] else ''})"
    )


def _colours(ends: Mapping[str, Any]) -> str:
    if ends["own"]:
        return "from 0 to each image's highest"
    words = f": it {ends['words']}" if ends.get("words") else ""
    return f"{ends['low']:.4g} to {ends['high']:.4g}, the same for all{words}"


def sheet(pictures: Pictures) -> Markup:
    """Show the contact sheet of heat maps, for pictures that an older version drew."""
    found = pictures.found["sheet"]
    return framed(picture(pictures.file(found["file"]), found["alt"]), None, "Heat maps", _PROVES_NOTHING, wide=True)


def efficiency(study: Study) -> Markup | None:
    """Show the curve of a study, which is that of the first score; None if it has none."""
    if study.curve is None:
        return None
    first = study.rows[0]["score"] if study.rows else ""
    rows = [row for row in study.rows if row["score"] == first and row.get("mean")]
    best, worst = (choose(rows, key=lambda row: float(row["mean"])) for choose in (max, min)) if rows else ({}, {})
    finding = f"Highest mean: {_setting(best)}. Lowest: {_setting(worst)}." if rows else "No run is done yet."
    alt = f"Curves of the study {study.name}: mean {first or 'score'} over the share of the training set. {finding}"
    return framed(picture(study.curve, alt), None, "Data efficiency", finding, wide=True)


def framed(drawn: Markup, names: Markup | None, title: str, finding: str, *, wide: bool = False) -> Markup:
    """A figure with its legend and, as its caption, what it shows."""
    caption = tag("figcaption", tag("strong", f"{title}. "), finding)
    return tag("figure", drawn, names, caption, class_="wide" if wide else None)


def _setting(row: Mapping[str, str]) -> str:
    """A row of a study's table in words: its setting, its score and its mean."""
    names = list(row)
    setting = ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in names[: names.index("score")] if row[name])
    return f"{row['score']} {float(row['mean']):.3f} with {setting}"


def _epochs(evidence: Evidence) -> Axis:
    last = evidence.history[-1]["epoch"]
    return Axis(_steps(evidence)[0], 1, max(last, 2), whole=True)


def _steps(evidence: Evidence) -> tuple[str, str, str]:
    return run_folder.steps_of(evidence.history, evidence.figures["best_epoch"])


def _spelled(values: dict[str, float]) -> str:
    if len(values) == 1:
        return f"{next(iter(values.values())):.3f}"
    if len(values) <= _SPELLED:
        return ", ".join(f"{value:.3f} for {name}" for name, value in values.items())
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"{values[high]:.3f} for {high} (the highest of {len(values)}) to {values[low]:.3f} for {low}"


def _ranges(found: Sequence[tuple[float, float]]) -> str:
    return " and ".join(f"{low:.2f} to {high:.2f}" if low < high else f"{low:.2f}" for low, high in sorted(found))


def _sureness(gap: float) -> str:
    if abs(gap) < 0.02:
        return "about as sure as it should be"
    return "surer than it should be" if gap > 0 else "less sure than it could be"


def _worst_confusion(counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]], names: Sequence[str]) -> str:
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return "None is taken for another class."
    true, said = np.unravel_index(int(wrong.argmax()), wrong.shape)
    count, total = int(wrong[true, said]), int(counts[true].sum())
    return f"The most common mistake: {names[int(said)]} said of {count} of {total} images of {names[int(true)]}."
