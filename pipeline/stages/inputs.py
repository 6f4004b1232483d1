"""What a configuration says of stage one: data set, encoder, contents of the store. torch waits until one encodes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cache
from pipeline import clip, data, encoders
from pipeline.config.schema import STORED, Config, StoreData, to_dict
from pipeline.data.layouts.stored import WITHOUT_IMAGES
from pipeline.data.scan import memory_of, remembered
from pipeline.errors import CheckpointError, ConfigError
from pipeline.extract.plan import Contents, unchanged
from pipeline.progress import Progress
from pipeline.url import Url

if TYPE_CHECKING:
    from pipeline.evaluate.adapt import Texts
    from pipeline.extract.on_node import Plain


def check_encoder(config: Config, where: str) -> None:
    """Refuse an encoder that there is not, before anything else is done.

    Args:
        config: The configuration, which knows no encoders.
        where: It was read from.

    Raises:
        ConfigError: No family has an encoder of that name.
    """
    if config.encoder.name == STORED and isinstance(config.data, StoreData):
        return
    try:
        encoders.family_of(config.encoder.name)
    except ConfigError as error:
        message = f"{where}: encoder.name: {error}"
        raise ConfigError(message) from None


def load_dataset(config: Config, *, only_test: bool = False) -> data.Dataset:
    """The data set that the configuration describes, in its fold if one is configured.

    Args:
        config: The configuration.
        only_test: Draw no splits where there are none, and no fold: everything is test then.
    """
    options = config.data.model_dump(exclude={"reading"})
    no_draw = only_test or config.fold is not None
    found = data.load_dataset(**options, reading=reading(config), only_test=no_draw)
    return found if only_test else in_fold(config, found)


def require_encoder(config: Config) -> None:
    """Refuse what needs an encoder where only a store is configured.

    Raises:
        ConfigError: No encoder is configured.
    """
    if config.encoder.name == STORED:
        message = (
            f"data.layout: {str(config.data.path)!r} is a store of features, and no encoder is configured, so no image "
            f"can be encoded or added to it. {WITHOUT_IMAGES}; for anything else configure the data set with its "
            f"images, and the encoder"
        )
        raise ConfigError(message)


def in_fold(config: Config, dataset: data.Dataset) -> data.Dataset:
    """A data set in the configured fold; as it is if none is configured."""
    fold = config.fold
    return dataset if fold is None else data.in_fold(dataset, fold.number, of=fold.of, seed=fold.seed, val=fold.val)


def reading(config: Config) -> data.Reading:
    """How image files become uint8 RGB; layouts without a choice take the default."""
    rules = getattr(config.data, "reading", None)
    return data.Reading() if rules is None else data.Reading(**rules.model_dump())


def checkpoint(config: Config) -> Path:
    """The file of weights, there or not: as configured, or where a published checkpoint is kept for all projects."""
    return encoders.weights_file(config.encoder.name, config.encoder.checkpoint)


def recipe(config: Config) -> encoders.Recipe:
    """How the configured encoder makes features, apart from its weights.

    Raises:
        ConfigError: The encoder cannot do what is asked of it.
    """
    wanted = config.encoder
    return encoders.make_recipe(
        wanted.name,
        wanted.taps,
        wanted.input_px,
        wanted.pool,
        wanted.precision,
        wanted.preprocessing,
        to_dict(wanted.masks),
    )


def build_encoder(config: Config, *, new_images: bool = True) -> encoders.Encoder:
    """The frozen encoder that the configuration describes, on its device.

    Args:
        config: The configuration.
        new_images: Whether it is to encode others than those of the data set, of which nobody knows the masks.

    Raises:
        ConfigError: It reads masks, and new images, or images beside the masks, are asked of it.
    """
    file = _checked_weights(config, new_images=new_images)
    return encoders.build_encoder(**_encoder_arguments(config), checkpoint=file, device=device(config))


def plain_encoder(config: Config) -> Plain:
    """The frozen encoder that the configuration describes, for a cluster to build.

    Raises:
        ConfigError: See `build_encoder`.
    """
    from pipeline.extract.on_node import Plain

    weights = _checked_weights(config, new_images=False)
    return Plain(_encoder_arguments(config), weights, config.resources.device)


def _encoder_arguments(config: Config) -> dict[str, Any]:
    """What `encoders.build_encoder` is told, apart from weights and device."""
    wanted = config.encoder
    return {
        "name": wanted.name,
        "taps": wanted.taps,
        "input_px": wanted.input_px,
        "pool": wanted.pool,
        "precision": wanted.precision,
        "preprocessing": wanted.preprocessing,
        "masks": to_dict(wanted.masks),
    }


def _checked_weights(config: Config, *, new_images: bool) -> Path | None:
    """The encoder's file of weights, once nothing speaks against the encoder; None where it has none."""
    require_encoder(config)
    reads_masks = encoders.family_of(config.encoder.name).reads == "mask"
    if reads_masks and new_images:
        message = (
            f"encoder.name: {config.encoder.name!r} reads the data set's own masks, so it encodes no other images: "
            f"only extract, train, evaluate and study take it; choose another encoder here"
        )
        raise ConfigError(message)
    if reads_masks and config.store.image_px is not None:
        message = (
            f"store.image_px: the encoder {config.encoder.name!r} stores no images; "
            f"set it to null (--set store.image_px=null)"
        )
        raise ConfigError(message)
    return None if reads_masks else encoders.present_weights(config.encoder.name, config.encoder.checkpoint)


