"""Stored views: the same turns as the encoder's, drawn with their own features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.encoders.preprocessing import VIEWS as ENCODED
from pipeline.encoders.preprocessing import turned
from pipeline.errors import ConfigError, RunError
from pipeline.model.classifier import Classifier
from pipeline.model.geometry import sample_gate, sample_image
from pipeline.train.augment import VIEWS, Augmentation, DrawnViews, draw_views, view_taps
from pipeline.train.train import train
from tests.train.scenes import QUICK, TAPS, TINY, make_dataset, make_store

ALL = tuple(VIEWS)


def one_of_each():
    return DrawnViews(ALL, torch.arange(len(ALL)))


def test_views_turn_images_as_the_encoder_does():
    assert tuple(ENCODED) == ALL
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    moved = sample_image(image.expand(8, 3, 32, 32), one_of_each().on_image(None), 32)
    for number, view in enumerate(ALL):
        expected, _ = turned(image, torch.tensor([[32, 32]]), view)
        assert torch.equal(moved[number], expected[0].float()), view


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 32), (32, 24)])
def test_a_views_own_gate_is_the_gate_turned_with_the_image(height, width):
    """Of an encoder that is equivariant: its features are mean colours of 4 x 4 pixels."""
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pixels[:, :, :height, :width] = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    own = [F.avg_pool2d(turned(pixels, torch.tensor([[height, width]]), view)[0].float(), 4) for view in ALL]
    views, extents = one_of_each(), torch.tensor([[height / 32, width / 32]]).expand(8, 2)
    laid = sample_gate(torch.cat(own), None, views.extents(extents), (5, 5))
    moved = sample_gate(own[0].expand(8, 3, 8, 8), views.on_image(None), extents, (5, 5))
    torch.testing.assert_close(laid, moved, atol=1e-3, rtol=0)
    assert (laid[0] - laid[1]).abs().max() > 1  # the views do differ


def test_each_sample_gets_the_features_of_its_view_and_the_map_drawn_on_top():
    features = {"neck": torch.zeros(8, 1, 2, 2)} | {
        f"neck@{v}": torch.full((8, 1, 2, 2), float(n)) for n, v in enumerate(ALL)
    }
    views = one_of_each()
    picked = views.features(features, ["neck"])["neck"]
    assert picked[:, 0, 0, 0].tolist() == list(range(8))
    assert features["neck"].abs().max() == 0
    on_top = torch.tensor([[[0.5, 0.0, 0.1], [0.0, 0.5, 0.2]]]).expand(8, 2, 3)
    joined = views.on_image(on_top)
    place = torch.tensor([0.3, -0.4, 1.0])
    for number, view in enumerate(ALL):
        inner = on_top[0] @ place
        expected = torch.tensor(VIEWS[view], dtype=torch.float32) @ inner
        torch.testing.assert_close(joined[number] @ place, expected)


def test_every_view_is_drawn_as_often():
    drawn = draw_views(("hflip", "rot90"), 6000, torch.Generator().manual_seed(0))
    assert drawn.views == ("identity", "hflip", "rot90")
    assert torch.bincount(drawn.chosen).tolist() == pytest.approx([2000] * 3, rel=0.06)


def test_views_that_the_store_lacks_are_named(scene, store, tmp_path):
    views = Augmentation(views=("hflip", "vflip"))
    with pytest.raises(RunError, match=r"holds no tap 'early@hflip', only early, neck"):
        train(scene, store, tmp_path, model=TINY, options=QUICK, augmentation=views)


def test_the_plain_classifier_draws_views_without_a_store(scene, tmp_path):
    views = Augmentation(views=("hflip", "vflip"), rotation_degrees=5)
    plain = dataclasses.replace(TINY, gates=())
    report = train(scene, None, tmp_path, model=plain, options=QUICK, augmentation=views)
    assert np.isfinite([row["train_loss"] for row in report.history]).all()


def test_training_hands_each_view_its_own_features_and_extents(tmp_path, monkeypatch):
    dataset = make_dataset(counts=(8, 2, 2))
    names = (*TAPS, *view_taps(tuple(TAPS), ("rot90",)))
    mark = {name: float("@" in name) for name in names}
    features = {name: np.full((12, *TAPS[name.partition("@")[0]]), mark[name]) for name in names}
    extents = [(0.5, 1.0)] * 12
    taps = {name: TAPS[name.partition("@")[0]] for name in names}
    store = make_store(tmp_path / "s.zarr", dataset, taps=taps, features=features, extents=extents)
    seen = []
    forward = Classifier.forward

    def watched(self, images, features, extents=None, affine=None):
        if self.training:
            seen.append((features["neck"][:, 0, 0, 0], extents.clone(), affine))
        return forward(self, images, features, extents, affine)

    monkeypatch.setattr(Classifier, "forward", watched)
    train(dataset, store, tmp_path / "run", model=TINY, options=QUICK, augmentation=Augmentation(views=("rot90",)))
    turned_ones = torch.cat([marks for marks, _, _ in seen])
    assert 0 < turned_ones.mean() < 1
    for marks, parts, affine in seen:
        assert affine is None
        assert parts.tolist() == [[1.0, 0.5] if mark else [0.5, 1.0] for mark in marks.tolist()]


def test_impossible_views_are_refused():
    with pytest.raises(ConfigError, match=r"no view 'flip': choose from rot90, rot180"):
        view_taps(("neck",), ("flip",))
    with pytest.raises(ConfigError, match=r"and flips or turns besides: choose one"):
        Augmentation(views=("hflip",), flip_vertical=0.5)
