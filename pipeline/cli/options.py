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


def refuse_url(path: Path) -> None:
    """Refuse a URL where a store is written: it would become a folder named after the protocol.

    Raises:
        StoreError: It is one; `Path` has made one slash of its two.
    """
    from cache.errors import StoreError

    if _URL.match(str(path)):
        url = str(path).replace(":/", "://", 1)
        message = f"{url} is a URL, and stores are written on this machine: name a local path, and push that store"
        raise StoreError(message)


def load(path: Path, overrides: tuple[str, ...]) -> Config:
    """Read the configuration that a command names."""
    from pipeline.config.schema import load_config
    from pipeline.stages.inputs import check_encoder

    config = load_config(path, overrides)
    check_encoder(config, str(path))
    return config