def encoder_name(config: Config) -> str:
    """The encoder of the configured features: where only a store knows it, the one that the store names."""
    if config.encoder.name != STORED:
        return config.encoder.name
    with cache.open_store(config.store.path) as store:
        return str(store.fingerprint.fields.get("encoder"))


def class_texts(config: Config, dataset: data.Dataset) -> Texts:
    """What the text tower of the configured encoder, a CLIP, makes of the data set's classes.

    Raises:
        ConfigError: The encoder is no CLIP, or a class or a template does not fit.
        CheckpointError: Its weights are not here, or nobody says which they are.
    """
    from pipeline.evaluate.adapt import Texts

    name = encoder_name(config)
    if not clip.is_clip(name):
        message = (
            f"probe.method: {config.probe.method!r} compares image features with class prompts, and the encoder "
            f"{name!r} is no CLIP: choose one (encoder.name: clip:NAME), or probe.method: linear"
        )
        raise ConfigError(message)
    if config.encoder.checkpoint == Path():
        message = (
            f"probe.method: {config.probe.method!r} compares image features with class prompts, which the text tower "
            f"of {name!r} reads, and a store holds no text tower: name the weights that its features are of as "
            f"encoder.checkpoint, a file or published ones, which `pipeline prepare` fetches"
        )
        raise CheckpointError(message)
    asked = clip.prompts(dataset.class_names, config.model.clip.templates, config.model.clip.words)
    file = encoders.present_weights(name, config.encoder.checkpoint)
    classes, scale = clip.class_features(name, file, asked)
    prompts = dict(zip(dataset.class_names, asked, strict=True))
    return Texts(classes, scale, prompts, encoders.weights_sha256(file))


def device(config: Config) -> str:
    """Where to compute: the configured device, or the best that this machine has.

    Raises:
        ConfigError: The configured device is not there.
    """
    import torch  # here: what is said before a weight is read takes less time than importing it

    wanted = config.resources.device
    if wanted == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        message = f"resources.device: {wanted!r} cannot be used here ({first_line}); try 'auto' or 'cpu'"
        raise ConfigError(message) from None
    return wanted


def workers(config: Config) -> int:
    """Decoding threads: as configured, else one per processor, at most 16; or 16 that wait for a server."""
    if config.resources.workers is not None:
        return config.resources.workers
    return 16 if behind_url(config) else min(len(os.sched_getaffinity(0)), 16)


def behind_url(config: Config) -> bool:
    """Whether a server has the images, so that whoever reads them waits more than he works."""
    return any(isinstance(getattr(config.data, key, None), Url) for key in ("path", "images"))


def contents(config: Config, encoder: Mapping[str, Any]) -> Contents:
    """What the configured store holds, from what its encoder answers for."""
    return Contents(
        encoder,
        recipe(config).shapes,
        data.reading_rules(reading(config)),
        config.store.dtype,
        config.store.image_px,
    )


def finished(config: Config, progress: Progress) -> dict[str, Any] | None:
    """The report of an extraction that has nothing left to do; None where it has, or where that takes a closer look.

    Raises:
        DataError: The data set cannot be loaded.
        ConfigError: The encoder cannot do what is asked of it.
    """
    require_encoder(config)
    began = time.perf_counter()
    path = config.store.path
    if not path.exists() or encoders.family_of(config.encoder.name).reads == "mask":  # all would have to be read
        return None
    dataset = load_dataset(config)
    try:
        wanted = recipe(config).fingerprint(encoders.weights_sha256(checkpoint(config)))
    except CheckpointError:
        return None  # loading the weights says what is wrong
    asked = contents(config, wanted)
    known = remembered(dataset, memory_of(path))
    if not unchanged(dataset, path, asked, known.digests if known.known.all() else None, progress):
        return None
    rows = len(dataset)
    seconds = {"total": time.perf_counter() - began}
    return {
        "store": str(path),
        "rows": rows,
        "encoded": 0,
        "reused": rows,
        "changes": {"added": 0, "changed": 0, "renamed": 0, "removed": 0, "reused": rows},
        "set_aside": {},
        "seconds": seconds,
        "advice": "",
    }
