"""The files of a study: results.csv, the table as CSV, Markdown and LaTeX, and the data-efficiency curve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluate import plots
from pipeline.study.runs import Row
from pipeline.study.table import Summary
from pipeline.train import run_folder

_FIGURES = (
    "score", "seeds", "missing", "mean", "sd", "low", "high", "difference", "difference_low", "difference_high",
)  # fmt: skip
NAMES = {"auc": "AUC", "ap": "AP", "acc": "ACC", "balanced_acc": "balanced ACC", "f1": "F1", "kappa": "kappa",
         "ece": "ECE", "brier": "Brier"}  # fmt: skip


def write_files(folder: Path, summary: Summary) -> list[Row]:
    """Write what is known so far of a study into its folder; returns the table.

    `results.csv` has a row per run; `table.csv` a row per setting and score; `table.md` and `table.tex` a row per
    setting; `curve.csv` and `curve.png`, only where there are several fractions, the first score over the fraction.
    """
    results, table = summary.results(), summary.table()
    if not results:
        return table
    missing = len(summary.runs) - len(results)
    run_folder.write_csv(folder / "results.csv", results)
    run_folder.write_csv(folder / "table.csv", table)
    _write_text(folder / "table.md", as_markdown(table, summary.baseline, missing))
    _write_text(folder / "table.tex", as_latex(table, summary.baseline, missing))
    curve = [row for row in table if row["score"] == summary.scores[0]]
    if len({row["fraction"] for row in curve}) > 1:
        columns = [*cell_columns(curve), "score", "seeds", "mean", "sd", "low", "high"]
        run_folder.write_csv(folder / "curve.csv", [{key: row[key] for key in columns} for row in curve])
        score = NAMES[summary.scores[0]]
        plots.draw_efficiency(folder / "curve.png", _panels(curve), score=score)
    return table


def as_markdown(table: Sequence[Row], baseline: str, missing: int) -> str:
    """Spell the table as Markdown, with what its numbers mean and what is not there yet below it."""
    lines = table_lines(table, baseline, plus_minus=" ± ")
    head, *body = lines
    spelled = [head, ["---"] * len(head), *body]
    rows = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in spelled)
    return f"{rows}\n\n{legend(baseline)}\n{absence(missing)}"


def as_latex(table: Sequence[Row], baseline: str, missing: int) -> str:
    """Spell the table as a `tabular` in the style of the package booktabs."""
    head, *body = [[_for_latex(cell) for cell in line] for line in table_lines(table, baseline, plus_minus=" \\pm ")]
    comments = "".join(f"% {line}\n" for line in f"{legend(baseline)}\n{absence(missing)}".splitlines() if line)
    rows = "".join(" & ".join(line) + " \\\\\n" for line in body)
    return (
        f"{comments}\\begin{{tabular}}{{{'l' * len(head)}}}\n\\toprule\n{' & '.join(head)} \\\\\n\\midrule\n{rows}"
        f"\\bottomrule\n\\end{{tabular}}\n"
    )


def cell_columns(table: Sequence[Row]) -> list[str]:
    """Columns that say what a row is about."""
    return [key for key in table[0] if key not in _FIGURES]


def table_lines(
    table: Sequence[Row], baseline: str, *, plus_minus: str = " ± ", brief: bool = False
) -> list[list[str]]:
    """Cells of the table for people, the head first; columns in which nothing varies are left out.

    Args:
        table: See `Summary.table`.
        baseline: Its variant.
        plus_minus: Between mean and standard deviation.
        brief: Leave out the intervals of the means, for a terminal.
    """
    about = [key for key in cell_columns(table) if key == "variant" or len({str(row[key]) for row in table}) > 1]
    scores = list(dict.fromkeys(row["score"] for row in table))
    head = [*about, "seeds"]
    for score in scores:
        head += [NAMES[score], f"{NAMES[score]} less {baseline}"]
    by_cell: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in table:
        by_cell.setdefault(tuple(str(row[key]) for key in cell_columns(table)), {})[row["score"]] = row
    lines = [head]
    for of_score in by_cell.values():
        any_row = next(iter(of_score.values()))
        line = [_spell(any_row[key]) for key in about] + [str(any_row["seeds"])]
        for score in scores:
            known = of_score.get(score)
            line += ["", ""] if known is None else [spell_mean(known, plus_minus, brief=brief), spell_difference(known)]
        lines.append(line)
    return lines


def spell_mean(row: Row, plus_minus: str = " ± ", *, brief: bool = False) -> str:
    """Spell mean, standard deviation and interval: `.912 ± .010 [.900, .924]`."""
    if row["sd"] is None:
        return f"{row['mean']:.3f}"
    if brief:
        return f"{row['mean']:.3f}{plus_minus}{row['sd']:.3f}"
    return f"{row['mean']:.3f}{plus_minus}{row['sd']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def spell_difference(row: Row) -> str:
    """Spell a difference and its interval, or nothing where there is none."""
    if row["difference"] is None:
        return ""
    return f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"


def _spell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def legend(baseline: str) -> str:
    """Say what the numbers of the table are."""
    return (
        f"Mean over seeds ± standard deviation [95 % interval of the mean over seeds, on this test set]. "
        f"Differences to {baseline} are paired by seed and test sample [95 % interval over seeds and test samples; "
        f"with one seed, over test samples alone]."
    )


def absence(missing: int) -> str:
    """Say how many runs are missing, or nothing."""
    if not missing:
        return ""
    return f"\n{missing} run{' is' if missing == 1 else 's are'} missing: run the study again to make them.\n"


def _for_latex(cell: str) -> str:
    """Escape what LaTeX would read as a command; `±` becomes mathematics."""
    for sign in "&%$#_{}":
        cell = cell.replace(sign, f"\\{sign}")
    return re.sub(r"(?<!\w)([+-])(?=\d+\.)", r"$\1$", cell.replace(" \\pm ", " $\\pm$ "))


def _panels(curve: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Group the rows of the curve: a panel for all that agree in everything but variant and fraction."""
    shared = [key for key in cell_columns(curve) if key not in ("variant", "fraction")]
    varying = [key for key in shared if len({str(row[key]) for row in curve}) > 1]
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(curve, key=_fraction):
        title = ", ".join(f"{key} {_spell(row[key])}" for key in varying)
        panels.setdefault(title, {}).setdefault(row["variant"], []).append(row)
    order = {row["variant"]: None for row in curve}  # as planned, so that colours agree between panels
    return {title: {name: lines[name] for name in order if name in lines} for title, lines in panels.items()}


def _fraction(row: Mapping[str, Any]) -> float:
    return float(row["fraction"])


def _write_text(path: Path, text: str) -> None:
    with run_folder.replacing(path) as file:
        file.write(text.encode())
