"""Training on painted images: masks that tell the class are learnt from, wherever they wait and whatever moves."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from pipeline.errors import RunError
from pipeline.evaluate.evaluate import evaluate
from pipeline.evaluate.predict import predict
from pipeline.model.overlay import OverlayOptions
from pipeline.train import trained_model
from pipeline.train.augment import Augmentation
from pipeline.train.train import Machine
from tests.train.scenes import PLAIN, QUICK, do, equal, make_dataset, make_store, weights_of

SIDE = 16
PAINTED = dataclasses.replace(PLAIN, overlay=OverlayOptions())


@pytest.fixture(scope="module")
def noise():
    """Images that tell nothing of their class."""
    dataset = make_dataset((32, 16, 16))
    pixels = np.random.default_rng(3).integers(0, 160, (64, SIDE, SIDE, 3), dtype=np.uint8)
    return dataclasses.replace(dataset, source=dataclasses.replace(dataset.source, images=pixels))


def masks_of(dataset, *, tell: bool) -> np.ndarray:
    """A large or a small square, by the class or by nothing; none on every eighth image."""
    random = np.random.default_rng(5)
    maps = np.zeros((len(dataset.samples), 1, SIDE, SIDE))
    for number, sample in enumerate(dataset.samples):
        side = 10 if (sample.label if tell else random.integers(2)) else 4
        top, left = random.integers(0, SIDE - side, 2)
        if number % 8:
            maps[number, 0, top : top + side, left : left + side] = 1
    return maps


def store_of(path, dataset, maps, **more):
    return make_store(path, dataset, taps={"masks": (1, SIDE, SIDE)}, dtype="uint8", features={"masks": maps}, **more)


@pytest.fixture(scope="module")
def telling(noise, tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("telling") / "masks.zarr", noise, masks_of(noise, tell=True))


LONGER = dataclasses.replace(QUICK, epochs=12)
MOVED = Augmentation(flip_horizontal=0.5, rotation_degrees=10, brightness=0.1)


@pytest.fixture(scope="module")
def learnt(noise, telling, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learnt") / "run"
    do(noise, telling, folder, model=PAINTED, options=LONGER, augmentation=MOVED)
    return folder


def test_masks_that_tell_the_class_help_and_others_do_not(noise, learnt, tmp_path):
    silent = store_of(tmp_path / "silent.zarr", noise, masks_of(noise, tell=False))
    best = trained_model.load_description(learnt).metrics
    without = do(noise, None, tmp_path / "plain", model=PLAIN, options=LONGER, augmentation=MOVED).metrics
    misled = do(noise, silent, tmp_path / "silent", model=PAINTED, options=LONGER, augmentation=MOVED).metrics
    auc = best["val"]["auc"]
    assert auc > 0.85
    assert auc > max(without["val"]["auc"], misled["val"]["auc"]) + 0.1
    assert best["overlay"]["train"] == {"images": 32, "without_masks": 4, "masks": 28 / 32}
    assert "overlay" not in without


def test_evaluate_paints_test_images_and_counts_those_without_a_mask(noise, telling, learnt):
    figures = evaluate(learnt, noise, telling, resamples=50)
    assert figures["overlay"] == {"images": 16, "without_masks": 2, "masks": 14 / 16}
    assert figures["auc"] > 0.85
    assert json.loads((learnt / "metrics.json").read_text())["overlay"]["without_masks"] == 2


@pytest.mark.parametrize("place", ["stream", "device"])
def test_it_does_not_matter_where_masks_wait(noise, telling, learnt, tmp_path, place):
    do(noise, telling, tmp_path, model=PAINTED, options=LONGER, augmentation=MOVED, machine=Machine(place=place))
    assert equal(weights_of(tmp_path), weights_of(learnt))


def test_masks_move_with_the_views_of_an_image_and_need_none_of_their_own(noise, telling, tmp_path):
    views = Augmentation(views=("vflip", "rot90"))
    report = do(noise, telling, tmp_path, model=PAINTED, augmentation=views)
    assert report.metrics["overlay"]["val"]["images"] == 16


def test_a_margin_of_detail_is_painted_too(noise, telling, tmp_path):
    do(noise, telling, tmp_path, model=PAINTED, augmentation=Augmentation(margin=0.5, crop=0.8, rotation_degrees=10))


def test_a_run_without_an_overlay_is_the_run_of_an_earlier_version(noise, tmp_path):
    do(noise, None, tmp_path, model=PLAIN)
    assert "overlay" not in json.loads((tmp_path / "settings.json").read_text())["model"]
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["model"].pop("overlay") is None
    (tmp_path / "model.json").write_text(json.dumps(described))
    assert trained_model.load_description(tmp_path).model == PLAIN


def test_a_run_says_how_it_was_painted(learnt, noise, telling, tmp_path):
    assert json.loads((learnt / "settings.json").read_text())["model"]["overlay"]["palette"] == "rank"
    assert trained_model.load_description(learnt).model == PAINTED
    other = dataclasses.replace(PAINTED, overlay=OverlayOptions(palette="binary"))
    with pytest.raises(RunError, match=r"model.overlay.palette is 'binary' and was 'rank'"):
        do(noise, telling, learnt, model=other, options=LONGER, augmentation=MOVED)


def test_images_from_elsewhere_are_painted_by_the_encoder(noise, telling, learnt):
    class Finder:
        """An encoder whose masks are those of the store."""

        input_px = SIDE

        def __init__(self):
            self.number = 48  # the first of test

        def prepare(self, image):
            return type("Prepared", (), {"pixels": torch.zeros(1), "size": (SIDE, SIDE)})

        def encode(self, pixels, sizes, dtype):
            rows = range(self.number, self.number + len(pixels))
            self.number += len(pixels)
            return {"masks": torch.from_numpy(telling.read(rows)["masks"])}

    figures = evaluate(learnt, noise, telling, resamples=20)
    images = [noise.read(index) for index in noise.indices("test")]
    said = list(predict(learnt, images, encoder=Finder(), fingerprint=telling.fingerprint))
    hits = np.argmax(said, axis=1) == [noise.samples[i].label for i in noise.indices("test")]
    assert hits.mean() == pytest.approx(figures["acc"])


def test_a_store_without_masks_or_with_something_else_of_that_name_is_refused(noise, store, scene, tmp_path):
    with pytest.raises(RunError, match=r"holds no tap 'masks', only early, neck: extract it \(encoder.taps, then"):
        do(scene, store, tmp_path / "run", model=PAINTED)
    false = make_store(tmp_path / "false.zarr", noise, taps={"masks": (1, SIDE, SIDE)})
    with pytest.raises(RunError, match=r"is float32 of 1 channels, and a map of masks is uint8 of 1: it holds no mask"):
        do(noise, false, tmp_path / "run", model=PAINTED)
    assert not (tmp_path / "run").exists()
