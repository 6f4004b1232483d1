"""Pictures of images with heat maps over them, or painted: one figure a sample, and a contact sheet of many samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.data import Image
from pipeline.data.dataset import Mask
from pipeline.evaluate.plots import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_COLUMNS = 4  # panels beside each other in the figure of a sample
_PANEL_IN = 2.1
_CELL_IN = 1.45
_LETTERS_PER_IN = {10: 13, 8: 14, 6.5: 17}  # that fit, by size of type, on the safe side

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class HeatMap:
    """A map over one image, or the image as it was painted, which has no scale.

    Attributes:
        title: What it is.
        values: (h, w) over the whole image; (h, w, 3) uint8 of a painted one.
        low: Value of the lowest colour.
        high: Value of the highest colour.
        words: What else to say of it; empty for nothing.
    """

    title: str
    values: Floats | Image
    low: float
    high: float
    words: str = ""

    @property
    def painted(self) -> bool:
        """Whether it is a picture by itself."""
        return self.values.ndim == 3


@dataclass(frozen=True)
class Bar:
    """What leaving out one mask changes.

    Attributes:
        name: Of the mask, as a person reads it.
        change: Of the probability of what was predicted: with the mask, less without it.
        at: Where the middle of the mask is, (x, y) as parts of the image.
        number: Written there and before the name.
    """

    name: str
    change: float
    at: tuple[float, float]
    number: int


@dataclass(frozen=True)
class Case:
    """One sample to draw.

    Attributes:
        name: Its id.
        image: (H, W, 3) uint8.
        mask: Where the lesion is, (H, W); None where that is not known.
        true: Its class, as a person reads it.
        predicted: The class that the classifier said.
        probability: How sure the classifier was of that.
        maps: Where it looked.
    """

    name: str
    image: Image
    mask: Mask | None
    true: str
    predicted: str
    probability: float
    maps: tuple[HeatMap, ...]


def gate_maps(name: str, values: Floats, low: float, high: float) -> tuple[HeatMap, HeatMap]:
    """Show a gate twice: on the scale that it lives on, and stretched to what it takes of it.

    The first tells the truth about how much it does, the second where; a gate of .495 to .505 looks strong there.

    Args:
        name: Of the gate.
        values: (h, w) in [0, 1].
        low: Its lowest value, over all the images that are shown.
        high: Its highest, likewise.
    """
    return (
        HeatMap(f"{name}, 0 to 1", values, 0.0, 1.0),
        HeatMap(f"{name}, stretched", values, low, high, varies(low, high)),
    )


def varies(low: float, high: float) -> str:
    """Say in words how much of the scale from 0 to 1 a gate takes."""
    percent = 100 * (high - low)
    if percent < 0.05:
        return "varies by less than 0.1 %"
    return f"varies by {percent:.0f} %" if percent >= 0.9 else f"varies by {percent:.1f} %"


def draw_case(path: Path, case: Case) -> None:
    """Draw an image and its maps, each with the numbers behind its colours.

    Args:
        path: The PNG file.
        case: What to draw.
    """
    panels = 1 + len(case.maps)
    columns = min(_COLUMNS, panels) if panels != 5 else 3  # 5 would leave one alone on its row
    rows = math.ceil(panels / columns)
    aspect = _aspect([case])
    width_in, height_in = columns * _PANEL_IN, rows * (_PANEL_IN * aspect + 0.75) + 0.5
    with drawing(path, width_in=max(width_in, 4.2), height_in=height_in) as figure:
        figure.suptitle(_headline(case, max(width_in, 4.2)), fontsize=10, parse_math=False)
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[_PANEL_IN * aspect, 0.09] * rows, wspace=0.08)
        for number, one in enumerate((None, *case.maps)):
            row, column = divmod(number, columns)
            axes = figure.add_subplot(grid[2 * row, column])
            mappable = _show(axes, case, one)
            bar = figure.add_subplot(grid[2 * row + 1, column])
            if one is None:
                axes.set_title("image" if case.mask is None else "image, lesion outlined", fontsize=9)
                bar.set_axis_off()
            else:
                axes.set_title("\n".join(filter(None, (one.title, one.words))), fontsize=9, parse_math=False)
                if one.painted:
                    bar.set_axis_off()
                else:
                    _number_colours(figure, mappable, bar, one, "horizontal")


def draw_masks(path: Path, case: Case, said: str, bars: Sequence[Bar], rest: str) -> None:
    """Draw an image and its maps, and beside them what leaving out each mask changes.

    Args:
        path: The PNG file.
        case: The image; its first map is the painted one, on which the masks are numbered.
        said: The class that was predicted.
        bars: The masks, the largest change first.
        rest: What else to say; empty for nothing.
    """
    panels, aspect = 1 + len(case.maps), _aspect([case])
    width_in, heights = max(panels * _PANEL_IN, 4.2), (_PANEL_IN * aspect + 0.8, 0.22 * max(len(bars), 1) + 0.5)
    with drawing(path, width_in=width_in, height_in=sum(heights)) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        above.suptitle(_headline(case, width_in), fontsize=10, parse_math=False)
        for number, one in enumerate((None, *case.maps)):
            axes = above.add_subplot(1, panels, number + 1)
            _show(axes, case, one)
            plain = "image" if case.mask is None else "image, lesion outlined"
            axes.set_title(plain if one is None else one.title, fontsize=8, parse_math=False)
            if one is not None and one.painted:
                _number_masks(axes, case, bars)
        axes = below.add_subplot()
        if not bars:
            axes.set_axis_off()
            axes.text(0, 0.5, "No mask was found: the classifier saw the plain image.", fontsize=9)
            return
        colours = ["#1f77b4" if bar.change >= 0 else "#d62728" for bar in bars]
        axes.barh(range(len(bars)), [bar.change for bar in bars], color=colours, height=0.6)
        axes.set_yticks(range(len(bars)), [f"{bar.number}: {bar.name}" for bar in bars], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(0, color="#555555", linewidth=0.8)
        meaning = f"probability of {said} with the mask, less without it"
        axes.set_xlabel(f"{meaning}; {rest}" if rest else meaning, fontsize=7, parse_math=False)
        axes.tick_params(axis="x", labelsize=7)


def _number_masks(axes: Axes, case: Case, bars: Sequence[Bar]) -> None:
    height, width = case.image.shape[:2]
    style: Any = {"fontsize": 7, "ha": "center", "va": "center", "color": "white"}
    for bar in bars:
        box = {"facecolor": "black", "alpha": 0.6, "pad": 0.8}
        axes.text(bar.at[0] * width, bar.at[1] * height, str(bar.number), bbox=box, **style)


def draw_sheet(path: Path, blocks: Mapping[str, Sequence[Case]], *, columns: int, empty: str) -> None:
    """Draw many samples: a block under each heading, a column for each sample, its image above its maps.

    The maps of a row share their colours, except where each map has a range of its own.

    Args:
        path: The PNG file.
        blocks: By heading, the samples; their maps are of the same kinds.
        columns: Room for so many samples in a row.
        empty: What to say where a block has none.
    """
    known = [case for cases in blocks.values() for case in cases]
    kinds = max((len(case.maps) for case in known), default=0)
    aspect = _aspect(known)
    heights = [(1 + kinds) * _CELL_IN * aspect + 1.1 if cases else 0.7 for cases in blocks.values()]
    width_in = max(columns, 2) * _CELL_IN + 1.0
    with drawing(path, width_in=width_in, height_in=sum(heights)) as figure:
        parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (heading, cases) in zip(parts, blocks.items(), strict=True):
            part.suptitle(heading, fontsize=11, fontweight="bold", x=0.01, ha="left", parse_math=False)
            if cases:
                _draw_block(part, cases, columns, kinds)
            else:
                part.text(0.01, 0.35, empty, fontsize=9, color="#555555", ha="left", parse_math=False)


def draw_strip(path: Path, case: Case) -> None:
    """Draw an image and its maps below each other without a word, for pages that set the words beside it.

    Args:
        path: The PNG file.
        case: What to draw.
    """
    panels = 1 + len(case.maps)
    aspect = _aspect([case])
    gap = 0.03  # of a panel's height
    height_in = _CELL_IN * aspect * (panels + gap * (panels - 1))
    with drawing(path, width_in=_CELL_IN, height_in=height_in) as figure:
        figure.set_layout_engine("none")
        share = 1 / (panels + gap * (panels - 1))
        for number, one in enumerate((None, *case.maps)):
            axes = figure.add_axes((0, 1 - share * (number * (1 + gap) + 1), 1, share))
            _show(axes, case, one)


def _draw_block(part: SubFigure, cases: Sequence[Case], columns: int, kinds: int) -> None:
    grid = part.add_gridspec(1 + kinds, columns + 1, width_ratios=[_CELL_IN] * columns + [0.09])
    for column, case in enumerate(cases):
        axes = part.add_subplot(grid[0, column])
        _show(axes, case)
        words = (f"true {case.true}", f"said {case.predicted}", _percent(case.probability))
        label = "\n".join(_fitting(line, 8, _CELL_IN) for line in words)
        axes.set_title(label, fontsize=8, parse_math=False)
        for row, one in enumerate(case.maps, start=1):
            axes = part.add_subplot(grid[row, column])
            mappable = _show(axes, case, one)
            if column == 0 and one.painted:
                bar = part.add_subplot(grid[row, columns])
                bar.set(xticks=[], yticks=[])
                bar.spines[:].set_visible(False)
                bar.yaxis.set_label_position("right")
                bar.set_ylabel(one.title, fontsize=8, parse_math=False)
            elif column == 0:
                bar = part.add_subplot(grid[row, columns])
                shared = all(other.maps[row - 1].high == one.high for other in cases)
                _number_colours(part, mappable, bar, one if shared else replace(one, high=math.inf), "vertical")
                lines = [*one.title.split(", "), *filter(None, [one.words])]  # a bar is too short for one line
                bar.set_ylabel("\n".join(lines), fontsize=8, parse_math=False)
        axes.set_xlabel(
            _fitting(case.name, 6.5, _CELL_IN, keep_end=True), fontsize=6.5, color="#555555", parse_math=False
        )


def _show(axes: Axes, case: Case, one: HeatMap | None = None) -> Any:
    """Draw the image, the map over it, and the lesion's outline."""
    height, width = case.image.shape[:2]
    place = (0, width, height, 0)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    mappable = axes.imshow(case.image if one is None or not one.painted else one.values, extent=place)
    if one is not None and not one.painted:
        grey = case.image.mean(axis=2)
        axes.imshow(grey, extent=place, cmap="gray", vmin=0, vmax=255)
        low, high = _limits(one)
        mappable = axes.imshow(one.values, extent=place, cmap="inferno", vmin=low, vmax=high, alpha=0.6)
    if case.mask is not None and case.mask.any() and not case.mask.all():
        rows, columns = case.mask.shape
        across, down = (np.arange(columns) + 0.5) * width / columns, (np.arange(rows) + 0.5) * height / rows
        for colour, thickness in (("black", 1.8), ("white", 0.9)):
            axes.contour(across, down, case.mask, levels=[0.5], colors=colour, linewidths=thickness)
    return mappable


