"""The figures of the report, as inline SVG: small, sharp on paper, in the colours of the page, light or dark.

Each says in words what it shows, for who cannot see it and who prints it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.evaluate import intervals, metrics
from pipeline.report.evidence import Evidence, Pictures, Study
from pipeline.report.html import Markup, picture, tag

_SPELLED = 4  # classes that an alternative text gives figures for; with more, the highest and the lowest


def roc(evidence: Evidence) -> Markup:
    """Draw one ROC curve per class; of two classes that exclude each other, one, for the other mirrors it."""
    said, figures = evidence.said, evidence.figures
    hits = metrics.one_hot(said.task, said.labels, len(said.class_names))
    names = said.class_names[-1:] if said.task == "binary" else said.class_names
    lines = []
    for name in names:
        number = said.class_names.index(name)
        false, true, _ = metrics.roc_curve(hits[:, number], said.probabilities[:, number])
        lines.append(Line(f"{name}, AUC {figures['class_auc'][name]:.3f}", list(zip(false, true, strict=True))))
    finding = f"AUC {_spelled({name: figures['class_auc'][name] for name in names})}; chance is 0.5."
    alt = f"ROC curves on {figures['n']} {figures['split']} images. {finding}"
    axes = Axis("false positive rate (1 - specificity)"), Axis("true positive rate (sensitivity)")
    drawn = chart(lines, *axes, alt=alt, diagonal=True)
    return _figure(drawn, legend([line.name for line in lines], reference="chance"), "ROC", finding)


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
    return _figure(drawn, legend([line.name for line in lines]), "Precision and recall", finding)


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
    return _figure(drawn, legend(["this model"], reference="perfect"), "Calibration", caption)


def loss(evidence: Evidence) -> Markup:
    """Draw the losses of each epoch."""
    rows, kept = evidence.history, evidence.figures["best_epoch"]
    lines = [
        Line(name, [(row["epoch"], row[f"{name}_loss"]) for row in rows], [2.5] * len(rows))
        for name in ("train", "val")
    ]
    top = max(y for line in lines for _, y in line.points) * 1.05
    first, last = rows[0], rows[-1]
    finding = (
        f"Over {len(rows)} epochs the training loss went from {first['train_loss']:.3f} to "
        f"{last['train_loss']:.3f} and the validation loss from {first['val_loss']:.3f} to {last['val_loss']:.3f}."
    )
    drawn = chart(lines, _epochs(evidence), Axis("loss", 0, top or 1), alt=f"Loss by epoch. {finding}", mark=kept)
    return _figure(drawn, legend(["train", "val"], mark=f"kept: epoch {kept}"), "Loss by epoch", finding)


def val_auc(evidence: Evidence) -> Markup:
    """Draw the AUC on val after each epoch."""
    rows, kept = evidence.history, evidence.figures["best_epoch"]
    line = Line("val", [(row["epoch"], row["val_auc"]) for row in rows], [2.5] * len(rows))
    low = min(0.5, *(y for _, y in line.points))
    finding = (
        f"The AUC on val was highest, {evidence.figures['val_auc']:.3f}, after epoch {kept} of {len(rows)}, "
        f"whose weights were kept; after the last epoch it was {rows[-1]['val_auc']:.3f}."
    )
    drawn = chart([line], _epochs(evidence), Axis("AUC", low, 1.0), alt=f"AUC on val by epoch. {finding}", mark=kept)
    return _figure(drawn, legend(["val"], mark=f"kept: epoch {kept}"), "AUC on val by epoch", finding)


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
    return _figure(scrolled, None, "Confusion", f"{finding} Shares are of each true class.")


def sheet(pictures: Pictures) -> Markup:
    """Show the contact sheet of heat maps."""
    found = pictures.found["sheet"]
    note = "A map shows where a gate is open, or what Grad-CAM credits; neither proves why the model decided."
    return _figure(picture(pictures.folder / found["file"], found["alt"]), None, "Heat maps", note, wide=True)


def efficiency(study: Study) -> Markup | None:
    """Show the curve of a study, which is that of the first score; None if it has none."""
    if study.curve is None:
        return None
    first = study.rows[0]["score"] if study.rows else ""
    rows = [row for row in study.rows if row["score"] == first and row.get("mean")]
    best, worst = (choose(rows, key=lambda row: float(row["mean"])) for choose in (max, min)) if rows else ({}, {})
    finding = f"Highest mean: {_setting(best)}. Lowest: {_setting(worst)}." if rows else "No run is done yet."
    alt = f"Curves of the study {study.name}: mean {first or 'score'} over the share of the training set. {finding}"
    return _figure(picture(study.curve, alt), None, "Data efficiency", finding, wide=True)


def _figure(drawn: Markup, names: Markup | None, title: str, finding: str, *, wide: bool = False) -> Markup:
    caption = tag("figcaption", tag("strong", f"{title}. "), finding)
    return tag("figure", drawn, names, caption, class_="wide" if wide else None)


def _setting(row: Mapping[str, str]) -> str:
    """A row of a study's table in words: its setting, its score and its mean."""
    names = list(row)
    setting = ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in names[: names.index("score")] if row[name])
    return f"{row['score']} {float(row['mean']):.3f} with {setting}"


def _epochs(evidence: Evidence) -> Axis:
    last = evidence.history[-1]["epoch"]
    return Axis("epoch", 1, max(last, 2), whole=True)


def _spelled(values: dict[str, float]) -> str:
    if len(values) == 1:
        return f"{next(iter(values.values())):.3f}"
    if len(values) <= _SPELLED:
        return ", ".join(f"{value:.3f} for {name}" for name, value in values.items())
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"{values[high]:.3f} for {high} (the highest of {len(values)}) to {values[low]:.3f} for {low}"


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


