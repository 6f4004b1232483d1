"""Figures for people: small PNG files that read well on paper and on a screen.

matplotlib takes a second to import, so it waits for the first figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline import records
from pipeline.train import run_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
_DASHES = ("-", "--", ":", "-.")  # once the colours are used up
_MARKERS = ("o", "^", "s", "D")  # likewise
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
Floats = npt.NDArray[np.floating[Any]]


def draw_roc(path: Path, curves: Mapping[str, Sequence[Floats]], aucs: Mapping[str, float]) -> None:
    """Draw one ROC curve per class.

    Args:
        path: The PNG file.
        curves: By class, false and true positive rates, and what else follows.
        aucs: By class, for the legend.
    """
    with _figure(path, width_in=4.2, height_in=4.2) as (axes,):
        axes.plot((0, 1), (0, 1), color="#999999", linewidth=0.8, linestyle=":", label="chance")
        for number, (name, curve) in enumerate(curves.items()):
            axes.plot(curve[0], curve[1], **_line(number), label=f"{name}  AUC {aucs[name]:.3f}")
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.set_aspect("equal")
        axes.legend(loc="lower right", fontsize=8)


def draw_precision_recall(path: Path, curves: Mapping[str, Sequence[Floats]], precisions: Mapping[str, float]) -> None:
    """Draw precision over recall, one curve per class.

    Args:
        path: The PNG file.
        curves: By class, recalls and precisions, and what else follows.
        precisions: By class, average precision for the legend.
    """
    with _figure(path, width_in=4.2, height_in=4.2) as (axes,):
        for number, (name, curve) in enumerate(curves.items()):
            axes.step(curve[0], curve[1], where="pre", **_line(number), label=f"{name}  AP {precisions[name]:.3f}")
        axes.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.set_aspect("equal")
        axes.legend(loc="lower left", fontsize=8)


def draw_reliability(path: Path, steps: Sequence[Mapping[str, float]], error: float) -> None:
    """Draw how often decisions of each confidence are right, the dots as large as the samples are many, with intervals.

    Args:
        path: The PNG file.
        steps: Rows of `intervals.reliability`.
        error: The expected calibration error, for the title.
    """
    most = max(step["count"] for step in steps)
    with _figure(path, width_in=4.2, height_in=4.2) as (axes,):
        axes.plot((0, 1), (0, 1), color="#999999", linewidth=0.8, linestyle=":")
        confidence, accuracy = ([step[key] for step in steps] for key in ("confidence", "accuracy"))
        axes.vlines(
            confidence,
            [step["low"] for step in steps],
            [step["high"] for step in steps],
            color=_COLOURS[0],
            alpha=0.5,
            linewidth=1.5,
        )
        axes.plot(confidence, accuracy, color=_COLOURS[0], linewidth=1.0)
        axes.scatter(confidence, accuracy, [8 + 80 * step["count"] / most for step in steps], color=_COLOURS[0])
        axes.set(xlabel="confidence", ylabel="share that is right", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.set_title(f"expected calibration error {error:.3f}; bars: 95 % intervals", fontsize=9)
        axes.set_aspect("equal")


def draw_history(path: Path, history: Sequence[Mapping[str, Any]], *, best_epoch: int) -> None:
    """Draw the losses of each epoch, the AUC on val, and the epoch that was kept.

    A history without epochs has a row for whatever was tried instead; see `run_folder.steps_of`.
    """
    from matplotlib.ticker import MaxNLocator

    step, _, kept = run_folder.steps_of(history, best_epoch)
    epochs = [row["epoch"] for row in history]
    with _figure(path, width_in=6.4, height_in=3.0, panels=2) as (left, right):
        left.plot(epochs, [row["train_loss"] for row in history], **_line(0), label="train")
        left.plot(epochs, [row["val_loss"] for row in history], **_line(1), label="val")
        left.set(xlabel=step, ylabel="loss")
        left.set_ylim(bottom=0)
        right.plot(epochs, [row["val_auc"] for row in history], **_line(1), label="val")
        right.set(xlabel=step, ylabel="AUC", ylim=(min(0.5, *(row["val_auc"] for row in history)), 1.01))
        for axes in (left, right):
            axes.axvline(best_epoch, color="#999999", linewidth=0.8, linestyle="--", label=f"kept: {kept}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def draw_confusion(path: Path, counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
    """Draw the confusion matrix, shaded by the share of each true class."""
    table = np.asarray(counts)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side_in = 1.6 + 0.7 * len(class_names)
    with _figure(path, width_in=side_in + 0.4, height_in=side_in) as (axes,):
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.grid(visible=False)
        for (row, column), count in np.ndenumerate(table):
            dark = share[row, column] > 0.5
            text = f"{count}\n{share[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
        ticks = range(len(class_names))
        axes.set_xticks(ticks, class_names, rotation=30, ha="right")
        axes.set_yticks(ticks, class_names)
        axes.set(xlabel="predicted", ylabel="true")


def draw_probe(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the AUC of each tap and method on val and on test, best on val first, the chosen one in bold.

    Args:
        path: The PNG file.
        rows: Of the table that `pipeline.evaluate.probe` makes.
    """
    with _figure(path, width_in=6.4, height_in=1.1 + 0.26 * len(rows)) as (axes,):
        for number, (split, marker) in enumerate((("val", "o"), ("test", "D"))):
            scored = [(place, row[split]) for place, row in enumerate(rows) if row[split] is not None]
            if not scored:
                continue
            at = [place + (number - 0.5) * 0.3 for place, _ in scored]
            low, high = ([found["intervals"]["auc"][end] for _, found in scored] for end in ("low", "high"))
            axes.hlines(at, low, high, color=_COLOURS[number], alpha=0.5, linewidth=1.5)
            axes.plot(
                [found["auc"] for _, found in scored], at, marker, color=_COLOURS[number], markersize=4, label=split
            )
        names = [f"{row['tap']}, {row['method']}" for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row["chosen"] else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("AUC; bars: 95 % intervals")
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)