def _number_colours(
    figure: Figure | SubFigure,
    mappable: Any,
    axes: Axes,
    one: HeatMap,
    orientation: Literal["horizontal", "vertical"],
) -> None:
    """Put the numbers behind the colours into `axes`; an endless range is each map's own, and has no numbers."""
    bar = figure.colorbar(mappable, cax=axes, orientation=orientation)
    low, high = mappable.get_clim()
    if one.high == math.inf:
        bar.set_ticks([low, high], labels=["0", "each\nimage's\nhighest"])
        bar.ax.get_yticklabels()[-1].set_verticalalignment("top")
    elif one.low == one.high:
        bar.set_ticks([one.low], labels=[f"{one.low:.4g} everywhere"])
        if orientation == "horizontal":
            bar.ax.get_xticklabels()[0].set_horizontalalignment("left")
    else:
        decimals = int(np.clip(1 - math.floor(math.log10(high - low)), 1, 6))
        ticks = [low, (low + high) / 2, high]
        bar.set_ticks(ticks, labels=[f"{tick:.{decimals}f}" for tick in ticks])
        if orientation == "horizontal":  # numbers at the ends stay clear of those of the next panel
            first, _, last = bar.ax.get_xticklabels()
            first.set_horizontalalignment("left")
            last.set_horizontalalignment("right")
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)


