"""Options that most commands share: the configuration and how to override it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.config import Config

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


def load(path: Path, overrides: tuple[str, ...]) -> Config:
    """Read the configuration that a command names."""
    from pipeline.config import load_config

    return load_config(path, overrides)
