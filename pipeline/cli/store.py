"""`pipeline store`: look after feature stores."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import configured, load
from pipeline.cli.terminal import DONE, INCOMPLETE, bars, examples, show


@click.group()
def store() -> None:
    """Look after feature stores: what is in one, and whether it is sound."""


@store.command(epilog=examples("pipeline store info features/demo.zarr"))
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(path: str, as_json: bool) -> int:
    """What a store holds: rows, taps, bytes, encoder, and whether it is complete."""
    import cache

    found = cache.info(path)
    return show(
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


@store.command(epilog=examples("pipeline store verify features/demo.zarr"))
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(path: str, as_json: bool) -> int:
    """Read every byte of a store and name what is damaged; exit status 3 if anything is."""
    import cache

    with bars() as progress:
        damages = cache.verify(path, progress=progress)
    show({"store": path, "damages": [str(damage) for damage in damages] or "none"}, as_json)
    return INCOMPLETE if damages else DONE


@store.command(epilog=examples("pipeline store repair features/demo.zarr -c configs/default.yaml"))
@click.argument("path", type=click.Path(path_type=Path))
@configured
def repair(path: Path, config_path: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Encode exactly the damaged rows again; the result has the bytes that the store had before."""
    from pipeline import stages

    config = load(config_path, overrides)
    with bars() as progress:
        report = stages.repair(config, progress, path)
    return show(report, as_json)
