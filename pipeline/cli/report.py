"""`pipeline report` and `pipeline export`: a run as one page to send, and as a folder to hand on."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import configured, load
from pipeline.cli.terminal import bars, examples, show


@click.command(
    epilog=examples(
        "pipeline report",
        "pipeline report runs/plain --author 'A. Reader, Radiology'",
        "pipeline report -c configs/breastmnist.yaml --study studies/breastmnist",
    )
)
@configured
@click.argument("run", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--study", type=click.Path(path_type=Path, file_okay=False), help="A study's folder, to show beside it.")
@click.option("--author", default="", help="Who answers for the page; nobody is named without it.")
def report(
    run: Path | None,
    study: Path | None,
    author: str,
    config_path: Path,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """One HTML page about an evaluated run, for a reviewer: RUN/report.html."""
    from pipeline.stages import commands

    config = load(config_path, overrides)
    arguments = ["-c", str(config_path), *(word for override in overrides for word in ("--set", override))]
    with bars() as progress:
        found = commands.report(config, progress, folder=run, study=study, author=author, arguments=arguments)
    return show(found, as_json)


@click.command(
    epilog=examples(
        "pipeline export runs/demo handed_on/demo",
        "pipeline export -c configs/breastmnist.yaml runs/breastmnist handed_on/breast --onnx",
        "pipeline predict --model handed_on/demo --checkpoint weights/sam_demo.pth scan.png",
    )
)
@configured
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--onnx", is_flag=True, help="Write model.onnx too, checked against torch; needs the extra `onnx`.")
def export(run: Path, folder: Path, onnx: bool, config_path: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """An evaluated run as a folder to hand on: weights, what they need, a model card, and a script that predicts."""
    from pipeline.stages import commands

    config = load(config_path, overrides)
    with bars() as progress:
        found = commands.export(config, progress, run, folder, onnx=onnx)
    return show(found, as_json)
