"""What the later stages read, made or fetched unless it is there: the data set, and the weights of the encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from pipeline import clip, data, encoders, records
from pipeline.config.schema import STORED, Config, DemoData, FolderData, MedMnistData, to_dict
from pipeline.data.count import count
from pipeline.data.glance import glance
from pipeline.data.guess import guess_masks
from pipeline.data.layouts.files import Files
from pipeline.data.splits import even_seed
from pipeline.encoders.clip.demo import ARITHMETIC as CLIP_ARITHMETIC
from pipeline.encoders.sam.recipe import ARITHMETIC
from pipeline.errors import CheckpointError, ConfigError
from pipeline.progress import Progress
from pipeline.stages.inputs import checkpoint, encoder_name, load_dataset
from pipeline.train.provenance import data_in_numbers

Report = dict[str, Any]
_TRAINING = 3  # of the miniature SAM: raise it when the same settings give other weights; 1 made the encoder alone


def prepare_data(config: Config, progress: Progress) -> Report:
    """Make the demo's images or fetch an official archive, and count what the data set holds.

    Raises:
        ConfigError: The archive was fetched, and has another name than the configured one.
        DataError: The data set cannot be loaded.
    """
    match config.data:
        case DemoData() as demo:
            data.generate_demo(
                demo.path,
                count=demo.count,
                size_px=demo.size_px,
                seed=demo.seed,
                difficulty=data.Difficulty(**demo.difficulty.model_dump()),
                progress=progress,
            )
        case MedMnistData(path=Path() as path) as archive if not path.exists():
            fetched = data.fetch_medmnist(archive.name, archive.size_px, path.parent, progress=progress)
            if fetched != path:
                message = f"data.path is {str(path)!r}; the official archive is now at {str(fetched)!r}: name it"
                raise ConfigError(message)
        case _:
            pass  # the person's own files: loading them below is the check
    dataset = load_dataset(config)
    return {
        "path": str(config.data.path),
        "classes": list(dataset.class_names),
        **{split: len(dataset.indices(split)) for split in get_args(data.Split)},
        "counts": asdict(count(dataset)),
        "ignored": dict(dataset.ignored),
        "notes": _notes(config, dataset),
    }


def _notes(config: Config, dataset: data.Dataset) -> list[str]:
    """What makes scores too good, or is passed over without a word."""
    notes = []
    section, key = config.data, {"folder": "group_pattern", "csv": "group_column"}.get(config.data.layout)
    if key is not None and getattr(section, key) is None and dataset.drawn is not None:
        notes.append(
            f"each of the {len(dataset)} images counts as a patient of its own, because there is no data.{key}: where "
            f"a patient has several images, they land in train and test, and scores are too good"
        )
    if isinstance(config.data, FolderData) and config.data.masks is None:
        masks = guess_masks([sample.id for sample in dataset.samples])
        if masks is not None:
            notes.append(
                f"{masks[1]} of the {len(dataset)} images seem to be masks of the others: "
                f'--set data.masks="{masks[0]}" takes them for what they are'
            )
    if dataset.drawn == "steady":
        notes += _uneven(config, dataset)
    if isinstance(dataset.source, Files) and isinstance(dataset.source.root, Path):
        tiffs = [name for name in dataset.source.names if name.lower().endswith((".tif", ".tiff"))]
        seen = glance([dataset.source.root / name for name in tiffs])
        if seen.pages[0]:
            notes.append(
                f"{seen.pages[0]} of {seen.looked_at} TIFF files that were opened have several pages (up to "
                f"{seen.pages[1]}), and one is read of each: data.reading.frame chooses it"
            )
    return notes


def _uneven(config: Config, dataset: data.Dataset) -> list[str]:
    """Where chance gave val or test less than half of its share of a class, and the seed that shares more evenly."""
    rule = config.data.split  # type: ignore[union-attr]  # a data set that is drawn has one
    fractions: dict[data.Split, float] = {"val": rule.val, "test": rule.test}
    counts = {split: found["classes"] for split, found in data_in_numbers(dataset)["splits"].items()}
    short = [
        f"{counts[split][name]} instead of {share * total:.0f} images of {name!r} in {split}"
        for split, share in fractions.items()
        for name in dataset.class_names
        if (total := sum(of_split[name] for of_split in counts.values())) * share >= 2
        and counts[split][name] < share * total / 2
    ]
    if not short:
        return []
    labels, groups = [s.label for s in dataset.samples], [s.group for s in dataset.samples]
    seed = even_seed(labels, groups, fractions=fractions)
    return [f"chance put {', '.join(short)}: before a first training, data.split.seed={seed} draws more evenly"]


def prepare_encoder(config: Config, progress: Progress) -> Report:
    """Make or fetch the encoder's weights; the known mask has none.

    Raises:
        CheckpointError: They cannot be had, or the file is a person's own where ours would go.
    """
    if config.encoder.name == STORED:
        return _fetch_texts(config, progress)
    if encoders.family_of(config.encoder.name).reads == "mask":
        return {}  # the masks come with the data
    if config.encoder.training.steps == 0:
        return _draw_weights(config)
    if config.encoder.name == "sam_demo":
        return _train_demo(config, progress)
    if config.encoder.name == clip.DEMO:
        return prepare_demo_clip(config, config.encoder.checkpoint, progress)
    path = encoders.fetch_weights(config.encoder.name, config.encoder.checkpoint, progress=progress)
    return {"checkpoint": str(path), "sha256": encoders.weights_sha256(path)}


def _fetch_texts(config: Config, progress: Progress) -> Report:
    """Where a store brings the features, fetch what class prompts need: the text tower, if its weights are named."""
    if config.encoder.checkpoint == Path():
        return {"checkpoint": "none needed: the features are in the store"}
    path = encoders.fetch_weights(encoder_name(config), config.encoder.checkpoint, progress=progress)
    return {"checkpoint": str(path), "sha256": encoders.weights_sha256(path)}


def encoder_record(config: Config) -> Report:
    """How the encoder's weights were made here and how well they do; nothing where they are not of our making."""
    name = config.encoder.name
    if name == STORED or encoders.family_of(name).reads == "mask":
        return {}
    return _recorded(checkpoint(config))


