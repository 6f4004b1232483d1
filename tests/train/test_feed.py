"""Batches hold what the store and the images hold, wherever they wait."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cache
from pipeline.data import Dataset
from pipeline.errors import RunError
from pipeline.train.feeding import feed as feed_module
from pipeline.train.feeding.feed import Feed
from pipeline.train.feeding.in_memory import free_host_bytes
from pipeline.train.feeding.matching import match_rows
from tests.train.scenes import Arrays, make_dataset, make_store

CPU = torch.device("cpu")


def make_feed(dataset, store, split="train", **options):
    settings = {"taps": ("early", "neck"), "image_px": 16, "device": CPU} | options
    return Feed(dataset, split, store, **settings)


def gather(feed, batch_size=5):
    order = torch.randperm(len(feed), generator=torch.Generator().manual_seed(0)).split(batch_size)
    batches = []
    for batch in feed.batches(order):
        copied = {tap: value.clone() for tap, value in batch.features.items()}
        batches.append((batch.positions, batch.images.clone(), copied, batch.extents, batch.labels))
    return batches


@pytest.mark.parametrize("place", ["auto", "device", "host", "stream"])
@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_every_place_gives_the_pixels_and_features_of_the_right_samples(tmp_path, place, suffix):
    dataset = make_dataset()
    features = {tap: np.random.default_rng(1).standard_normal((48, 3, 4, 4)) for tap in ("early", "neck")}
    extents = np.random.default_rng(2).uniform(0.3, 1, (48, 2))
    taps = dict.fromkeys(features, (3, 4, 4))
    backwards = make_store(  # rows in another order than the samples
        tmp_path / f"scene.{suffix}",
        Dataset(
            dataset.name, dataset.samples[::-1], dataset.class_names, dataset.task, Arrays(dataset.source.images[::-1])
        ),
        taps=taps,
        dtype="float16",
        extents=extents[::-1],
        features={tap: value[::-1] for tap, value in features.items()},
    )
    feed = make_feed(dataset, backwards, split="val", place=place)
    seen = []
    for positions, images, batch, parts, labels in gather(feed):
        for i, position in enumerate(positions.tolist()):
            sample = dataset.indices("val")[position]
            seen.append(sample)
            assert feed.ids[position] == dataset.samples[sample].id
            assert torch.equal(images[i], torch.from_numpy(dataset.read(sample)).permute(2, 0, 1))
            assert labels[i] == dataset.samples[sample].label
            assert parts[i].tolist() == pytest.approx(extents[sample].tolist())
            for tap, value in features.items():
                assert batch[tap].dtype == torch.float16
                assert torch.equal(batch[tap][i], torch.from_numpy(value[sample].astype("float16")))
    assert sorted(seen) == dataset.indices("val")


def test_streaming_reads_no_more_than_it_must(scene, store, monkeypatch):
    read = []
    original = type(store).read
    monkeypatch.setattr(
        type(store), "read", lambda self, rows, **kw: read.append(len(rows)) or original(self, rows, **kw)
    )
    feed = make_feed(scene, store, place="stream")
    assert read == []
    batches = feed.batches(torch.arange(24).split(4))
    next(batches)
    assert sum(read) <= 4 * 4  # the batch itself and those read ahead
    assert len(list(batches)) == 5
    assert sum(read) == 24
    assert feed.waited_seconds > 0


def test_the_place_is_chosen_from_the_sizes_and_said(scene, store, monkeypatch):
    assert make_feed(scene, store).description.endswith("in host memory")
    monkeypatch.setattr(feed_module, "free_host_bytes", lambda: 1000)
    assert make_feed(scene, store).description.endswith("read ahead of each step")
    assert make_feed(scene, store).description.startswith("train: 24 samples; images 0 MiB and features 0 MiB")


def test_free_memory_is_what_the_machine_has():
    assert 2**20 < free_host_bytes() < 2**50


def test_images_are_resized_once_with_smoothing():
    dataset = make_dataset(side=32, height=48)
    feed = make_feed(dataset, None, taps=(), image_px=16)
    batch = next(feed.batches([torch.tensor([3])]))
    image = torch.from_numpy(dataset.read(dataset.indices("train")[3])).permute(2, 0, 1)[None]
    expected = F.interpolate(image.float(), size=(16, 16), mode="bilinear", antialias=True).round()
    assert (batch.images.float() - expected).abs().max() <= 1
    assert batch.features == {}
    assert batch.extents is None


def test_full_grids_need_no_extents(scene, store):
    assert next(make_feed(scene, store).batches([torch.tensor([0])])).extents is None


def test_missing_samples_are_named_or_left_out(tmp_path, scene):
    partial = make_store(tmp_path / "partial.zarr", scene, only=range(3, 48))
    message = r"lacks 3 of 24 samples of split 'train': 3 were never encoded \('s000', 's001', 's002'\): run"
    with pytest.raises(RunError, match=message):
        make_feed(scene, partial)
    feed = make_feed(scene, partial, allow_missing=True)
    assert len(feed) == 21
    assert feed.ids[0] == "s003"
    assert "21 samples, 3 more are not in the store" in feed.description
    other = make_store(tmp_path / "other.zarr", scene, only=range(24, 48))
    with pytest.raises(RunError, match="lacks 24 of 24 samples"):
        make_feed(scene, other, allow_missing=True)


def test_a_tap_that_is_not_stored_is_named(scene, store):
    with pytest.raises(RunError, match=r"holds no tap 'late', only early, neck: extract it"):
        make_feed(scene, store, taps=("late",))


@pytest.mark.parametrize("place", ["host", "stream"])
def test_features_of_other_pixels_are_refused(tmp_path, place):
    dataset = make_dataset()
    store = make_store(tmp_path / "scene.zarr", dataset)
    images = dataset.source.images.copy()
    images[5, 0, 0, 0] ^= 1
    changed = Dataset(dataset.name, dataset.samples, dataset.class_names, dataset.task, Arrays(images))
    with pytest.raises(RunError, match=r"features of sample 's005' in .* were made from other pixels: run"):
        list(make_feed(changed, store, place=place).batches(torch.arange(24).split(8)))


def test_an_error_while_streaming_ends_the_epoch_and_no_thread_hangs(scene, store, monkeypatch):
    feed = make_feed(scene, store, place="stream")

    message = "the disk is gone"

    def broken(self, rows, **options):
        raise OSError(message)

    monkeypatch.setattr(type(store), "read", broken)
    with pytest.raises(OSError, match=message):
        list(feed.batches(torch.arange(24).split(4)))


def renamed(dataset, indices):
    """The same images under other names, in another order."""
    samples = tuple(dataclasses.replace(dataset.samples[i], id=f"mine/{i}.png") for i in indices)
    return Dataset(dataset.name, samples, dataset.class_names, dataset.task, Arrays(dataset.source.images[indices]))


def test_a_store_serves_whoever_has_the_images_under_other_names(scene, store):
    order = np.random.default_rng(0).permutation(len(scene.samples))
    mine = renamed(scene, order)
    feed = make_feed(mine, store)
    rows = np.array([order[i] for i in mine.indices("train")])
    expected = store.read(rows, taps=("neck",))["neck"]
    for positions, _, features, _, _ in gather(feed):
        np.testing.assert_array_equal(features["neck"].numpy(), expected[positions.numpy()])


def test_known_names_decode_nothing_to_be_matched(scene, store):
    with_a_stranger = renamed(scene, np.arange(48))
    samples = (*scene.samples[:47], dataclasses.replace(with_a_stranger.samples[47]))
    decoded = []

    class Counting(Arrays):
        def read(self, index):
            decoded.append(index)
            return super().read(index)

    mixed = dataclasses.replace(scene, samples=samples, source=Counting(scene.source.images))
    assert match_rows(mixed, range(48), store).tolist() == list(range(48))
    assert decoded == [47]


def test_a_copy_with_pseudonyms_serves_whoever_has_these_names(scene, store, tmp_path):
    copy = cache.convert_store(store.path, tmp_path / "copy.zarr", pseudonym=lambda name: f"p-{name}")
    assert not len(copy.digests)
    with pytest.raises(RunError, match="lacks 24 of 24 samples"):
        make_feed(scene, copy)
    samples = tuple(dataclasses.replace(sample, id=f"p-{sample.id}") for sample in scene.samples)
    feed = make_feed(dataclasses.replace(scene, samples=samples), copy)
    assert len(gather(feed)) == 5
