"""Small data sets and stores for the tests of stage two, real in everything but size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models._api import register_model

import cache
from pipeline.data import Dataset, Sample, pixel_digest
from pipeline.model.backbones import BACKBONES
from pipeline.model.classifier import ModelOptions
from pipeline.train import trained_model
from pipeline.train.augment import Augmentation
from pipeline.train.optimise import TrainOptions
from pipeline.train.train import train


class Tiny(nn.Module):
    """A residual-free ResNet in miniature, laid out as torchvision's: 5 thousand parameters."""

    def __init__(self, num_classes=2, weights=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(), nn.Identity()
        self.layer1, self.layer2 = self.block(8, 8, 1), self.block(8, 12, 2)
        self.layer3, self.layer4 = self.block(12, 16, 2), self.block(16, 16, 1)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, num_classes)

    @staticmethod
    def block(given, made, stride):
        layer = nn.Conv2d(given, made, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(made), nn.ReLU())


def register_tiny():
    """Make `Tiny` a backbone like any other."""
    if "tiny" not in BACKBONES:
        register_model("tiny")(Tiny)
        BACKBONES["tiny"] = BACKBONES["resnet18"]


TAPS = {"early": (5, 4, 4), "neck": (3, 4, 4)}
TINY = ModelOptions(backbone="tiny", image_px=16, gates=(("early", "stage1"), ("neck", "stage4")))
PLAIN = dataclasses.replace(TINY, gates=())
QUICK = TrainOptions(epochs=3, batch_size=8, lr=1e-2, weight_decay=0.0, seed=1)
STEADY = dataclasses.replace(QUICK, optimiser="sgd")  # rounding stays rounding, which Adam would let grow
AUGMENTED = Augmentation(flip_vertical=0.5, rotation_degrees=5, brightness=0.1)


@dataclass(frozen=True)
class Arrays:
    """Images held in memory, as a source of pixels."""

    images: np.ndarray  # (n, H, W, 3) uint8

    def read(self, index):
        return self.images[index]

    def stamp(self, index):
        return None

    def mask(self, index):
        return None


def make_dataset(counts=(24, 12, 12), *, classes=2, side=16, task="binary", seed=0, height=None) -> Dataset:
    """Make noise images whose class is the column in which a bright bar stands."""
    random = np.random.default_rng(seed)
    total = sum(counts)
    images = random.integers(0, 80, (total, height or side, side, 3), dtype=np.uint8)
    numbers = np.arange(total) % classes
    for image, number in zip(images, numbers, strict=True):
        left = int((number + 0.5) * side / classes)
        image[:, left - 1 : left + 1] += 60
    splits = [name for name, count in zip(("train", "val", "test"), counts, strict=True) for _ in range(count)]
    if task == "multilabel":
        labels = [
            tuple(int(b) for b in random.permutation([number == k for k in range(classes)])) for number in numbers
        ]
        labels = [tuple(int(number % (k + 2) == 0) for k in range(classes)) for number in range(total)]
    else:
        labels = [int(number) for number in numbers]
    samples = tuple(
        Sample(id=f"s{i:03d}", label=label, split=split, group=f"g{i:03d}")
        for i, (label, split) in enumerate(zip(labels, splits, strict=True))
    )
    return Dataset("scene", samples, tuple("abcdef"[:classes]), task, Arrays(images))


def make_store(
    path: Path,
    dataset: Dataset,
    *,
    taps=TAPS,
    dtype="float32",
    only=None,
    extents=None,
    seed=0,
    fields=None,
    features=None,
) -> cache.Store:
    """Write a store of random features (or the given ones) for the samples of a data set."""
    random = np.random.default_rng(seed)
    kept = [i for i in range(len(dataset.samples)) if only is None or i in only]
    rows = [cache.Row(dataset.samples[i].id, pixel_digest(dataset.read(i))) for i in kept]
    specs = {tap: cache.TapSpec(*shape, dtype) for tap, shape in taps.items()}
    if features is None:
        features = {tap: random.standard_normal((len(dataset.samples), *shape)) for tap, shape in taps.items()}
    parts = np.ones((len(dataset.samples), 2), np.float32) if extents is None else np.asarray(extents, np.float32)
    fingerprint = cache.Fingerprint(fields or {"encoder": "random", "taps": {tap: list(s) for tap, s in taps.items()}})
    with cache.create_store(path, fingerprint=fingerprint, taps=specs, rows=rows) as writer:
        for plan in writer.pending:
            at = [kept[row] for row in plan.rows]
            writer.write(plan, {tap: value[at].astype(dtype) for tap, value in features.items()}, parts[at])
        return writer.commit()


def do(dataset, store, folder, **changes):
    """Train a tiny gated classifier for a few epochs."""
    settings = {"model": TINY, "options": QUICK, "augmentation": AUGMENTED} | changes
    return train(dataset, store, folder, **settings)


def weights_of(folder):
    classifier, _ = trained_model.load_classifier(folder)
    return classifier.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