COLOURS = 6  # that the style sheet knows
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")  # once the colours are used up
_WIDTH, _HEIGHT = 400, 330
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 12, 388, 284  # edges of the plot
_PIXEL = 0.05  # of the drawing: points that change a line by less are left out

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: For the legend.
        points: (x, y), in order.
        sizes: Radius of a dot at each point; empty for none.
        bars: Low and high end of an upright bar at each point; empty for none.
    """

    name: str
    points: Sequence[Point]
    sizes: Sequence[float] = ()
    bars: Sequence[Point] = ()


@dataclass(frozen=True)
class Axis:
    """What runs along one side of a chart.

    Attributes:
        label: What it shows.
        low: Where it begins.
        high: Where it ends.
        whole: Whether only whole numbers are marked.
    """

    label: str
    low: float = 0.0
    high: float = 1.0
    whole: bool = False

    def ticks(self) -> list[float]:
        """Give about five round values within the axis."""
        span = self.high - self.low
        raw = span / 5
        magnitude = 10 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
        step = max(step, 1.0) if self.whole else step
        step = math.ceil(step) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def place(self, value: float, start: float, end: float) -> float:
        """Map a value onto the drawing."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def chart(
    lines: Sequence[Line],
    across: Axis,
    up: Axis,
    *,
    alt: str,
    diagonal: bool = False,
    mark: float | None = None,
) -> Markup:
    """Draw lines over two axes.

    Args:
        lines: At least one.
        across: The horizontal axis.
        up: The vertical axis.
        alt: What the chart shows, in words and numbers.
        diagonal: Draw what chance, or perfect calibration, would be.
        mark: Where a vertical line stands.
    """
    parts = [*_grid(across, up)]
    if diagonal:
        parts.append(tag("line", x1=_LEFT, y1=_BOTTOM, x2=_RIGHT, y2=_TOP, class_="reference"))
    if mark is not None:
        x = _number(across.place(mark, _LEFT, _RIGHT))
        parts.append(tag("line", x1=x, y1=_TOP, x2=x, y2=_BOTTOM, class_="mark"))
    for number, line in enumerate(lines):
        parts += _line(number, line, across, up)
    return tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=alt)


def legend(names: Iterable[str], *, reference: str = "", mark: str = "") -> Markup:
    """Name the lines of a chart, in HTML, so that long names wrap."""
    entries = [
        (name, {"class_": f"line c{number % COLOURS}", "stroke_dasharray": _dash(number)})
        for number, name in enumerate(names)
    ]
    entries += [(name, {"class_": kind}) for name, kind in ((reference, "reference"), (mark, "mark")) if name]
    return tag(
        "ul",
        *(
            tag(
                "li",
                tag("svg", tag("line", x1=0, y1=5, x2=26, y2=5, **style), viewBox="0 0 26 10", aria_hidden="true"),
                tag("span", name),
            )
            for name, style in entries
        ),
        class_="legend",
    )


def _grid(across: Axis, up: Axis) -> Iterable[Markup]:
    for value in across.ticks():
        x = _number(across.place(value, _LEFT, _RIGHT))
        yield tag("line", x1=x, y1=_TOP, x2=x, y2=_BOTTOM, class_="grid")
        yield tag("text", _value(value), x=x, y=_BOTTOM + 17, text_anchor="middle")
    for value in up.ticks():
        y = _number(up.place(value, _BOTTOM, _TOP))
        yield tag("line", x1=_LEFT, y1=y, x2=_RIGHT, y2=y, class_="grid")
        yield tag("text", _value(value), x=_LEFT - 7, y=y, dy="0.35em", text_anchor="end")
    middle = (_TOP + _BOTTOM) / 2
    yield tag("text", across.label, x=(_LEFT + _RIGHT) / 2, y=_HEIGHT - 8, text_anchor="middle", class_="axis")
    turned = f"rotate(-90 13 {middle})"
    yield tag("text", up.label, x=13, y=middle, dy="0.35em", transform=turned, text_anchor="middle", class_="axis")


def _line(number: int, line: Line, across: Axis, up: Axis) -> Iterable[Markup]:
    places = [(across.place(x, _LEFT, _RIGHT), up.place(y, _BOTTOM, _TOP)) for x, y in line.points]
    kind = f"c{number % COLOURS}"
    for (x, _), ends in zip(places, line.bars, strict=False):
        low, high = (_number(up.place(end, _BOTTOM, _TOP)) for end in ends)
        yield tag("line", x1=_number(x), y1=low, x2=_number(x), y2=high, class_=f"line bar {kind}", stroke_opacity=0.5)
    path = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in _thinned(places))
    yield tag("path", d=path, class_=f"line {kind}", stroke_dasharray=_dash(number))
    for (x, y), radius in zip(places, line.sizes, strict=False):
        yield tag("circle", cx=_number(x), cy=_number(y), r=_number(radius), class_=f"dot {kind}")


def _thinned(places: Sequence[Point]) -> list[Point]:
    """Leave out points that lie on the straight line between their neighbours."""
    kept = list(places[:1])
    for place, (x2, y2) in pairwise(places[1:]):
        (x0, y0), (x1, y1) = kept[-1], place
        length = math.hypot(x2 - x0, y2 - y0)
        away = abs((x2 - x0) * (y0 - y1) - (x0 - x1) * (y2 - y0)) / length if length else math.hypot(x1 - x0, y1 - y0)
        if away > _PIXEL:
            kept.append(place)
    return [*kept, *places[1:][-1:]]


def _dash(number: int) -> str:
    return _DASHES[number // COLOURS % len(_DASHES)]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _value(value: float) -> str:
    return f"{value:.4g}"
