"""The whole terminal face: commands, bars, tables, exit statuses. Heavy imports wait until a command needs them.

A command line comes in, a table or JSON and an exit status go out. May import: stages, and what that may import.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import click

from pipeline.cli import pages
from pipeline.cli.config import config
from pipeline.cli.doctor import doctor
from pipeline.cli.explain import explain
from pipeline.cli.init import init
from pipeline.cli.options import configured, load, on_ray, refuse_url
from pipeline.cli.predict import predict
from pipeline.cli.probe import probe
from pipeline.cli.report import export, report
from pipeline.cli.runs import runs
from pipeline.cli.store import store
from pipeline.cli.study import compare, study
from pipeline.cli.terminal import (
    DONE,
    FAILED,
    INCOMPLETE,
    STOPPED,
    WRONG_USE,
    Stopped,
    bars,
    examples,
    say,
    show,
    telling_what_is_kept,
)


@dataclass
class _End:
    """The last thing at exit: taking torch apart would cost another second, and what is left has been written."""

    status: int = FAILED

    def __call__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)


def main() -> None:
    """Run the command line; the exit status is 0 done, 1 failed, 2 wrong use, 3 done with samples set aside."""
    end = _End()
    atexit.register(end)  # first in, last out
    end.status = _run()
    sys.exit(end.status)


def _run() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(file=said)
        for line in said.getvalue().splitlines():
            say(line, err=True)
        return WRONG_USE
    except (KeyboardInterrupt, click.Abort, Stopped) as stop:
        kept = str(stop) or "finished work is kept, and the same command continues from it"
        say(err=True)
        say(f"stopped: {kept}", err=True)
        os._exit(STOPPED)  # at once: other threads may be at work, and what they do may be cut off
    except Exception as error:
        status = _explain(error)
    return status if isinstance(status, int) else DONE


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM (`kill`, a scheduler's time limit) like Ctrl-C."""
    raise KeyboardInterrupt


def _explain(error: Exception) -> int:
    """Print an error that a person can act on as one line; anything else is a bug and keeps its traceback."""
    from cache.errors import StoreError
    from pipeline.errors import PipelineError

    if not isinstance(error, PipelineError | StoreError | OSError):
        raise error
    for line in (_of_system(error) if isinstance(error, OSError) else str(error)).splitlines():
        say(f"error: {line}", err=True)
    for note in getattr(error, "__notes__", ()):
        say(f"  {note}", err=True)
    return getattr(error, "exit_status", FAILED)


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make space, and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "ask for the right to it, or name another place"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "move what is in the way, or name another place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit (`ulimit -n`), and run the same command again"),
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def _of_system(error: OSError) -> str:
    """One line for what the operating system refused: which file, why, and what to do where that is clear."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "")
    said = f"{' -> '.join(names)}: {reason[:1].lower()}{reason[1:]}" if names else reason
    return f"{said}; {remedy}" if remedy else said


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `pipeline prepare`, then `extract`, `train`, `evaluate`, `explain`, `report`; "
    "or run all six with `dvc repro`.",
)
@click.version_option(package_name="slca-pipeline")
def cli() -> None:
    """Pay for the frozen SAM encoder once, then train SLCA classifiers on its cached features."""


@cli.command(epilog=examples("pipeline prepare", "pipeline prepare -c configs/breastmnist.yaml"))
@configured
def prepare(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Make or fetch the data and the encoder's weights; what is there already is checked and kept."""
    from pipeline.stages import commands

    config = load(config_path, overrides)
    with bars() as progress:
        report = commands.prepare(config, progress)
    return show(report, as_json, pages.prepared)


@cli.command(
    epilog=examples(
        "pipeline extract",
        "pipeline extract -c configs/breastmnist.yaml --set store.path=features/breast.h5",
        "pipeline extract -c configs/isic2017.yaml --ray auto",
    )
)
@configured
@click.option("--replace", is_flag=True, help="Swap out a store made with other settings, once the new one is whole.")
@click.option("--reuse", multiple=True, type=click.Path(path_type=Path), help="An older store whose rows may be taken.")
@click.option("--strict", is_flag=True, help="Stop at the first bad image instead of setting it aside.")
@click.option("--recheck", is_flag=True, help="Read every image again, even where file size and time are unchanged.")
@on_ray
def extract(
    config_path: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    replace: bool,
    reuse: tuple[Path, ...],
    strict: bool,
    recheck: bool,
    ray: str | None,
) -> int:
    """Stage one: run the frozen encoder over the images that the store does not hold yet."""
    from pipeline.stages.inputs import finished

    config = load(config_path, overrides)
    refuse_url(config.store.path)
    with bars() as progress:
        report = None if recheck else finished(config, progress)
        if report is None:
            from pipeline.stages import commands

            with telling_what_is_kept(lambda: commands.kept_of_extraction(config)):
                report = commands.extract(
                    config, progress, replace=replace, reuse=reuse, strict=strict, recheck=recheck, ray=ray
                )
    show(report, as_json, pages.extracted)
    return INCOMPLETE if report["set_aside"] else DONE


