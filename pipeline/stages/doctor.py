"""What this machine can do, and what that means for a configuration, in words."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cache
from pipeline import data, encoders
from pipeline.config.schema import STORED, Config, to_dict
from pipeline.errors import DataError, PipelineError
from pipeline.extract.plan import Contents
from pipeline.model.classifier import ModelOptions
from pipeline.progress import Progress
from pipeline.stages import clocks
from pipeline.stages.arguments import model_options, train_options
from pipeline.stages.inputs import checkpoint, device, load_dataset, recipe, workers
from pipeline.train.optimise import TrainOptions
from pipeline.train.provenance import device_name, versions
from pipeline.train.train import training_part

Report = dict[str, Any]
_IMAGES = 1000  # where nobody says how many there are
_COMPARED = ("lite_medsam", "sam_vit_b")  # encoders that are clocked beside the configured one
_EPOCHS = 30
_GIB = 2**30
_BUSY = 1.2
_BUDGET_SECONDS = 40.0  # no clock is begun after this


def examine(config: Config | None, progress: Progress) -> Report:
    """Look at the machine and clock it.

    Args:
        config: An experiment, whose data, encoder, store and classifier are clocked and whose needs are compared; None
            clocks what comes with the project.
        progress: Called after each clock.

    Returns:
        JSON values: `software`, `processor`, `busy` (tasks that wait or run, for each core), `devices`, `memory_gib`,
        `disk`, `extras`, `weights`, `clocks` (seconds an image), `means` (sentences) and `seconds`.
    """
    began = time.perf_counter()
    where = device(config) if config is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    target = config.store.path if config is not None else Path("features")
    report: Report = {
        "software": versions(),
        "processor": {"name": device_name("cpu"), "cores": len(os.sched_getaffinity(0))},
        "devices": list(_devices()),
        "busy": os.getloadavg()[0] / len(os.sched_getaffinity(0)),
        "memory_gib": _memory(),
        "disk": _disk(target),
        "extras": _extras(),
        "weights": list(_weights(config)),
    }
    dataset = _dataset_of(config)
    report["clocks"] = _clock(config, dataset, where, progress, began)
    report["means"] = list(_means(report, config, dataset, where))
    report["seconds"] = time.perf_counter() - began
    return report


def _devices() -> Iterator[Report]:
    """Each accelerator, and the types that it computes in."""
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        types = ["float32", "float16", *(["bfloat16"] if torch.cuda.is_bf16_supported() else [])]
        yield {"name": properties.name, "memory_gib": properties.total_memory / _GIB, "precisions": types}


def _memory() -> Report:
    """Memory of the machine that this process may fill, GiB."""
    values = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024 / _GIB
    except (OSError, ValueError, IndexError):
        return {}
    return {"total": values.get("MemTotal"), "available": values.get("MemAvailable")}


def _disk(path: Path) -> Report:
    """Free space where a path is or would be."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    usage = shutil.disk_usage(there)
    return {"path": str(path), "free_gib": usage.free / _GIB, "total_gib": usage.total / _GIB}


def _extras() -> dict[str, bool]:
    """Whether each extra of the project is installed, by what its metadata say that it needs."""
    needed: dict[str, list[str]] = defaultdict(list)
    try:
        requirements = importlib.metadata.requires("slca-pipeline") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    for requirement in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra is not None and name is not None:
            needed[extra[1]].append(name[0])
    return {extra: all(map(_installed, names)) for extra, names in sorted(needed.items())}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _weights(config: Config | None) -> Iterator[Report]:
    """Files of weights, with their digests: configured ones, here or not, and published ones that are here."""
    if config is not None and _encodes(config):
        file = checkpoint(config)
        yield {"name": str(config.encoder.checkpoint), **_file(file), "configured": True}
    if config is not None and "none" not in (config.model.backbone, str(config.model.weights)):
        yield {"name": _classifier_weights_name(config), **_file(_classifier_weights(config)), "configured": True}
    for name in encoders.PUBLISHED:
        file = encoders.checkpoint_path(name)
        if file.is_file() and (config is None or str(config.encoder.checkpoint) != name):
            yield {"name": name, **_file(file), "configured": False}


