"""Evaluated runs whose names come from somebody who means ill, small enough to train in a second."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import Dataset
from pipeline.evaluate.evaluate import evaluate
from pipeline.report import report
from pipeline.report.evidence import Evidence, collect
from tests.train.scenes import AUGMENTED, Arrays, do, make_dataset, make_store, register_tiny

register_tiny()

HOSTILE = '<script>alert("x")</script>'
CLASSES = (HOSTILE, "b & 'c' | d")


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@dataclass(frozen=True)
class Case:
    """A run, and what it was made of."""

    folder: Path
    dataset: Dataset
    store: Path | None

    def collect(self, **changes: Any) -> Evidence:
        return collect(self.folder, self.dataset, self.store, **changes)

    def page(self, **changes: Any) -> str:
        return report.render(self.collect(**changes))

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return found


def hostile_scene() -> Dataset:
    """Two classes with names that are markup, and two images to a group."""
    plain = make_dataset()
    samples = [
        dataclasses.replace(sample, id=f"<b>{sample.id}</b>", group=f"{sample.split} {number // 2}")
        for number, sample in enumerate(plain.samples)
    ]
    return dataclasses.replace(plain, name="<i>scene</i>", class_names=CLASSES, samples=tuple(samples))


def with_a_leak(dataset: Dataset) -> Dataset:
    """The same data set with an image of train in test, too."""
    assert isinstance(dataset.source, Arrays)
    images = np.array(dataset.source.images)
    images[dataset.indices("test")[0]] = images[dataset.indices("train")[0]]
    return dataclasses.replace(dataset, source=Arrays(images))


@pytest.fixture(scope="session")
def gated(tmp_path_factory) -> Case:
    """A gated run on hostile names."""
    dataset, folder = hostile_scene(), tmp_path_factory.mktemp("gated")
    taps = {"early": "block:1", "late": "block:5", "neck": "neck"}  # one more than the model reads
    fields = {"encoder": "random", "weights_sha256": "1" * 64, "taps": taps, "views": {}, "input_px": 64, "pool": 4}
    store = make_store(folder / "scene.zarr", dataset, fields=fields)
    do(dataset, store, folder / "run", augmentation=AUGMENTED)
    evaluate(folder / "run", dataset, store, resamples=200)
    return Case(folder / "run", dataset, folder / "scene.zarr")
