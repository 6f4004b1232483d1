"""`pipeline init`: a configuration for somebody's own data, with questions where a guess may be wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pipeline.cli.tables import counts_table, ignored_line
from pipeline.cli.terminal import DONE, examples, say, show


@click.command(
    epilog=examples(
        "pipeline init path/to/images",
        "pipeline init labels.csv --images scans --label-column diagnosis --group-column patient",
        "pipeline init breastmnist",
        "pipeline init demo --out configs/demo.yaml --yes",
    )
)
@click.argument("source", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write; by default configs/NAME.yaml.")
@click.option("--group-pattern", help="Regular expression that finds the patient in a file name; `none` for none.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder that the paths in a table are relative to.")
@click.option("--path-column", help="Column of a table with the image's path.")
@click.option("--label-column", help="Column with the class.")
@click.option("--split-column", help="Column with the split; `none` to draw splits.")
@click.option("--group-column", help="Column with the patient; `none` for none.")
@click.option("--size-px", type=click.Choice(["28", "64", "128", "224"]), help="Of a MedMNIST archive.")
@click.option("--encoder", help="Such as sam_vit_b; by default what suits this machine.")
@click.option("--checkpoint", help="Its weights: a published name or a file.")
@click.option("--backbone", help="Of the classifier, such as resnet50.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing and take every guess, as where there is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Ask nothing, and print one JSON object.")
def init(source: str | None, out: Path | None, yes: bool, as_json: bool, size_px: str | None, **given: Any) -> int:
    """Look at your data and write a configuration for them that runs.

    SOURCE is a folder with a sub-folder for each class, a CSV table, a MedMNIST archive or its name, a store with
    labels, or `demo`. No file is ever overwritten.
    """
    asks = sys.stdin.isatty() and not yes and not as_json
    if source is None:
        if not asks:
            message = "name the data: a folder, a CSV table, a MedMNIST set, a store, or `demo`"
            raise click.UsageError(message)
        source = str(click.prompt("Where are the images? A folder, a CSV table, a MedMNIST set, or demo"))
    from pipeline.stages import first_config

    known = first_config.Given(**given, size_px=None if size_px is None else int(size_px))
    report = first_config.propose(source, known, out, _ask if asks else first_config.silent)
    if as_json:
        return show(report, as_json=True)
    _print(report)
    return DONE


def _ask(flag: str, question: str, default: str) -> str:
    """Ask on the terminal; return takes the guess."""
    return str(click.prompt(question, default=default or None))


def _print(report: dict[str, Any]) -> None:
    if "counts" in report:
        say(f"{report['images']} images")
        counts_table(report["counts"])
    groups = report.get("groups")
    if groups is not None:
        guessed = " (guessed)" if groups["guessed"] else ""
        say(f"patients   pattern {groups['pattern']}{guessed}: {groups['count']} in {report.get('images', 0)} images")
        for group, members in groups["examples"].items():
            say(f"           {group}: {', '.join(members)}")
    if "seen" in report:
        seen = report["seen"]
        kinds = ", ".join(f"{kind} {number}" for kind, number in seen["kinds"].items())
        sizes = "" if seen["smallest"] is None else f"; {_size(seen['smallest'])} to {_size(seen['largest'])} px"
        say(f"files      {kinds} (of {seen['looked_at']} looked at){sizes}")
    if "ignored" in report:
        say(f"ignored    {ignored_line(report['ignored'])}: no images that are read, or beside the folders of classes")
    say(f"encoder    {report['encoder']}")
    for note in report["notes"]:
        say(f"note       {note}")
    say(f"wrote      {report['config']}; from here on:")
    for command in report["next"]:
        say(f"  {command}")


def _size(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))
