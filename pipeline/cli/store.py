"""`pipeline store`: look after feature stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli.options import configured, load, refuse_url
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

    refuse_url(path, written=False)
    found = cache.info(path)
    return show(
        {
            "store": str(found.path),
            "format": f"{found.format} {found.format_version}",
            "complete": found.complete,
            "shards": f"{found.shards_done} of {found.shards}",
            "rows": found.rows,
            **(_who_is_who(path) if found.complete else {}),
            "bytes": found.bytes_on_disk,
            "written": found.written,
            "taps": {name: f"{tap.channels}x{tap.height}x{tap.width} {tap.dtype}" for name, tap in found.taps.items()},
            **({"rounding_error": dict(found.rounding)} if found.rounding else {}),
            "fingerprint": dict(found.fingerprint.fields),
            "provenance": dict(found.provenance),
        },
        as_json,
    )


def _who_is_who(path: str) -> dict[str, Any]:
    """Whether the ids of a store are names, and whether labels travel with it."""
    import cache

    with cache.open_store(path) as found:
        pseudonyms, labels = cache.are_pseudonyms(found.ids), found.labels
        kind = "pseudonyms" if pseudonyms else "names as they are"
        return {
            "ids": f"{kind}, such as {', '.join(found.ids[:3])}",
            "pseudonyms": pseudonyms,
            "labels": "none travel with it" if labels is None else f"travel with it: {', '.join(labels.class_names)}",
        }


@store.command(epilog=examples("pipeline store verify features/demo.zarr"))
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(path: str, as_json: bool) -> int:
    """Read every byte of a store and name what is damaged; exit status 3 if anything is."""
    import cache

    refuse_url(path, written=False)
    with bars() as progress:
        damages = cache.verify(path, progress=progress)
    said = [str(damage) for damage in damages]
    show({"store": path, "damages": said if said or as_json else "none"}, as_json)
    return INCOMPLETE if damages else DONE


@store.command(epilog=examples("pipeline store repair features/demo.zarr -c configs/default.yaml"))
@click.argument("path", type=click.Path(path_type=Path))
@configured
def repair(path: Path, config_path: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Encode exactly the damaged rows again; the result has the bytes that the store had before."""
    from pipeline.stages import stores

    refuse_url(path, written=False)
    config = load(config_path, overrides)
    with bars() as progress:
        report = stores.repair(config, progress, path)
    return show(report, as_json)


@store.command(
    epilog=examples(
        "pipeline store inspect features/demo.zarr",
        "pipeline store inspect features/demo.zarr --plot features/demo.png --tap late",
    )
)
@click.argument("path", type=click.Path(path_type=Path))
@configured
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw a map of the data set (PNG).")
@click.option("--tap", help="The tap whose averaged features the map shows; by default neck, or the last one.")
def inspect(
    path: Path, config_path: Path, overrides: tuple[str, ...], as_json: bool, plot: Path | None, tap: str | None
) -> int:
    """Rows that cannot be right, identical images across splits or with other labels, counts by split and class.

    Labels are those that travel with the store, else those of the configuration's data set; where that is not here and
    no configuration is named, the store is looked at without.
    """
    import cache
    from pipeline.errors import ConfigError, DataError
    from pipeline.stages import stores

    refuse_url(path, written=False)
    if tap is not None and plot is None:
        message = "--tap goes with --plot: it says of which tap the map is drawn"
        raise click.UsageError(message)
    report: dict[str, Any] = {}
    with cache.open_store(path) as found:
        labels = found.labels
    if labels is None:
        try:
            labels = stores.labels_of(load(config_path, overrides), path)
        except (ConfigError, DataError) as error:
            source = click.get_current_context().get_parameter_source("config_path")
            if overrides or source is not ParameterSource.DEFAULT:
                raise
            report["without_labels"] = f"no splits, classes or counts of them: {error}"
    with bars() as progress:
        report |= stores.inspect(path, progress, labels)
        if plot is not None:
            report["plot"] = stores.draw_plane(path, plot, progress, labels, tap)
    return show(report, as_json)


@store.command(epilog=examples("pipeline store diff features/old.zarr features/new.h5"))
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diff(first: str, second: str, as_json: bool) -> int:
    """Which fingerprint fields and rows of two stores differ, and by how much; exit status 3 if any do."""
    from dataclasses import asdict

    import cache

    with bars() as progress:
        found = cache.diff_stores(first, second, progress)
    show({"equal": found.equal, **asdict(found)}, as_json)
    return DONE if found.equal else INCOMPLETE


@store.command(
    epilog=examples(
        "pipeline store convert features/demo.zarr features/demo.h5",
        "pipeline store convert features/full.zarr features/small.zarr --pool 4 --tap neck",
        "pipeline store convert features/demo.zarr features/demo_int8.zarr --dtype int8",
    )
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--tap", "taps", multiple=True, help="A tap to keep; repeatable. All by default.")
@click.option("--pool", type=click.IntRange(min=1), default=1, help="How many times coarser each side becomes.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "int8", "bfloat16"]),
    help="Type to store features in; int8 takes half the bytes of float16. Images and masks stay as they are.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(source: Path, target: Path, taps: tuple[str, ...], pool: int, dtype: str | None, as_json: bool) -> int:
    """Write a store in the other format, with fewer taps, pooled further, or in another type.

    The result is the store that would have been extracted so. A change of type other than from float16 to int8 and from
    float32 to bfloat16 is named in its fingerprint.
    """
    from pipeline.stages import stores

    refuse_url(target)
    with bars() as progress:
        report = stores.convert(source, target, progress, taps=taps, pool=pool, dtype=dtype)
    return show(report, as_json)


@store.command(
    epilog=examples(
        "pipeline store push features/demo.zarr s3://bucket/demo.zarr",
        "pipeline store push features/demo.zarr /mnt/share/demo.zarr --pseudonymise home/key --with-labels",
    )
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("url")
@click.option(
    "--pseudonymise",
    "key_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Send keyed digests for ids; the key in this file (made if missing), the mapping beside it and images stay.",
)
@click.option("--with-labels", is_flag=True, help="Let splits, labels and class names of the configuration travel.")
@configured
def push(
    source: Path,
    url: str,
    key_file: Path | None,
    with_labels: bool,
    config_path: Path,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Send a store to a folder, a bucket or a hub: only files that are missing there, checked by digest."""
    from pipeline.stages import stores

    labels = stores.labels_of(load(config_path, overrides), source) if with_labels else None
    with bars() as progress:
        report = stores.push(source, url, progress, labels=labels, key_file=key_file)
    return show(report, as_json)


@store.command(epilog=examples("pipeline store pull https://example.org/demo.zarr features/demo.zarr"))
@click.argument("url")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Replace a store of another fingerprint or data set.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def pull(url: str, target: Path, replace: bool, as_json: bool) -> int:
    """Fetch a store: only files that are missing here; it gets its name when every byte has been checked."""
    import cache

    refuse_url(target)
    with bars() as progress, cache.pull_store(url, target, replace=replace, progress=progress) as found:
        report = {"store": str(target), "rows": len(found), "taps": list(found.taps)}
    return show(report, as_json)
