"""`pipeline runs`: everything that was trained, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.cli.pages import with_interval
from pipeline.cli.tables import print_table
from pipeline.cli.terminal import DONE, examples, say, show


@click.command(
    epilog=examples(
        "pipeline runs", "pipeline runs studies/breastmnist", "pipeline runs --csv runs.csv", "pipeline runs --json"
    )
)
@click.argument("folder", default=Path("runs"), type=click.Path(path_type=Path))
@click.option("--csv", "table", type=click.Path(path_type=Path, dir_okay=False), help="Write a row per run here.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def runs(folder: Path, table: Path | None, as_json: bool) -> int:
    """All runs below FOLDER (by default runs): what each is, its scores, when, and on which store."""
    from pipeline.stages.runs import list_runs, write_runs

    report = list_runs(folder)
    if table is not None:
        report["csv"] = str(write_runs(report, table))
    if as_json:
        return show(report, as_json=True)
    rows = [[row["run"], _what(row), _store(row), *_figures(row)] for row in report["runs"]]
    print_table(("run", "what", "store", "when", "val AUC", "test AUC", "accuracy"), rows, words=4, most=len(rows))
    if table is not None:
        say(f"written to {table}")
    return DONE


def _figures(row: dict[str, Any]) -> list[str]:
    """When it was, and its scores."""
    test = (row["test"].get(key, {}) for key in ("auc", "acc"))
    scores = [with_interval(found.get("value"), found) for found in (row["val"].get("auc", {}), *test)]
    return [(row["when"] or "")[:16].replace("T", " "), *scores]


def _what(row: dict[str, Any]) -> str:
    said = [row["data"], row["model"], row["training"], None if row["state"] == "done" else row["state"]]
    return "; ".join(part for part in said if part)


def _store(row: dict[str, Any]) -> str:
    store = row["store"]
    return "none" if store is None else f"{store['encoder']} of {store['data_set']}, {store['version'][:8]}"