def draw_plane(
    path: Path,
    at: Floats,
    colourings: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    outliers: Mapping[str, int],
    *,
    axis_labels: tuple[str, str],
) -> None:
    """Draw points on a plane, a panel for each way to colour them, with numbered rings around those that have a name.

    Args:
        path: The PNG file.
        at: (n, 2) coordinates.
        colourings: By heading, the names in the order of the legend, and the name of each point.
        outliers: Points to ring, by name, in the order of their numbers.
        axis_labels: Of the two directions.
    """
    lines = ["apart from the others:"] * bool(outliers)
    lines += [f"{number}  {name}" for number, name in enumerate(outliers, start=1)]
    height_in = 4.3 + 0.16 * len(lines)
    with drawing(path, width_in=3.9 * len(colourings), height_in=height_in) as figure:
        parts = figure.subfigures(2, 1, height_ratios=[4.3, max(0.16 * len(lines), 0.01)], squeeze=False)
        top, bottom = parts[:, 0]
        panels = top.subplots(1, len(colourings), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (heading, (names, name_of)) in zip(panels, colourings.items(), strict=True):
            named = np.asarray(name_of)
            for number, name in enumerate(names):
                points = at[named == name]
                if len(points):
                    axes.scatter(
                        *points.T, **_dots(number, len(at)), label=f"{name} ({len(points)})".replace("$", r"\$")
                    )
            axes.set_title(heading, fontsize=9)
            axes.set_xlabel(axis_labels[0])
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=7.5, markerscale=1.3)
            for number, index in enumerate(outliers.values(), start=1):
                axes.scatter(*at[index], s=60, facecolors="none", edgecolors="black", linewidths=0.8)
                axes.annotate(str(number), at[index], (5, 5), textcoords="offset points", fontsize=8)
        panels[0].set_ylabel(axis_labels[1])
        bottom.text(0.02, 1, "\n".join(lines), fontsize=7.5, va="top", parse_math=False)


def draw_efficiency(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    *,
    score: str,
    across: Literal["fraction", "shots"] = "fraction",
) -> None:
    """Draw a score over how much was trained on: a panel per setting, a line per variant.

    The band is one standard deviation over the seeds to either side, where there are several.

    Args:
        path: The PNG file.
        panels: By title, by variant, rows of `fraction` or `shots`, `mean`, and `sd` or None.
        score: Its name.
        across: Share of the training set, or images of each class, which double from one to the next.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    drawn: dict[str, Any] = {}
    width_in = 1.2 + 4.0 * len(panels)
    with _figure(path, width_in=width_in, height_in=3.9, panels=len(panels)) as every:
        for axes, (title, lines) in zip(every, panels.items(), strict=True):
            for name, rows in lines.items():
                number = names.index(name)
                at = [100 * row[across] if across == "fraction" else row[across] for row in rows]
                means, style = [row["mean"] for row in rows], _line(number)
                (drawn[name],) = axes.plot(at, means, **style, marker="o", markersize=3, label=name)
                sd = [row["sd"] or 0.0 for row in rows]
                low, high = ([row["mean"] + sign * s for row, s in zip(rows, sd, strict=True)] for sign in (-1, 1))
                axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
            if across == "shots":
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:g}")
            label = "share of the training set (%)" if across == "fraction" else "images of each class"
            axes.set(xlabel=label, ylabel=score)
            axes.set_title(title, fontsize=9)
        columns = math.ceil(len(names) / math.ceil(1.3 * len(names) / width_in))  # as many in each line
        axes.figure.legend(
            [drawn[name] for name in names], names, loc="outside lower center", ncols=columns, fontsize=8
        )


@contextmanager
def drawing(path: Path, *, width_in: float, height_in: float) -> Iterator[Figure]:
    """Give an empty figure in this module's style, and write it to `path` whole."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        yield figure
        with records.replacing(path) as file:
            figure.savefig(file, format="png", dpi=130)


@contextmanager
def _figure(path: Path, *, width_in: float, height_in: float, panels: int = 1) -> Iterator[list[Axes]]:
    """Give axes side by side to draw on, and write them to `path` whole."""
    with drawing(path, width_in=width_in, height_in=height_in) as figure:
        yield [figure.add_subplot(1, panels, number + 1) for number in range(panels)]


def _dots(number: int, count: int) -> dict[str, Any]:
    """Colour and marker of the points with a number, smaller and paler where there are many."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number // len(_COLOURS) % len(_MARKERS)],
        "s": float(np.clip(3000 / count, 3, 18)),
        "alpha": 0.8 if count < 2000 else 0.4,
        "linewidths": 0,
    }


def _line(number: int) -> dict[str, Any]:
    """Colour and dash of the line with a number, so that no two of the first 28 look the same."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        "linewidth": 1.5,
    }
