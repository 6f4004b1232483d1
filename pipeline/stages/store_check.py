"""Whether a store holds what the configuration asks for, or what it asked for before it was changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import cache
from pipeline import encoders
from pipeline.config.schema import STORED, Config, StoreData
from pipeline.data.layouts.stored import WITHOUT_IMAGES
from pipeline.errors import ConfigError, RunError
from pipeline.image_tap import stored_px
from pipeline.mask_tap import is_masks
from pipeline.model.classifier import ModelOptions
from pipeline.model.overlay import check_width
from pipeline.stages.inputs import checkpoint, recipe

Said = tuple[str, Any, Any]  # key of the configuration, what it asks for, what the store holds


def check_store(config: Config, store: cache.Store) -> None:
    """Refuse a store of other features than the configuration describes, whose names a result would bear.

    Weights that are not here are not asked about: whoever was sent a store need not have them. Nor is the version of
    the software that encoded: an older store is as good as it was.

    Raises:
        RunError: They differ; the message says in which keys.
    """
    differing = [
        f"{key} asks for {asked!r:.80}, and the store has {held!r:.80}"
        for key, asked, held in _compared(config, store.fingerprint.fields)
        if asked != held
    ]
    if differing:
        message = (
            f"{str(store.path)!r} holds other features than the configuration describes: {'; '.join(differing)}. "
            f"Run `pipeline extract` (with `--replace` where it refuses), name another store.path, or configure what "
            f"the store has."
        )
        raise RunError(message)


def check_plan(config: Config) -> None:
    """Refuse features that cannot be made, or that the configured classifier could not use, before anything is made.

    Raises:
        ConfigError: The encoder has no such tap or cannot work so, or the overlay needs a finer map of masks.
    """
    if config.encoder.name == STORED:
        return
    shapes, overlay = recipe(config).shapes, config.model.overlay
    if overlay is not None and overlay.tap in shapes:
        check_width(overlay.tap, shapes[overlay.tap][-1], config.model.image_px)


def check_images(config: Config, model: ModelOptions) -> None:
    """Refuse to train on images that a store does not hold, where a store is all there is.

    Raises:
        ConfigError: It holds no images, or at another side than is wanted.
    """
    if not isinstance(config.data, StoreData) or not model.reads_images:
        return
    path = config.data.path
    with cache.open_store(path) as store:
        side, wanted = stored_px(store.taps), round(model.image_px * (1 + config.train.augment.margin))
        pseudonyms = " under pseudonyms" if cache.are_pseudonyms(store.ids) else ""
    if side is None:
        message = (
            f"data.layout: {str(path)!r} is a store of features{pseudonyms} and holds no images, so no backbone "
            f"({model.backbone!r}) can be trained on it. {WITHOUT_IMAGES}; for anything else configure the data set "
            f"with its images"
        )
        raise ConfigError(message)
    if wanted != side:
        message = (
            f"model.image_px: {str(path)!r} holds images at {side} px, and {wanted} px are asked for; a stored image "
            f"is not resized again: set model.image_px={side} and train.augment.margin=0"
        )
        raise ConfigError(message)


def _compared(config: Config, held: Any) -> Iterator[Said]:
    """What both sides say, key by key."""
    wanted = config.encoder
    if wanted.name == STORED:
        return  # whatever the store holds is what was asked for
    yield "encoder.name", wanted.name, held.get("encoder")
    asked_type, held_type = config.store.dtype, str(held.get("dtype"))
    same = asked_type == cache.Roundings(held_type).coarsest  # `float16 of int8` are the numbers that int8 is read as
    yield "store.dtype", asked_type, asked_type if same else held_type
    if wanted.name != held.get("encoder"):
        return  # which says it all
    asked: Any = recipe(config).fingerprint("")
    if encoders.family_of(wanted.name).reads == "mask":
        yield "encoder (input_px in cells of 16 px, over pool)", asked["grid"], held.get("grid")
        return
    file = checkpoint(config)
    if file.is_file():
        yield "encoder.checkpoint", encoders.weights_sha256(file)[:12], str(held.get("weights_sha256"))[:12]
    for key in ("input_px", "precision"):
        yield f"encoder.{key}", asked[key], held.get(key)
    yield "encoder.preprocessing", asked["preprocessing"]["name"], held.get("preprocessing", {}).get("name")
    by_tap = isinstance(asked["pool"], Mapping) and isinstance(held.get("pool"), Mapping)
    if not by_tap and {} not in (asked["pool"], held.get("pool")):  # of masks alone, which are not averaged
        yield "encoder.pool", asked["pool"], held.get("pool")
    overlay = [] if config.model.overlay is None else [config.model.overlay.tap]
    named = dict.fromkeys([*(gate.tap for gate in config.model.gates), *config.model.fuse, *overlay])
    used = [tap for tap in named if tap in held.get("taps", {})]  # whoever reads them says which are not there
    for tap in (tap for tap in used if tap in asked["taps"]):
        yield f"encoder.taps: {tap}", asked["taps"][tap], held["taps"][tap]
        if by_tap and not is_masks(tap):
            yield f"encoder.pool: {tap}", asked["pool"][tap], held["pool"].get(tap)
    if any(map(is_masks, used)):
        asked_rules, held_rules = (encoders.mask_settings(fields) or {} for fields in (asked, held))
        for key in dict.fromkeys([*asked_rules, *held_rules]):
            yield f"encoder.masks.{key}", asked_rules.get(key), held_rules.get(key)
