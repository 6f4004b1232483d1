"""The whole terminal face: commands, bars, tables, exit statuses. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.config import Config

DONE, FAILED, WRONG_USE, INCOMPLETE = 0, 1, 2, 3
LINE_EVERY_SECONDS = 30.0  # between progress lines where there is no terminal to draw a bar on

Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> None:
    """Run the command line; the exit status is 0 done, 1 failed, 2 wrong use, 3 done with samples set aside."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(WRONG_USE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nstopped: finished work is kept, and the same command continues from it", err=True)
        sys.exit(130)
    except Exception as error:
        status = _explain(error)
    sys.exit(status if isinstance(status, int) else DONE)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM (`kill`, a scheduler's time limit) like Ctrl-C."""
    raise KeyboardInterrupt


def _explain(error: Exception) -> int:
    """Print an error that a person can act on as one line; anything else is a bug and keeps its traceback."""
    from cache.errors import StoreError
    from pipeline.errors import PipelineError

    if not isinstance(error, PipelineError | StoreError):
        raise error
    for line in str(error).splitlines():
        click.echo(f"error: {line}", err=True)
    for note in getattr(error, "__notes__", ()):
        click.echo(f"  {note}", err=True)
    return getattr(error, "exit_status", FAILED)


def _examples(*lines: str) -> str:
    """Lines for the foot of a command's help, each kept on its own: the backspace asks click not to rewrap."""
    return "\b\n" + "\n".join(("Examples:", *(f"  {line}" for line in lines)))


def configured(command: Command) -> Command:
    """Give a command `-c`, `--set` and `--json`."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."),
        click.option(
            "-c",
            "--config",
            "config_path",
            type=click.Path(path_type=Path),
            default=Path("configs/default.yaml"),
            show_default=True,
            help="The experiment.",
        ),
    ):
        command = option(command)
    return command


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `pipeline prepare`, `extract`, `train`, `evaluate`, or run all four with `dvc repro`.",
)
@click.version_option(package_name="slca-pipeline")
def cli() -> None:
    """Pay for the frozen SAM encoder once, then train SLCA classifiers on its cached features."""


@cli.command(epilog=_examples("pipeline prepare", "pipeline prepare -c configs/breastmnist.yaml"))
@configured
def prepare(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Make or fetch the data and the encoder's weights; what is there already is checked and kept."""
    from pipeline import stages

    config = _load(config_path, overrides)
    with _progress() as progress:
        report = stages.prepare(config, progress)
    return _show(report, as_json)


@cli.command(
    epilog=_examples(
        "pipeline extract", "pipeline extract -c configs/breastmnist.yaml --set store.path=features/breast.h5"
    )
)
@configured
@click.option("--replace", is_flag=True, help="Swap out a store made with other settings, once the new one is whole.")
@click.option("--reuse", multiple=True, type=click.Path(path_type=Path), help="An older store whose rows may be taken.")
@click.option("--strict", is_flag=True, help="Stop at the first bad image instead of setting it aside.")
@click.option("--recheck", is_flag=True, help="Read every image again, even where file size and time are unchanged.")
def extract(
    config_path: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    replace: bool,
    reuse: tuple[Path, ...],
    strict: bool,
    recheck: bool,
) -> int:
    """Stage one: run the frozen encoder over the images that the store does not hold yet."""
    from pipeline import stages

    config = _load(config_path, overrides)
    with _progress() as progress:
        report = stages.extract(config, progress, replace=replace, reuse=reuse, strict=strict, recheck=recheck)
    _show(report, as_json)
    return INCOMPLETE if report["set_aside"] else DONE


@cli.command(epilog=_examples("pipeline train", "pipeline train --set model.gates=[] --set run=runs/plain"))
@configured
@click.option("--replace", is_flag=True, help="Start over where the run folder holds a run with other settings.")
def train(config_path: Path, overrides: tuple[str, ...], as_json: bool, replace: bool) -> int:
    """Stage two: train the gated classifier on stored features; continues an interrupted run."""
    from pipeline import stages

    config = _load(config_path, overrides)
    with _progress() as progress:
        report = stages.train(config, progress, replace=replace)
    return _show(report, as_json)


@cli.command(epilog=_examples("pipeline evaluate", "pipeline evaluate --json"))
@configured
def evaluate(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Read the test set once: metrics, predictions and plots in the run folder."""
    from pipeline import stages

    config = _load(config_path, overrides)
    with _progress() as progress:
        report = stages.evaluate(config, progress)
    return _show(report, as_json)


@cli.command(
    epilog=_examples(
        "pipeline predict data/demo/images/*.png", "pipeline predict -c configs/breastmnist.yaml scan.png --json"
    )
)
@configured
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
def predict(config_path: Path, overrides: tuple[str, ...], as_json: bool, images: tuple[Path, ...]) -> int:
    """Class probabilities for image files, encoded on the fly."""
    from pipeline import stages

    config = _load(config_path, overrides)
    with _progress() as progress:
        report = stages.predict(config, progress, images)
    return _show(report, as_json)


@cli.group()
def store() -> None:
    """Look after feature stores: what is in one, and whether it is sound."""


@store.command(epilog=_examples("pipeline store info features/demo.zarr"))
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(path: str, as_json: bool) -> int:
    """What a store holds: rows, taps, bytes, encoder, and whether it is complete."""
    import cache

    found = cache.info(path)
    return _show(
        {
            "store": str(found.path),
            "format": f"{found.format} {found.format_version}",
            "complete": found.complete,
            "shards": f"{found.shards_done} of {found.shards}",
            "rows": found.rows,
            "bytes": found.bytes_on_disk,
            "taps": {name: f"{tap.channels}x{tap.height}x{tap.width} {tap.dtype}" for name, tap in found.taps.items()},
            "fingerprint": dict(found.fingerprint.fields),
            "provenance": dict(found.provenance),
        },
        as_json,
    )


@store.command(epilog=_examples("pipeline store verify features/demo.zarr"))
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(path: str, as_json: bool) -> int:
    """Read every byte of a store and name what is damaged; exit status 3 if anything is."""
    import cache

    with _progress() as progress:
        damages = cache.verify(path, progress=progress)
    _show({"store": path, "damages": [str(damage) for damage in damages] or "none"}, as_json)
    return INCOMPLETE if damages else DONE


def _load(path: Path, overrides: tuple[str, ...]) -> Config:
    from pipeline.config import load_config

    return load_config(path, overrides)


def _show(report: Mapping[str, Any], as_json: bool) -> int:
    """Print a report: one JSON object, or a table with nested reports indented."""
    if as_json:
        click.echo(json.dumps(report, default=str, allow_nan=False))
        return DONE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _lines(report):
        table.add_row(key, value)
    Console().print(table)
    return DONE


def _lines(report: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for key, value in report.items():
        name = indent + str(key).replace("_", " ")
        if isinstance(value, Mapping) and value:
            yield name, ""
            yield from _lines(value, indent + "  ")
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif isinstance(value, list | tuple):
            yield name, ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
        elif value not in ("", None, {}):
            yield name, str(value)


@contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """A `Progress` that draws a bar per task on a terminal and writes a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def draw(task: str, done: int, total: int, **info: float | str) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total, figures="")
            bars.update(tasks[task], completed=done, total=total, figures=_figures(info))

        yield draw


class _Lines:
    """Progress where there is no terminal: a task's first and last piece, and a line every half minute."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def __call__(self, task: str, done: int, total: int, **info: float | str) -> None:
        now = time.monotonic()
        began = self._began.setdefault(task, now)
        if done < total and now - self._last.setdefault(task, now) < LINE_EVERY_SECONDS:
            return
        self._last[task] = now
        left = f"  {(now - began) / done * (total - done):.0f} s left" if 0 < done < total else ""
        click.echo(f"{task} {done}/{total}  {_figures(info)}{left}".rstrip(), err=True)


def _figures(info: Mapping[str, float | str]) -> str:
    return "  ".join(
        f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in info.items()
    )