def _classifier_weights(config: Config) -> Path | None:
    """The file that the backbone starts from, there or not; None where nobody can say which, without the extra say."""
    try:
        return model_options(config).weights_file
    except PipelineError:  # training is clocked too, and says what is wrong
        return None


def _classifier_weights_name(config: Config) -> str:
    """As configured: a file, or which published weights of which backbone."""
    weights = str(config.model.weights)
    is_file = Path(weights).suffix or len(Path(weights).parts) > 1
    return weights if is_file else f"{weights} of {config.model.backbone}"


def _file(file: Path | None) -> Report:
    if file is None:
        return {"file": None, "found": False, "sha256": None}
    if not file.is_file():
        return {"file": str(file), "found": False, "sha256": None}
    return {"file": str(file), "found": True, "sha256": encoders.weights_sha256(file)}


def _dataset_of(config: Config | None) -> data.Dataset | None:
    """The configured data set, where it is here."""
    try:
        return None if config is None else load_dataset(config)
    except PipelineError:
        return None


def _clock(config: Config | None, dataset: data.Dataset | None, where: str, progress: Progress, began: float) -> Report:
    """Seconds an image, by what is clocked; None where it could not be done, or not in time."""
    shapes = _shapes(config)
    options = model_options(config) if config is not None else ModelOptions()
    batch = config.train.batch_size if config is not None else 16
    store = None if config is None or not config.store.path.exists() else config.store.path
    sent = config is not None and config.encoder.name == STORED  # a store without its images
    works: dict[str, Callable[[], float]] = {
        **({} if sent else {"decode": lambda: clocks.of_decoding(dataset)}),
        "read": lambda: clocks.of_reading(store, shapes),
        "train": lambda: clocks.of_training(options, shapes, min(batch, 16), where),
    }
    asked = [] if sent else list(_asked(config))
    works |= {f"encode {one.label}": partial(clocks.of_encoding, one, where) for one in asked}
    found: Report = {}
    for done, (name, work) in enumerate(works.items()):
        progress("clock", done, len(works))
        in_time = time.perf_counter() - began < _BUDGET_SECONDS
        try:
            found[name] = work() if in_time else None
        except (PipelineError, cache.StoreError, OSError, RuntimeError) as error:
            found[name] = None
            found.setdefault("failed", {})[name] = " ".join(str(error).split())
    progress("clock", len(works), len(works))
    types = clocks.of_types(where)
    return {**found, "bfloat16_over_float32": types["bfloat16"] / types["float32"]}


def _asked(config: Config | None) -> Iterator[clocks.Asked]:
    """The configured encoder, then those that people choose between."""
    chosen = None if config is None else config.encoder
    if config is not None and chosen is not None and _encodes(config):
        yield clocks.Asked(
            chosen.name,
            chosen.taps,
            _present(checkpoint(config)),
            chosen.input_px,
            chosen.pool,
            chosen.precision,
            chosen.preprocessing,
            to_dict(chosen.masks),
        )
    known = [name for family in encoders.FAMILIES for name in family.names]
    for name in _COMPARED:
        if name in known and (chosen is None or chosen.name != name):
            yield clocks.Asked(name, None, _present(encoders.weights_file(name, Path(name))))


def _encodes(config: Config) -> bool:
    """Whether the configured encoder has weights and reads images."""
    name = config.encoder.name
    return name != STORED and encoders.family_of(name).reads == "image"


def _shapes(config: Config | None) -> dict[str, tuple[int, int, int]]:
    """Shape of each tap: of the configured encoder, of the store that was sent, or of SAM ViT-B."""
    if config is None:
        return dict(encoders.make_recipe("sam_vit_b", None, None, None).shapes)
    if config.encoder.name == STORED:
        with cache.open_store(config.store.path) as store:
            return {name: tap.shape for name, tap in store.taps.items()}
    return dict(recipe(config).shapes)


