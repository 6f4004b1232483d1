"""Training on images that the store holds: the same run, bit for bit, and no file read."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

import cache
from pipeline.data import pixel_digest
from pipeline.data.resize import squared
from pipeline.errors import RunError
from pipeline.evaluate.evaluate import evaluate
from pipeline.train.augment import Augmentation
from pipeline.train.feeding import feed as feed_module
from pipeline.train.feeding.in_memory import Holdings
from pipeline.train.train import Machine
from tests.train.scenes import TAPS, TINY, Arrays, do, equal, make_dataset, weights_of
from tests.train.test_feed import make_feed

SIDE = 16


def with_images(path, dataset, side=SIDE):
    """A store as `make_store` writes it, with images of a side beside the features."""
    random = np.random.default_rng(0)
    features = {tap: random.standard_normal((48, *shape)).astype("float32") for tap, shape in TAPS.items()}
    taps = {tap: cache.TapSpec(*shape, "float32") for tap, shape in TAPS.items()}
    fields = {"encoder": "random"}
    if side:
        taps["image"] = cache.TapSpec(3, side, side, "uint8")
        fields["image"] = {"side_px": side}
        features["image"] = np.stack([squared(dataset.read(i), side).numpy() for i in range(48)])
    rows = [cache.Row(sample.id, pixel_digest(dataset.read(i))) for i, sample in enumerate(dataset.samples)]
    with cache.create_store(path, fingerprint=cache.Fingerprint(fields), taps=taps, rows=rows) as writer:
        for plan in writer.pending:
            at = list(plan.rows)
            writer.write(plan, {tap: values[at] for tap, values in features.items()}, np.ones((len(at), 2), "float32"))
        return writer.commit()


@pytest.fixture(scope="module")
def large():
    """Images that have to be resized."""
    return make_dataset(side=40, height=32)


@pytest.fixture(scope="module")
def stores(large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    return {side: with_images(folder / f"{side}.zarr", large, side) for side in (0, SIDE, 20)}


@pytest.fixture
def decoded(large, monkeypatch):
    counts = Counter()
    read = Arrays.read

    def counting(self, index):
        counts[large.samples[index].split] += 1
        return read(self, index)

    monkeypatch.setattr(Arrays, "read", counting)
    return counts


@pytest.mark.parametrize("place", ["host", "stream"])
def test_the_same_history_and_weights_without_reading_a_file(large, stores, tmp_path, decoded, place):
    machine = Machine(place=place)
    first = do(large, stores[0], tmp_path / "decoded", machine=machine)
    assert decoded["train"] >= 24
    assert decoded["val"] >= 12
    decoded.clear()
    second = do(large, stores[SIDE], tmp_path / "stored", machine=machine)
    assert not decoded
    timeless = [[{**row, "seconds": 0, "wait_share": 0} for row in report.history] for report in (first, second)]
    assert timeless[0] == timeless[1]
    assert equal(weights_of(tmp_path / "decoded"), weights_of(tmp_path / "stored"))
    assert "MiB (from the store) and features" in second.feeds[0]
    assert "from the store" not in first.feeds[0]
    figures = evaluate(tmp_path / "decoded", large, stores[SIDE], resamples=10)  # one run, images from elsewhere
    assert not decoded
    assert figures["auc"] == evaluate(tmp_path / "stored", large, stores[0], resamples=10)["auc"]


def test_a_margin_takes_the_store_of_its_side_for_training_and_decodes_for_val(large, stores, tmp_path, decoded):
    report = do(large, stores[20], tmp_path, augmentation=Augmentation(crop=0.8, margin=0.25))
    assert decoded == {"val": 12}
    train, val = report.feeds
    assert "(from the store)" in train
    assert "(decoded, as the store's have 20 px and 16 px are wanted)" in val


def test_feeds_that_share_take_images_from_either(large, stores, decoded):
    images = []
    for order in ((stores[SIDE], stores[0]), (stores[0], stores[SIDE])):
        shared = Holdings()
        for store in order:
            feed = make_feed(large, store, holdings=shared)
            images.append(next(feed.batches([torch.arange(24)])).images)
    assert decoded == {"train": 24}
    assert all(torch.equal(images[0], other) for other in images)


def test_shared_images_of_other_pixels_are_refused(large, stores, tmp_path):
    changed = make_dataset(side=40, height=32)
    changed.source.images[5, 0, 0, 0] ^= 1
    other = with_images(tmp_path / "other.zarr", changed, side=0)
    shared = Holdings()
    make_feed(large, stores[SIDE], holdings=shared)
    with pytest.raises(RunError, match=r"features of sample 's005' in .* were made from other pixels"):
        make_feed(large, other, holdings=shared)


def test_a_part_reads_its_part(large, stores, monkeypatch):
    read, rows = type(stores[SIDE]).read, []

    def counting(self, at, taps=None, **options):
        rows.extend(at if tuple(taps) == ("image",) else [])
        return read(self, at, taps=taps, **options)

    monkeypatch.setattr(type(stores[SIDE]), "read", counting)
    feed = make_feed(large, stores[SIDE], among=large.indices("train")[::3])
    assert sorted(rows) == large.indices("train")[::3]
    assert len(feed) == 8


@pytest.mark.parametrize("place", ["host", "stream"])
@pytest.mark.parametrize("side", [0, SIDE])
def test_pixels_are_named_wherever_images_come_from(large, stores, place, side):
    feed = make_feed(large, stores[side], split="val", place=place)
    list(feed.batches(torch.arange(12).split(5)))
    named = [feed.pixel_digest(position) for position in range(12)]
    assert named == [pixel_digest(large.read(i)) for i in large.indices("val")]


def test_images_are_streamed_where_they_do_not_fit(large, stores, monkeypatch, decoded):
    whole = make_feed(large, stores[SIDE])
    monkeypatch.setattr(feed_module, "free_host_bytes", lambda: 1000)
    feed = make_feed(large, stores[SIDE])
    assert feed.description.endswith("read ahead of each step")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).split(5)
    for streamed, held in zip(feed.batches(order), whole.batches(order), strict=True):
        assert torch.equal(streamed.images, held.images)
        assert torch.equal(streamed.features["neck"], held.features["neck"])
    assert not decoded


def test_a_gate_reads_no_image(large, stores, tmp_path):
    model = dataclasses.replace(TINY, gates=(("image", "stem"),))
    with pytest.raises(RunError, match=r"holds no tap 'image', only early, neck: extract it"):
        do(large, stores[SIDE], tmp_path, model=model)
