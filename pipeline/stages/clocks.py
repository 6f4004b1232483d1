"""Clocks of this machine: how long an image takes to decode, to encode, to read back and to train on.

Half a minute for all of them, so each is a few repetitions of the real thing: good to a factor of about 1.5, which is
enough to choose an encoder. Speed does not depend on what weights have learnt; where they are not here, random ones
stand in for them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow

import cache
from pipeline import data, encoders
from pipeline.encoders.pooling import Pool
from pipeline.mask_tap import others_of
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.tasks import losses

_ROUNDS_SECONDS = 1.5  # a clock repeats what it measures this long, and once at least
_SIDE_PX = 1024  # of images where there are none
_ROWS = 32  # of a store where there is none
_CLASSES = 2
_SLOWER = 1.1  # bfloat16 over float32, from which on it is worth a word
_PRODUCT = 1024  # side of the matrices whose product tells the speed of a type


@dataclass(frozen=True)
class Asked:
    """An encoder to clock, as `encoders.build_encoder` takes it; `weights` is None where they are not here."""

    name: str
    taps: tuple[str, ...] | None
    weights: Path | None
    input_px: int | None = None
    pool: Pool = None
    precision: str = "float32"
    preprocessing: str | None = None
    masks: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """What people call it."""
        fields = encoders.make_recipe(self.name, self.clocked, self.input_px, self.pool).fingerprint("")
        less = ", without masks" if self.clocked != self.taps else ""
        return f"{self.name} at {fields.get('input_px')} px{less}"

    @property
    def clocked(self) -> tuple[str, ...] | None:
        """Its taps, or without its weights those that are no masks: drawn ones may have no mask decoder."""
        if self.taps is None or self.weights is not None or not others_of(self.taps):
            return self.taps
        return tuple(tap for tap in self.taps if tap not in others_of(self.taps)) or ("neck",)


def of_decoding(dataset: data.Dataset | None) -> float:
    """Seconds that one thread takes to decode an image: of a data set, or of a grey PNG of 1024 px."""
    if dataset is not None:
        return _average([partial(dataset.read, k) for k in range(0, len(dataset), max(1, len(dataset) // 16))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scan.png")
        noise = np.random.default_rng(0).integers(0, 256, (_SIDE_PX // 8, _SIDE_PX // 8)).astype(np.uint8)
        Pillow.fromarray(noise).resize((_SIDE_PX, _SIDE_PX)).save(path)
        return _average([partial(data.read_image, path)])


def of_encoding(asked: Asked, device: str) -> float:
    """Seconds that an encoder takes for an image, one at a time on a CPU and four on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = asked.weights
        if file is None:
            file = Path(folder, "untrained.pth")
            encoders.write_untrained_encoder(asked.name, file)
        encoder = encoders.build_encoder(
            asked.name,
            checkpoint=file,
            taps=asked.clocked,
            input_px=asked.input_px,
            pool=asked.pool,
            precision=asked.precision,
            preprocessing=asked.preprocessing,
            masks=asked.masks,
            device=device,
        )
    noise = np.random.default_rng(0).integers(0, 256, (encoder.input_px, encoder.input_px, 3), np.uint8)
    at_once = 1 if device == "cpu" else 4
    prepared = encoder.prepare(noise)
    pixels = torch.stack([prepared.pixels] * at_once)
    sizes = torch.tensor([prepared.size] * at_once)

    def encode() -> None:
        for tap in encoder.encode(pixels, sizes).values():
            tap.cpu()

    return _average([encode], warm=True) / at_once


def of_reading(store: Path | None, shapes: Mapping[str, tuple[int, int, int]]) -> float:
    """Seconds to read a row of a store into memory, and check it: of one that is here, or of one made for it."""
    if store is not None:
        with cache.open_store(store) as found:
            rows = np.random.default_rng(0).permutation(len(found))[:64]
            return _average([lambda: found.read(rows)]) / len(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clock.zarr")
        _write_store(path, shapes)
        with cache.open_store(path) as found:
            return _average([lambda: found.read(range(_ROWS))]) / _ROWS


def _write_store(path: Path, shapes: Mapping[str, tuple[int, int, int]]) -> None:
    taps = {name: cache.TapSpec(*shape, "float16") for name, shape in shapes.items()}
    rows = [cache.Row(str(k), k.to_bytes(32, "big")) for k in range(1, _ROWS + 1)]
    with cache.create_store(path, fingerprint=cache.Fingerprint({"clock": 1}), taps=taps, rows=rows) as writer:
        for plan in writer.pending:
            n = len(plan.rows)
            features = {name: np.ones((n, *shape), np.float16) for name, shape in shapes.items()}
            writer.write(plan, features, np.ones((n, 2), np.float32))
        writer.commit().close()


def of_training(
    options: ModelOptions, shapes: Mapping[str, tuple[int, int, int]], batch_size: int, device: str
) -> float:
    """Seconds that a step of training takes for an image: forward, backward and the optimiser."""
    where = torch.device(device)
    taps = {tap: shapes[tap] for tap in options.taps}
    untrained = replace(options, weights="none")  # as fast as any, and weights need not be here
    classifier = Classifier(untrained, taps, _CLASSES).to(where).train()
    optimiser = torch.optim.AdamW(classifier.parameters())
    side = options.image_px
    images = None if options.backbone == "none" else torch.randn(batch_size, 3, side, side, device=where)
    features = {tap: torch.randn(batch_size, *shape, device=where) for tap, shape in taps.items()}
    labels = torch.arange(batch_size, device=where) % _CLASSES

    def step() -> None:
        loss = losses("softmax", classifier(images, features), labels).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        loss.item()

    return _average([step], warm=True) / batch_size


def of_types(device: str) -> dict[str, float]:
    """Seconds of a matrix product by type, the best of several that alternate."""
    pairs = {
        name: torch.ones(_PRODUCT, _PRODUCT, device=device, dtype=getattr(torch, name))
        for name in ("float32", "bfloat16")
    }
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(6):
        for name, matrix in pairs.items():
            began = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def slow_precision(precision: str, device: str) -> str:
    """One sentence where bfloat16 is slower than float32 on a machine, which half a second tells; else empty.

    Args:
        precision: Of the encoder's matrix products.
        device: Where it is to encode.
    """
    if precision != "bfloat16":
        return ""
    seconds = of_types(device)
    ratio = seconds["bfloat16"] / seconds["float32"]
    if ratio <= _SLOWER:
        return ""
    return f"bfloat16 takes {ratio:.1f} times as long as float32 on this machine: set encoder.precision to float32"


def _average(works: list[Callable[[], object]], *, warm: bool = False) -> float:
    """Seconds of a piece of work, over as many as fit into the time; a first slow one is the answer itself."""
    if warm:
        began = time.perf_counter()
        works[0]()
        first = time.perf_counter() - began
        if first > 2 * _ROUNDS_SECONDS:
            return first
    began, done = time.perf_counter(), 0
    while True:
        works[done % len(works)]()
        done += 1
        spent = time.perf_counter() - began
        if spent > _ROUNDS_SECONDS or (len(works) > 1 and done == len(works)):
            return spent / done
