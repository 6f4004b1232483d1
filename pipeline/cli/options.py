"""Options that most commands share: the configuration and how to override it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.config.schema import Config

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
Command = TypeVar("Command", bound=Callable[..., Any])


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


def on_ray(command: Command) -> Command:
    """Give a command `--ray`, whose value is an address or None."""
    return click.option(
        "--ray",
        is_flag=False,
        flag_value="local",
        metavar="[ADDRESS]",
        callback=_address,
        help="Share out the work on a Ray cluster (extra `ray`): `auto`, HOST:PORT, ray://HOST:PORT; without an "
        "address one on this machine, for this run.",
    )(command)


def _address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse what was meant as the next argument."""
    if value is None or value in ("auto", "local") or re.search(r":\d+$", value) or value.startswith("ray://"):
        return value
    message = (
        f"--ray {value!r}: this is no address of a cluster (auto, HOST:PORT, ray://HOST:PORT); for one on this machine "
        f"write --ray=local, or --ray at the end"
    )
    raise click.UsageError(message)


def refuse_url(path: Path | str, *, written: bool = True) -> None:
    """Refuse a URL where a store has to be on this machine, which would be a folder named after the protocol.

    Args:
        path: What was given.
        written: Whether the store is written there, or only looked at.

    Raises:
        StoreError: It is one; `Path` has made one slash of its two.
    """
    from cache.errors import StoreError

    if _URL.match(str(path)):
        url = re.sub(":/+", "://", str(path), count=1)
        remedy = "are written on this machine: name a local path, and push that store"
        if not written:
            remedy = "are looked after on this machine: `pipeline store pull` it first (`store diff` reads URLs)"
        message = f"{url} is a URL, and stores {remedy}"
        raise StoreError(message)


def load(path: Path, overrides: tuple[str, ...]) -> Config:
    """Read the configuration that a command names."""
    from pipeline.config.schema import load_config
    from pipeline.stages.inputs import check_encoder

    config = load_config(path, overrides)
    check_encoder(config, str(path))
    return config
