"""`pipeline predict`: which class images show, a handful on the screen or a million into a table."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from pipeline.cli import pages
from pipeline.cli.options import configured, load, on_ray
from pipeline.cli.terminal import DONE, INCOMPLETE, bars, examples, show, telling_what_is_kept


@click.command(
    epilog=examples(
        "pipeline predict data/demo/images/*.png",
        "pipeline predict -c configs/breastmnist.yaml scan.png --json",
        "pipeline predict scans --out predictions.csv",
        "pipeline predict s3://bucket/scans --out predictions.parquet --ray auto",
        "pipeline predict --model handed_on/demo --checkpoint weights/sam_demo.pth scan.png",
    )
)
@configured
@click.argument("images", nargs=-1, required=True)
@click.option("--model", type=click.Path(path_type=Path), help="A folder that `export` wrote; no configuration then.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="With --model: weights of its frozen encoder.")
@click.option(
    "--out",
    "--csv",
    "table",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a row per image here: NAME.csv, or NAME.parquet (extra `parquet`). A command that was stopped "
    "continues.",
)
@on_ray
@click.option("--replace", is_flag=True, help="With --out: make the table anew where there is one.")
def predict(
    config_path: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    images: tuple[str, ...],
    model: Path | None,
    checkpoint: Path | None,
    table: Path | None,
    replace: bool,
    ray: str | None,
) -> int:
    """Class probabilities for images, encoded on the fly; those that cannot be read are named and left out.

    IMAGES are files, folders, text files with a name a line (.txt), or URLs of these.
    """
    if checkpoint is not None and model is None:
        message = "--checkpoint goes with --model; a configuration names its own, encoder.checkpoint"
        raise click.UsageError(message)
    source = click.get_current_context().get_parameter_source("config_path")
    if model is not None and (overrides or source is not ParameterSource.DEFAULT):
        message = f"{'--set' if overrides else '-c'} goes without --model: an exported model has its own configuration"
        raise click.UsageError(message)
    if table is None and (replace or ray):
        message = f"{'--replace' if replace else '--ray'} goes with --out"
        raise click.UsageError(message)
    from pipeline.stages import predictions

    chosen: predictions.OfRun | predictions.OfExport
    if model is not None:
        chosen = predictions.OfExport(model, checkpoint)
    else:
        chosen = predictions.OfRun(load(config_path, overrides))
    with bars() as progress:
        if table is None:
            report = predictions.predict(chosen, images, progress)
        else:
            kept = f"finished parts lie in {table}.partial; the same command continues from them"
            with telling_what_is_kept(lambda: kept):
                report = predictions.predict_into(table, chosen, images, progress, replace=replace, ray=ray)
    show(report, as_json, pages.predicted)
    return INCOMPLETE if report["set_aside"] else DONE