@cli.command(epilog=examples("pipeline train", "pipeline train --set model.gates=[] --set run=runs/plain"))
@configured
@click.option("--replace", is_flag=True, help="Start over where the run folder holds a run with other settings.")
def train(config_path: Path, overrides: tuple[str, ...], as_json: bool, replace: bool) -> int:
    """Stage two: train the gated classifier on stored features; continues an interrupted run."""
    from pipeline.stages import commands

    config = load(config_path, overrides)
    with bars() as progress, telling_what_is_kept(lambda: commands.kept_of_training(config)):
        report = commands.train(config, progress, replace=replace)
    return show(report, as_json, pages.trained)


@cli.command(
    epilog=examples(
        "pipeline evaluate",
        "pipeline evaluate --json",
        "pipeline evaluate --point sensitivity=0.9 --point specificity=0.8",
        "pipeline evaluate --data configs/other_hospital.yaml --class 'cancer=malignant'",
    )
)
@configured
@click.option(
    "--point",
    "points",
    multiple=True,
    metavar="POINT",
    default=("youden", "sensitivity=0.95", "specificity=0.95"),  # of `operating`, whose import takes long
    show_default=True,
    help="An operating point at which to read sensitivity and specificity: `sensitivity=X` or `specificity=X` (above "
    "0, at most 1), whose threshold reaches X on val at the least cost of the other; or `youden`, the highest sum of "
    "both. Repeatable; takes the place of the default ones.",
)
@click.option(
    "--data",
    "other",
    type=click.Path(path_type=Path),
    help="An external test set: another configuration, of which `data` and `store` are read. Its scores get files of "
    "their own, in `external` of the run folder.",
)
@click.option(
    "--class",
    "named",
    multiple=True,
    metavar="THEIRS=OURS",
    help="With --data: a class of it, and the class of the run that it is. Repeatable; equal names need none.",
)
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), help="With --data: only this split of it, not all images."
)
@click.pass_context
def evaluate(
    context: click.Context,
    config_path: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    points: tuple[str, ...],
    other: Path | None,
    named: tuple[str, ...],
    split: Literal["train", "val", "test"] | None,
) -> int:
    """Read the test set once: metrics, predictions and plots in the run folder.

    With --data, score the run on images from elsewhere, at the thresholds that its own val chose. Images that the run
    has learnt are refused, by their pixels.
    """
    if other is None and (named or split):
        message = "--class and --split go with --data"
        raise click.UsageError(message)
    if other is not None and context.get_parameter_source("points") is not click.core.ParameterSource.DEFAULT:
        message = "--point goes without --data: an external test set is read at the points of the run's own evaluation"
        raise click.UsageError(message)
    pairs = dict(_pair(text) for text in named)
    from pipeline.stages import commands

    config = load(config_path, overrides)
    with bars() as progress:
        if other is not None:
            report = commands.evaluate_elsewhere(config, progress, other, named=pairs, split=split)
        else:
            report = commands.evaluate(config, progress, points=points)
    return show(report, as_json, pages.evaluated)


def _pair(text: str) -> tuple[str, str]:
    """Take `THEIRS=OURS` apart."""
    theirs, equals, ours = text.rpartition("=")
    if not (theirs and equals and ours):
        message = f"--class {text!r}: expected THEIRS=OURS, such as cancer=malignant"
        raise click.UsageError(message)
    return theirs, ours


cli.add_command(init)
cli.add_command(config)
cli.add_command(doctor)
cli.add_command(explain)
cli.add_command(export)
cli.add_command(predict)
cli.add_command(probe)
cli.add_command(report)
cli.add_command(runs)
cli.add_command(store)
cli.add_command(study)
cli.add_command(compare)
