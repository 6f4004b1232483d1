"""A data set with lesions at known places, features that know them, and finished runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pipeline.data import Dataset, Sample
from pipeline.model.classifier import ModelOptions
from pipeline.train import trained_model
from pipeline.train.train import train
from tests.train.scenes import QUICK, make_store, register_tiny

register_tiny()

HEIGHT, WIDTH = 24, 32
GATED = ModelOptions(backbone="tiny", image_px=16, gates=(("early", "stage1"), ("neck", "stage4")))
ORACLE = dataclasses.replace(GATED, gates=(("neck", "stage4"),))
PLAIN = dataclasses.replace(GATED, gates=())


@dataclass(frozen=True)
class Scenes:
    """Images and masks held in memory."""

    images: np.ndarray  # (n, H, W, 3) uint8
    masks: np.ndarray  # (n, H, W) bool

    def read(self, index):
        return self.images[index]

    def stamp(self, index):
        return None

    def mask(self, index):
        return self.masks[index]


def lesion_dataset(task="binary", classes=2, counts=(24, 6, 12), seed=0) -> Dataset:
    """Make wide noise images with one bright square each; two images a patient."""
    random = np.random.default_rng(seed)
    total = sum(counts)
    images = random.integers(0, 80, (total, HEIGHT, WIDTH, 3), dtype=np.uint8)
    masks = np.zeros((total, HEIGHT, WIDTH), bool)
    for image, mask in zip(images, masks, strict=True):
        top, left = (int(random.integers(0, side // 8)) * 8 for side in (HEIGHT, WIDTH))
        mask[top : top + 8, left : left + 8] = True
        image[mask] += 100
    numbers = np.arange(total) // 2 % classes
    labels = [tuple(int(n % (k + 2) == 0) for k in range(classes)) if task == "multilabel" else int(n) for n in numbers]
    splits = [name for name, count in zip(("train", "val", "test"), counts, strict=True) for _ in range(count)]
    samples = tuple(
        Sample(f"ward/p{i // 2:02d}_{i % 2}.png", label, split, f"p{i // 2:02d}")
        for i, (label, split) in enumerate(zip(labels, splits, strict=True))
    )
    return Dataset("lesions", samples, tuple("abcdef"[:classes]), task, Scenes(images, masks))


def knowing_store(path, dataset):
    """Write a store whose `neck` is the lesion's part of each cell of the padded square, and whose `early` is noise."""
    masks = torch.from_numpy(dataset.source.masks).float()
    padded = torch.nn.functional.pad(masks, (0, 0, 0, WIDTH - HEIGHT), value=1)  # padding that would mislead
    cells = torch.nn.functional.avg_pool2d(padded[:, None], 8).numpy()  # (n, 1, 4, 4)
    noise = np.random.default_rng(1).standard_normal((len(dataset), 5, 4, 4))
    return make_store(
        path,
        dataset,
        taps={"early": (5, 4, 4), "neck": (1, 4, 4)},
        features={"early": noise, "neck": cells},
        extents=[(HEIGHT / WIDTH, 1.0)] * len(dataset),
        fields={"encoder": "lesion"},
    )


def knowing_run(folder, dataset, store, *, sign=1.0):
    """Train a run for one epoch and set its gate to rise (or, with sign -1, fall) with the lesion's part of a cell."""
    train(dataset, store, folder, model=ORACLE, options=dataclasses.replace(QUICK, epochs=1))
    classifier, _ = trained_model.load_classifier(folder)
    state = classifier.state_dict()
    scale, shift = state["gates.0.norm.scale"], state["gates.0.norm.shift"]
    state["gates.0.squeeze.weight"].fill_(1 / scale.item())  # undoes the norm
    state["gates.0.squeeze.bias"].fill_(-shift.item() / scale.item())
    state["gates.0.excite.weight"].fill_(sign * 0.1)
    state["gates.0.excite.bias"].zero_()
    trained_model.save_weights(folder / "model.safetensors", state)
    trained_model.save_description(folder, trained_model.load_description(folder))  # names the weights by their digest
    return folder


@pytest.fixture(scope="session")
def lesions():
    return lesion_dataset()


@pytest.fixture(scope="session")
def lesion_store(lesions, tmp_path_factory):
    return knowing_store(tmp_path_factory.mktemp("lesions") / "lesions.zarr", lesions)


@pytest.fixture(scope="session")
def gated_run(lesions, lesion_store, tmp_path_factory):
    """A run with two gates, trained; tests read it and write only its folder `explain`."""
    folder = tmp_path_factory.mktemp("gated") / "run"
    train(lesions, lesion_store, folder, model=GATED, options=dataclasses.replace(QUICK, epochs=2))
    return folder


@pytest.fixture(scope="session")
def oracle_run(lesions, lesion_store, tmp_path_factory):
    """A run whose gate is highest on the lesion."""
    return knowing_run(tmp_path_factory.mktemp("oracle") / "run", lesions, lesion_store)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written during a test, in order, by the name of their file."""
    written, save = {}, Figure.savefig

    def remember(figure, file, **options):
        written[Path(file.name).name.removesuffix(".partial")] = figure
        save(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return written
