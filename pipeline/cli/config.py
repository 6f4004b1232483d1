"""`pipeline config`: what a configuration comes to, and what each of its keys does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from pipeline.cli.options import configured, load
from pipeline.cli.terminal import DONE, examples, say, say_json


@click.command(
    epilog=examples(
        "pipeline config",
        "pipeline config -c configs/breastmnist.yaml --set train.lr=1e-3",
        "pipeline config --explain train.lr",
        "pipeline config --explain encoder",
    )
)
@configured
@click.option("--explain", metavar="KEY", help="What a key does, its type and its default; no configuration is read.")
def config(config_path: Path, overrides: tuple[str, ...], as_json: bool, explain: str | None) -> int:
    """The whole configuration as it counts, in YAML, with the defaults marked; or what a key does."""
    if explain is not None:
        return _explain(explain, as_json)
    from pipeline.config.resolved import as_yaml, defaults_of
    from pipeline.config.schema import to_dict

    found = load(config_path, overrides)
    if as_json:
        say_json({"config": to_dict(found), "defaults": defaults_of(found)})
    else:
        for line in as_yaml(found).splitlines():
            say(line)
    return DONE


def _explain(name: str, as_json: bool) -> int:
    from pipeline.config.reference import find

    keys = find(name)
    if as_json:
        say_json({"keys": [{"key": key.dotted, **asdict(key)} for key in keys]})
        return DONE
    for key in keys:
        where = f" (layout: {key.layout})" if key.layout else ""
        say(f"{key.dotted}{where}", bold=True)
        say(f"  {key.kind}; {'required' if key.default == 'required' else f'default {key.default}'}")
        for line in click.wrap_text(key.does, width=100, initial_indent="  ", subsequent_indent="  ").splitlines():
            say(line)
    return DONE
