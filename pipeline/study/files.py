"""The files of a study: results.csv, the table as CSV, Markdown and LaTeX, and the data-efficiency curve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline import records
from pipeline.evaluate import plots
from pipeline.study.folds import MEAN
from pipeline.study.runs import SCORES, Row
from pipeline.study.table import Summary

_FIGURES = (
    "score", "seeds", "missing", "mean", "sd", "low", "high", "difference", "difference_low", "difference_high",
)  # fmt: skip


def write_files(folder: Path, summary: Summary) -> list[Row]:
    """Write what is known so far of a study into its folder; returns the table.

    `results.csv` has a row per run; `table.csv` a row per setting and score; `table.md` and `table.tex` a row per
    setting; `curve.csv` and `curve.png`, only where there are several fractions, or several
    numbers of shots, the first score over them.
    Of a cross-validation, `folds.csv` and `folds.md` have a row per fold, and the pooled score.
    """
    results, table = summary.results(), summary.table()
    if not results:
        return table
    missing = len(summary.runs) - len(results)
    records.write_csv(folder / "results.csv", results)
    if not table:  # no cross-validation is complete yet
        return table
    records.write_csv(folder / "table.csv", table)
    said = legend(summary.baseline, cross_validated=summary.cross_validated)
    _write_text(folder / "table.md", as_markdown(table, summary.baseline, missing, said))
    _write_text(folder / "table.tex", as_latex(table, summary.baseline, missing, said))
    by_fold = summary.folds()
    if not by_fold:
        _remove(folder, "folds.csv", "folds.md")
    if by_fold:
        records.write_csv(folder / "folds.csv", by_fold)
        head, *body = fold_lines(by_fold)
        _write_text(folder / "folds.md", f"{_in_markdown([head, *body])}\n\n{FOLDS_LEGEND}\n")
    curve = [row for row in table if row["score"] == summary.scores[0]]
    across = _across(curve)
    if across:
        columns = [*cell_columns(curve), "score", "seeds", "mean", "sd", "low", "high"]
        records.write_csv(folder / "curve.csv", [{key: row[key] for key in columns} for row in curve])
        panels = _panels([row for row in curve if row[across] != "all"], across)
        plots.draw_efficiency(folder / "curve.png", panels, score=SCORES[summary.scores[0]], across=across)
    else:
        _remove(folder, "curve.csv", "curve.png")
    return table


def _remove(folder: Path, *names: str) -> None:
    """Take away what an earlier table of the study had beside it and this one has not."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _across(curve: Sequence[Row]) -> Literal["fraction", "shots"] | None:
    """What the curve is drawn over: the first of the two that has several values; None where neither has."""
    for column in ("fraction", "shots"):
        if len({row[column] for row in curve if row.get(column, "all") != "all"}) > 1:
            return column
    return None


def as_markdown(table: Sequence[Row], baseline: str, missing: int, said: str | None = None) -> str:
    """Spell the table as Markdown, with what its numbers mean (`said`) and what is not there yet below it."""
    return f"{_in_markdown(table_lines(table, baseline))}\n\n{said or legend(baseline)}\n{absence(missing)}"


def _in_markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    spelled = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in spelled)


def as_latex(table: Sequence[Row], baseline: str, missing: int, said: str | None = None) -> str:
    """Spell the table as a `tabular` in the style of the package booktabs, with `said` as comments."""
    head, *body = [[_for_latex(cell) for cell in line] for line in table_lines(table, baseline, plus_minus=" \\pm ")]
    comments = "".join(f"% {line}\n" for line in f"{said or legend(baseline)}\n{absence(missing)}".splitlines() if line)
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
        head += [SCORES[score], f"{SCORES[score]} less {baseline}"]
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
    """Spell mean, standard deviation and interval, as far as they are known: `.912 ± .010 [.900, .924]`."""
    sd = "" if row["sd"] is None else f"{plus_minus}{row['sd']:.3f}"
    ends = "" if row["low"] is None or (brief and sd) else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['mean']:.3f}{sd}{ends}"


def fold_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of the table of folds for people, the head first; columns in which nothing varies are left out.

    Args:
        rows: See `Summary.folds`.
    """
    figures = ("score", "fold", "n", "groups", "value", "low", "high", "sd", "run")
    cell = [key for key in rows[0] if key not in figures]
    about = [key for key in cell if key == "variant" or len({str(row[key]) for row in rows}) > 1]
    lines = [[*about, "score", "fold", "n", "groups", "value [95 %]"]]
    for row in rows:
        spelled = spell_mean({**row, "mean": row["value"]})
        counted = ["", ""] if row["fold"] == MEAN else [str(row["n"]), str(row["groups"])]
        lines.append([*(_spell(row[key]) for key in about), SCORES[row["score"]], str(row["fold"]), *counted, spelled])
    return lines


def spell_difference(row: Row) -> str:
    """Spell a difference and its interval, or nothing where there is none."""
    if row["difference"] is None:
        return ""
    return f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"


def _spell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


FOLDS_LEGEND = (
    "Of each fold, and of all samples pooled, each scored by the fold in which it was test: the score [95 % interval "
    "over groups]. The mean of the folds ± their standard deviation has no interval, for the folds share training "
    "samples. Pooling compares probabilities of different models, which a mean of the folds does not."
)


def legend(baseline: str, *, cross_validated: bool = False) -> str:
    """Say what the numbers of the table are."""
    if cross_validated:
        return (
            f"Each score is that of all samples pooled, each scored by the fold in which it was test: mean over seeds "
            f"± standard deviation over seeds [95 % interval over groups]. Differences to {baseline} are paired by "
            f"seed and sample [95 % interval over seeds and samples; with one seed, over samples alone]."
        )
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


def _panels(curve: Sequence[Row], across: str) -> dict[str, dict[str, list[Row]]]:
    """Group the rows of the curve: a panel for each point of what else a variant is tried at.

    What a variant sets of its own, such as another backbone, makes no panel: it is compared with the others there.
    """
    shared = [key for key in cell_columns(curve) if key not in ("variant", across)]
    variants = {row["variant"] for row in curve}
    tried = {(key, of): {str(row[key]) for row in curve if row["variant"] == of} for key in shared for of in variants}
    varying = [key for key in shared if any(len(tried[key, of]) > 1 for of in variants)]
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(curve, key=lambda row: float(row[across])):
        title = ", ".join(f"{key} {_spell(row[key])}" for key in varying)
        panels.setdefault(title, {}).setdefault(row["variant"], []).append(row)
    order = {row["variant"]: None for row in curve}  # as planned, so that colours agree between panels
    return {title: {name: lines[name] for name in order if name in lines} for title, lines in panels.items()}


def _write_text(path: Path, text: str) -> None:
    with records.replacing(path) as file:
        file.write(text.encode())
