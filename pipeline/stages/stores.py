"""What `pipeline store` does where it needs the images, the labels or the encoder's own words for a change."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cache
from cache.durable import sync_folder, write_file
from cache.reading.ranges import file_system, local_place
from pipeline import data, encoders, image_tap, mask_tap
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, DataError
from pipeline.evaluate import plots
from pipeline.explain import projection
from pipeline.extract import repair as damaged
from pipeline.progress import Progress
from pipeline.stages.commands import Report
from pipeline.stages.inputs import build_encoder, load_dataset, reading, workers

KEY_BYTES = 32
_NAMED = 10  # outliers that the map names; the report has them all


def repair(config: Config, progress: Progress, path: Path) -> Report:
    """Encode exactly the damaged rows of a store again, from the images and the encoder of the configuration.

    Features have other last bits on another machine, number of threads or version of torch: the report's `as_before`
    says whether the store is again the one that it was, where its root still told which.
    """
    before = _version(path)
    report = damaged.repair(
        load_dataset(config),
        build_encoder(config, new_images=False),
        path,
        reading=data.reading_rules(reading(config)),
        workers=workers(config),
        batch_size=config.resources.batch_size,
        progress=progress,
    )
    as_before = before == _version(path) if before else None
    return {"store": str(path), "rows": report.rows, "repaired": report.encoded, "as_before": as_before}


def _version(path: Path) -> str:
    """The version that the root of a store claims, empty if it is damaged."""
    try:
        return cache.info(path).version
    except cache.StoreError:
        return ""


def labels_of(config: Config, path: Path) -> cache.Labels:
    """Labels and splits of a store's rows, from the data set of the configuration.

    Raises:
        DataError: A row is no sample of the data set.
    """
    dataset = load_dataset(config)
    samples = {sample.id: sample for sample in dataset.samples}
    with cache.open_store(path) as store:
        strangers = [name for name in store.ids if name not in samples]
        if strangers:
            message = (
                f"{path}: {len(strangers)} of {len(store)} rows are no samples of {dataset.name!r}, "
                f"{strangers[0]!r} for one: name the configuration of this store with -c"
            )
            raise DataError(message)
        rows = [samples[name] for name in store.ids]
    return cache.Labels(
        dataset.class_names,
        tuple(row.label for row in rows),
        tuple(row.split for row in rows),
        tuple(row.group for row in rows) if any(row.group != row.id for row in rows) else (),
        dataset.task,
    )


def inspect(path: Path, progress: Progress, labels: cache.Labels | None = None) -> Report:
    """Report rows that cannot be right, identical images across splits or with other labels, and counts."""
    found = asdict(cache.inspect_store(path, labels, progress))
    without = mask_tap.others_of(tap["tap"] for tap in found["taps"])  # an image may well have no mask
    usual: Report = {"zero": (), "constant": (), "outliers": {}}
    return {**found, "taps": [tap | usual if tap["tap"] in without else tap for tap in found["taps"]]}


def draw_plane(
    path: Path, picture: Path, progress: Progress, labels: cache.Labels | None = None, tap: str | None = None
) -> Report:
    """Draw a map of the data set from pooled features, by class and by split, with outliers named.

    Args:
        path: The store.
        picture: The PNG file to write.
        progress: Called after each piece of the store.
        labels: Labels and splits of its rows; without them points have one colour.
        tap: The tap whose features are pooled; None for `neck`, or the last one.

    Raises:
        ConfigError: The store has no such tap, or too few rows with finite features.
    """
    with cache.open_store(path) as store:
        if tap is not None and tap not in store.taps:
            message = f"{path} has no tap {tap!r}; it has {', '.join(store.taps)}"
            raise ConfigError(message)
        plane = projection.project(store, tap, progress=progress)
        ids = store.ids
    if len(plane.rows) < 2:
        message = f"{path}: {len(plane.rows)} rows have finite features in {plane.tap!r}, and a map needs two"
        raise ConfigError(message)
    point_of = {ids[row]: point for point, row in enumerate(plane.rows.tolist())}
    named = dict(list(plane.outliers.items())[:_NAMED])
    picture.parent.mkdir(parents=True, exist_ok=True)
    plots.draw_plane(
        picture,
        plane.at,
        _colourings(labels, plane.rows.tolist()),
        {name: point_of[name] for name in named},
        axis_labels=(f"PC 1 ({plane.explained[0]:.0%} of variance)", f"PC 2 ({plane.explained[1]:.0%})"),
    )
    apart = f"{len(plane.outliers)} lie apart: {', '.join(named)}" if named else "none lies apart"
    coloured = "" if labels is None else ", coloured by class and by split"
    return {
        "file": str(picture),
        "tap": plane.tap,
        "explained": list(plane.explained),
        "outliers": plane.outliers,
        "alt": (
            f"Map of {len(plane.rows)} images by the first two principal components of the averaged features of "
            f"{plane.tap}{coloured}; {apart}."
        ),
    }


def _colourings(labels: cache.Labels | None, rows: Sequence[int]) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """Names of classes and splits in order, and the one of each row; a row of several classes is `several`."""
    if labels is None:
        return {"no labels": (("image",), ["image"] * len(rows))}
    known = labels.select(rows)

    def spell(label: data.Label) -> str:
        present = [label] if isinstance(label, int) else [k for k, has in enumerate(label) if has]
        return known.class_names[present[0]] if len(present) == 1 else "several" if present else "none"

    return {
        "by class": ((*known.class_names, "several", "none"), [spell(label) for label in known.labels]),
        "by split": (("train", "val", "test"), known.splits),
    }


def _refuse_other_steps(before: int, pool: int) -> None:
    """Refuse a pool whose result would not be that of an encoder with both: see `cache.pool_steps`."""
    whole = cache.pool_steps(before * pool)
    if whole != (*cache.pool_steps(before), *cache.pool_steps(pool)):
        message = (
            f"a pool of {pool} after one of {before} averages in other steps than one of {before * pool}, so the "
            f"numbers would differ; extract with encoder.pool={before * pool}, or convert a store with a smaller pool"
        )
        raise ConfigError(message)


def _pooled_further(before: Any, pool: int) -> Any:
    """What a fingerprint says of the pool after another one: one number, or one for each tap."""
    for cells in before.values() if isinstance(before, Mapping) else [before]:
        _refuse_other_steps(cells, pool)
    return {tap: cells * pool for tap, cells in before.items()} if isinstance(before, Mapping) else before * pool


def convert(
    source: Path,
    target: Path,
    progress: Progress,
    *,
    taps: Sequence[str] = (),
    pool: int = 1,
    dtype: str | None = None,
) -> Report:
    """Write a store in the other format, with fewer taps, pooled further or in another type.

    The result is equal to extracting it so, also as int8 from float16 and as bfloat16 from float32. Any other change of
    the type is named in its fingerprint: the numbers of a store of `float16 of int8` are those of the int8 store.

    Args:
        source: The store.
        target: The store to write; its suffix chooses the format.
        taps: The taps to keep; none for all.
        pool: How many times coarser each side of the grid becomes.
        dtype: Type to store features in; None for the one that they have.
        progress: Called after each shard.

    Raises:
        ConfigError: The store has no such tap, or no encoder's pool goes in the steps that this would.
        cache.StoreError: The pool does not fit, or `target` holds something else.
    """
    with cache.open_store(source) as store:
        kept = tuple(tap for tap in mask_tap.with_scores(taps) if tap in taps or tap in store.taps) or tuple(store.taps)
        missing = [tap for tap in kept if tap not in store.taps]
        if missing:
            message = f"{source} has no tap {missing[0]!r}; it has {', '.join(store.taps)}"
            raise ConfigError(message)
        fields = _fields_of(store, kept)
        features = [tap for tap in mask_tap.features_of(store.taps) if tap in kept]
        stored_as = store.taps[features[0]].dtype if features else ""
        sides = {side for tap in features for side in store.taps[tap].shape[1:]}
        if any(side % pool for side in sides):
            message = f"a pool of {pool} does not divide the grid of {source} ({sorted(sides)} cells a side)"
            raise ConfigError(message)
        roundings = cache.Roundings(str(fields.get("dtype", stored_as)))
        if pool != 1 and len(roundings.steps) > 1:
            message = (
                f"the features of {source} were rounded to {roundings.coarsest} already, and their "
                f"averages are not those of an encoder with a coarser pool: pool the store that it was made from"
            )
            raise ConfigError(message)
    if "pool" in fields:
        fields["pool"] = _pooled_further(fields["pool"], pool)
    if dtype is not None and features:
        fields["dtype"] = roundings.then(dtype).said
    before = _version_before(source, target)
    done = cache.convert_store(
        source,
        target,
        taps=kept,
        pool=dict.fromkeys(features, pool),
        dtype=None if dtype is None else dict.fromkeys(features, dtype),
        fingerprint=cache.Fingerprint(fields),
        progress=progress,
    )
    with done:
        written = "no, it was there already" if done.version == before else "yes"
        rounding = cache.info(target).rounding
        return {
            "store": str(target),
            "rows": len(done),
            "taps": list(done.taps),
            "written": written,
            **({"rounding_error": dict(rounding)} if rounding else {}),
        }


def _version_before(source: Path, target: Path) -> str:
    """Version of the store that a conversion finds in its place; empty where there is none.

    Raises:
        cache.StoreError: It is another data set's.
    """
    try:
        held = cache.open_store(target)
    except cache.StoreError:
        return ""  # none there, or one that the writer has its own words for
    with held, cache.open_store(source) as coming:
        cache.refuse_another(held, coming, "Name another target")
        return held.version


def _fields_of(store: cache.Store, kept: Sequence[str]) -> dict[str, Any]:
    """The fingerprint that the store would have if it had been extracted with some of its taps only."""
    fields = encoders.of_taps(store.fingerprint.fields, kept)
    if image_tap.IMAGE not in kept:
        fields.pop(image_tap.FIELD, None)
    return fields


def push(
    source: Path, url: str, progress: Progress, *, labels: cache.Labels | None = None, key_file: Path | None = None
) -> Report:
    """Send a store, with labels on board or pseudonyms for ids if asked for; images never travel with pseudonyms.

    Args:
        source: The store.
        url: Where to; anything fsspec writes to.
        progress: Called after each file.
        labels: Class names, labels and splits that shall travel.
        key_file: File of the secret key of the pseudonyms; made if it is not there. The mapping is left beside it.

    Raises:
        ConfigError: The key would lie inside a store or in the place that the store is sent to.
        cache.StoreError: The place cannot be written, or holds something else.
    """
    report: Report = {"store": str(source), "url": url}
    if key_file is None:
        with cache.open_store(source) as store:
            readable = cache.what_strangers_read(store, labels=labels is not None)
        if readable:
            report["a_stranger_reads"] = readable
            report["instead"] = "--pseudonymise KEYFILE sends keyed digests in place of ids, and no digests of pixels"
            progress("a stranger will read", 1, 1, there="; ".join(readable))
    sent = source
    if key_file is not None:
        sent = source.with_name(f"{source.stem}.pseudonymous{source.suffix}")
        mapping = key_file.with_name(f"{key_file.name}.pseudonyms.csv")
        _refuse_company(key_file, (source, sent, local_place(*file_system(url))))
        with cache.open_store(source) as store:
            images = [name for name, tap in store.taps.items() if tap.holds_pixels]
            kept = [name for name in store.taps if name not in images]
            identity = cache.Fingerprint(_fields_of(store, kept))
        cache.pseudonymise_store(
            source,
            sent,
            key=_key(key_file),
            mapping=mapping,
            taps=kept,
            fingerprint=identity,
            labels=labels,
            progress=progress,
        ).close()
        report |= {"copy": str(sent), "mapping_stays_here": str(mapping)}
        if images:
            report["left_out"] = f"{', '.join(images)}: images identify people, whatever their ids are"
    elif labels is not None:
        sent = source.with_name(f"{source.stem}.labelled{source.suffix}")
        cache.convert_store(source, sent, labels=labels, progress=progress).close()
        report["copy"] = str(sent)
    return {**report, "bytes_sent": cache.push_store(sent, url, progress)}


def _refuse_company(key_file: Path, places: Sequence[Path | None]) -> None:
    """Refuse a key, with the mapping beside it, that would travel with what it protects."""
    key = Path(os.path.realpath(key_file))
    inside = next(
        (place for place in places if place is not None and key.is_relative_to(os.path.realpath(place))), None
    )
    if inside is not None:
        message = f"{key_file} would be sent along inside {inside}; keep the key and the mapping elsewhere"
        raise ConfigError(message)


def _key(file: Path) -> bytes:
    """The secret in a file, made on first use and readable by its owner alone; it is there whole or not at all."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.unfinished")
        scratch.unlink(missing_ok=True)
        scratch.touch(mode=0o600)
        write_file(file, [secrets.token_bytes(KEY_BYTES)], scratch)
        sync_folder(file.parent)
    return file.read_bytes()