def _present(file: Path) -> Path | None:
    return file if file.is_file() else None


def _means(report: Report, config: Config | None, dataset: data.Dataset | None, where: str) -> Iterator[str]:
    """What the clocks mean for a configuration."""
    if report["busy"] > _BUSY:
        yield f"others keep this machine busy ({report['busy']:.1f} tasks a core), so all clocks are slower than it is"
    images = len(dataset) if dataset is not None else _IMAGES
    what = f"{images:,} images" if dataset is not None else f"{images:,} images, say"
    measured: Mapping[str, float | None] = report["clocks"]
    for name, seconds in measured.items():
        if name.startswith("encode ") and isinstance(seconds, float):
            label = name.removeprefix("encode ")
            yield f"extract: {label}: {_duration(seconds)} an image here; {what}: {_duration(seconds * images)}"
    train, decode = measured.get("train"), measured.get("decode")
    if isinstance(train, float):
        epochs = config.train.epochs if config is not None else _EPOCHS
        share = _trained_on(config, dataset)
        backbone = config.model.backbone if config is not None else "resnet18"
        yield f"train: {backbone}: {epochs} epochs of {share:,} images: {_duration(train * share * epochs)}"
    threads = workers(config) if config is not None else len(os.sched_getaffinity(0))
    slowest = min((s for n, s in measured.items() if n.startswith("encode ") and isinstance(s, float)), default=None)
    if isinstance(decode, float) and slowest is not None and decode / threads > slowest:
        yield f"decoding is slower than encoding: {threads} threads give an image each {_duration(decode / threads)}"
    yield from _on_precision(measured["bfloat16_over_float32"], config, where)
    yield from _on_room(report, config, images)
    for weights in report["weights"]:
        if weights["configured"] and not weights["found"]:
            yield f"the weights {weights['name']!r} are not here: `pipeline prepare` has them"


def _trained_on(config: Config | None, dataset: data.Dataset | None) -> int:
    """Images of an epoch: those that `train.fraction` or `train.shots` choose; of data that are not here, a guess."""
    options = TrainOptions() if config is None else train_options(config)
    if dataset is None:
        return round(0.6 * _IMAGES * options.fraction) if options.shots is None else 2 * options.shots
    try:
        return len(training_part(dataset, options))
    except DataError:  # fewer than `shots`, which training says
        return len(dataset.indices("train"))


def _on_precision(ratio: float | None, config: Config | None, where: str) -> Iterator[str]:
    if ratio is None:
        return
    said = f"bfloat16 takes {ratio:.2f} of float32's time for a matrix product on {where}"
    chosen = config.encoder.precision if config is not None else "float32"
    if ratio < 0.8 and chosen == "float32":
        yield f"{said}: encoder.precision: bfloat16 would be faster, with other last digits"
    elif ratio > 1.1 and chosen == "bfloat16":
        yield f"{said}: encoder.precision: float32 would be faster"
    else:
        yield said


def _on_room(report: Report, config: Config | None, images: int) -> Iterator[str]:
    """Whether the store fits on the disk, and the features into memory."""
    if config is None or config.encoder.name == STORED:
        return
    row = Contents({}, recipe(config).shapes, {}, config.store.dtype, config.store.image_px).row_bytes
    size, free = row * images / _GIB, report["disk"]["free_gib"]
    enough = "fits" if size < free else "does not fit: list fewer taps, or average more with encoder.pool"
    yield f"store: {images:,} rows are {size:.2f} GiB, and {free:.0f} GiB are free: it {enough}"
    available = report["memory_gib"].get("available")
    if available is not None and size > 0.5 * available:
        yield f"features of {size:.1f} GiB do not fit into {available:.0f} GiB of memory: training reads the store"


def _duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