def prepare_demo_clip(config: Config, path: Path, progress: Progress) -> Report:
    """Train the miniature CLIP on images and captions of another seed than the data set's.

    Args:
        config: Of its training, as encoder and as backbone.
        path: The file of both towers.
        progress: Called after each image and step.

    Raises:
        CheckpointError: The file is a person's own.
    """
    wanted = config.model.clip.training

    def train() -> Report:
        images, captions, _ = data.captioned_arrays(wanted.images, 128, wanted.seed, progress=progress)
        held_out, _, labels = data.demo_arrays(120, 128, wanted.seed + 1000)
        trained = encoders.train_demo_clip(
            images,
            captions,
            held_out,
            labels,
            data.DEMO_CLASSES,
            path,
            seed=wanted.seed,
            steps=wanted.steps,
            progress=progress,
        )
        return asdict(trained)

    settings = {"clip": clip.DEMO, **to_dict(wanted), "arithmetic": CLIP_ARITHMETIC, "torch": torch.__version__}
    named = "encoder.checkpoint" if path == config.encoder.checkpoint else "model.weights"
    return _made_once(path, settings, train, keys=("model.clip.training.steps", named))


def _draw_weights(config: Config) -> Report:
    """Draw the encoder's weights from the seed.

    Raises:
        CheckpointError: They would go where published weights belong.
    """
    name, named, seed = config.encoder.name, config.encoder.checkpoint, config.encoder.training.seed
    path = checkpoint(config)
    if not path.is_relative_to(named):
        message = (
            f"encoder.checkpoint: {str(named)!r} means published weights ({path}), and encoder.training.steps: 0 draws "
            f"others: name a place of your own for them"
        )
        raise CheckpointError(message)
    settings = {"encoder": name, "steps": 0, "seed": seed, "torch": torch.__version__}
    return _made_once(path, settings, lambda: {"parameters": encoders.write_untrained_encoder(name, path, seed=seed)})


def _train_demo(config: Config, progress: Progress) -> Report:
    """Train the miniature SAM on images of another seed than the data set's."""
    wanted, path = config.encoder.training, config.encoder.checkpoint

    def train() -> Report:
        trained = encoders.train_demo_encoder(
            *data.demo_objects(wanted.images, 128, seed=wanted.seed),
            *data.demo_objects(64, 128, seed=wanted.seed + 1000),
            path,
            seed=wanted.seed,
            steps=wanted.steps,
            progress=progress,
        )
        return asdict(trained)

    made_by = {"version": _TRAINING, "arithmetic": ARITHMETIC, "torch": torch.__version__}
    return _made_once(path, {**to_dict(wanted), **made_by}, train)


def _made_once(
    path: Path,
    settings: Report,
    make: Callable[[], Report],
    keys: tuple[str, str] = ("encoder.training.steps", "encoder.checkpoint"),
) -> Report:
    """Make weights unless these very ones are there, and leave beside them what they are and how they were made.

    Args:
        path: Their file.
        settings: What they follow from.
        make: Makes them and says what they are.
        keys: Of the configuration, for the message: where their steps and their file are configured.

    Raises:
        CheckpointError: The file there is none that was made here.
    """
    known = _recorded(path)
    if path.is_file():
        found = encoders.weights_sha256(path)
        if known.get("sha256", found if known else None) != found:
            message = (
                f"{path}: holds weights that were not made here, and {keys[0]} is {settings['steps']}, "
                f"which would make others in their place: name another file as {keys[1]}"
            )
            raise CheckpointError(message)
        if known.get("settings") == settings and "sha256" in known:
            return known
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(_record_of(path), {"settings": settings})  # whatever a kill leaves behind was made here
    report = {"checkpoint": str(path), **make(), "settings": settings}
    report["sha256"] = encoders.weights_sha256(path)
    records.write_json(_record_of(path), report)
    return report


def _recorded(path: Path) -> Report:
    """What `_made_once` left beside weights; nothing if the file there is somebody else's."""
    try:
        known = json.loads(_record_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and "settings" in known else {}


def _record_of(path: Path) -> Path:
    return path.with_suffix(".json")