def _aspect(cases: Sequence[Case]) -> float:
    """Height over width of the panels: the images' median, within reason."""
    known = [case.image.shape[0] / case.image.shape[1] for case in cases]
    return float(np.clip(np.median(known), 0.4, 2.5)) if known else 1.0


def _limits(one: HeatMap) -> tuple[float, float]:
    """Where the colours begin and end; apart, even for a constant map."""
    return (one.low, one.high) if one.high > one.low else (one.low, one.low + 1)


def _headline(case: Case, width_in: float) -> str:
    verdict = "right" if case.true == case.predicted else "wrong"
    name = _fitting(case.name, 10, width_in, keep_end=True)
    said = f"predicted: {case.predicted} ({_percent(case.probability)}, {verdict})"
    line = f"true: {case.true}   {said}"
    lines = [line] if line == _fitting(line, 10, width_in) else [f"true: {case.true}", said]
    return "\n".join([name, *(_fitting(one, 10, width_in) for one in lines)])


def _percent(probability: float) -> str:
    """A probability without claiming certainty that rounding made up."""
    percent = f"{probability:.0%}" if probability < 0.995 else f"{probability:.1%}"
    return "> 99.9%" if percent == "100.0%" else percent


def _fitting(line: str, size: float, width_in: float, *, keep_end: bool = False) -> str:
    """Shorten a line to what fits; of a name the end is kept, which tells samples apart."""
    room = int(_LETTERS_PER_IN[size] * width_in)
    if len(line) <= room:
        return line
    return f"…{line[len(line) - room + 1 :]}" if keep_end else f"{line[: room - 1]}…"
