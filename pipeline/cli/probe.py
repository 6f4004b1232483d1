"""`pipeline probe`: what stored features are worth by themselves, as a table with the best tap on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import configured, load
from pipeline.cli.terminal import DONE, bars, examples, say, show


@click.command(
    epilog=examples(
        "pipeline probe",
        "pipeline probe --tap late --tap neck --run runs/late_or_neck",
        "pipeline probe -c pulled.yaml --json        (data: {layout: store, path: features/pulled.zarr})",
        "pipeline probe -c clip.yaml --set probe.method=tip_f --set train.shots=4",
        "pipeline evaluate --set run=runs/demo-probe",
    )
)
@configured
@click.option("--tap", "taps", multiple=True, help="A tap to look at; repeatable. All that the store holds by default.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="Where the chosen classifier goes; by default beside the configured run, with `-probe` behind its name.",
)
@click.option("--replace", is_flag=True, help="Start over where the folder holds a run with other settings.")
def probe(
    config_path: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    taps: tuple[str, ...],
    folder: Path | None,
    replace: bool,
) -> int:
    """What the stored features know by themselves: linear probe and nearest neighbours, in seconds, without an image.

    Each tap of the store, and all together, is pooled by channel (mean, maximum, standard deviation) and classified by
    logistic regression and by its nearest neighbours. Val chooses the penalty, the number of neighbours, and the tap
    whose regression becomes a run, which `evaluate`, `compare`, `report` and `export` take like any other.

    On CLIP's image features `probe.method` is also zero_shot (class prompts alone), tip (Tip-Adapter: a cache of the
    training images beside them) or tip_f (with its keys fine-tuned). Val chooses alpha, beta and the epoch.
    """
    from pipeline.stages import commands

    config = load(config_path, overrides)
    with bars() as progress:
        report = commands.probe(config, progress, folder=folder, taps=taps, replace=replace)
    if as_json:
        return show(report, as_json)
    from pipeline.cli.tables import print_table

    head = ["", "tap", "classifier", "chosen", "val AUC [95 %]", "test AUC [95 %]", "test accuracy", "balanced"]
    counts = ", ".join(f"{count} {split}" for split, count in report["samples"].items())
    print_table(head, [_line(row) for row in report["table"]], words=4)
    say(
        f"{counts}. Val chose the row with the arrow; for that, its figures on val are too good. Those on test describe"
    )
    say("taps: choosing by them would spoil the test set.")
    say(f"Table and picture: {report['run']}/probe.csv, probe.png.")
    say(f"Next: pipeline evaluate -c {config_path} --set run={report['run']}")
    return DONE


def _line(row: Mapping[str, Any]) -> Sequence[str]:
    setting = ", ".join(f"{name} = {value:g}" for name, value in row["setting"].items())
    test = row["test"]
    scores = ("", "", "") if test is None else (_auc(test), f"{test['acc']:.3f}", f"{test['balanced_acc']:.3f}")
    return ("→" if row["chosen"] else "", row["tap"], row["method"], setting, _auc(row["val"]), *scores)


def _auc(scores: Mapping[str, Any]) -> str:
    ends = scores["intervals"]["auc"]
    return f"{scores['auc']:.3f} [{ends['low']:.3f}, {ends['high']:.3f}]"
