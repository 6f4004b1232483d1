"""What feeds share is decoded and read once, and is what each would have read for itself."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.data import Dataset
from pipeline.errors import ConfigError, DataError, RunError
from pipeline.evaluate.evaluate import evaluate
from pipeline.train import trained_model
from pipeline.train.feeding import feed as feed_module
from pipeline.train.feeding import in_memory
from pipeline.train.feeding.feed import Feed
from pipeline.train.feeding.in_memory import Holdings
from pipeline.train.train import train
from tests.train.scenes import PLAIN, QUICK, TINY, Arrays, do, equal, make_store, weights_of

CPU = torch.device("cpu")


@pytest.fixture
def counted(scene, store, monkeypatch):
    """Counts of decodes by sample, and of rows read by store and tap."""
    decodes, reads = Counter(), Counter()
    decode, read = Dataset.read, type(store).read

    def counting_decode(self, index):
        decodes[index] += 1
        return decode(self, index)

    def counting_read(self, rows, taps=None, **options):
        for tap in taps:
            reads.update((self.path.name, tap, int(row)) for row in rows)
        return read(self, rows, taps=taps, **options)

    monkeypatch.setattr(Dataset, "read", counting_decode)
    monkeypatch.setattr(type(store), "read", counting_read)
    return decodes, reads


def contents(feed):
    """Everything that a feed holds, by sample."""
    images, features, labels = [], {tap: [] for tap in ("early", "neck")}, []
    for batch in feed.batches(torch.arange(len(feed)).split(5)):
        images.append(batch.images.clone())  # a streamed batch is lent
        labels.append(batch.labels)
        for tap, feature in batch.features.items():
            features[tap].append(feature.clone())
    return feed.ids, torch.cat(images), {tap: torch.cat(parts) for tap, parts in features.items()}, torch.cat(labels)


def test_runs_that_share_load_everything_once_and_end_as_they_would_alone(scene, store, tmp_path, counted):
    decodes, reads = counted
    other = make_store(tmp_path / "other.zarr", scene, taps={"mask": (2, 4, 4)})
    decodes.clear()  # of making the store
    own = dataclasses.replace(TINY, gates=(("mask", "stem"),))
    shared = Holdings()
    for name, model, features in (("plain", PLAIN, None), ("gated", TINY, store), ("own", own, other)):
        for fraction in (0.25, 0.5, 1.0):
            folder = tmp_path / f"{name}{fraction}"
            options = dataclasses.replace(QUICK, epochs=1, fraction=fraction)
            do(scene, features, folder, model=model, options=options, holdings=shared)
            evaluate(folder, scene, features, resamples=10, holdings=shared)
    assert decodes == dict.fromkeys(range(48), 1)
    assert set(reads.values()) == {1}
    assert Counter((name, tap) for name, tap, _ in reads) == {
        ("scene.zarr", "early"): 48,
        ("scene.zarr", "neck"): 48,
        ("other.zarr", "mask"): 48,
    }
    do(scene, store, tmp_path / "alone", options=dataclasses.replace(QUICK, epochs=1, fraction=0.5))
    assert equal(weights_of(tmp_path / "alone"), weights_of(tmp_path / "gated0.5"))


@pytest.mark.parametrize("place", ["host", "device", "stream"])
def test_a_part_holds_the_samples_that_it_names(scene, store, place):
    shared, settings = Holdings(), {"taps": ("early", "neck"), "image_px": 16, "device": CPU, "place": place}
    whole = contents(Feed(scene, "train", store, **settings))
    for among in ([3, 8, 21], [0, 3, 4, 8, 23], list(range(24))):
        ids, images, features, labels = contents(Feed(scene, "train", store, among=among, holdings=shared, **settings))
        assert ids == tuple(f"s{i:03d}" for i in among)
        assert torch.equal(images, whole[1][among])
        assert torch.equal(labels, whole[3][among])
        for tap, feature in features.items():
            assert torch.equal(feature, whole[2][tap][among])


def test_a_part_decodes_no_more_than_it_needs(scene, store, counted):
    decodes, reads = counted
    shared = Holdings()
    for among, expected in (([3, 8], 2), ([3, 8, 9], 3), ([9], 3)):
        feed = Feed(scene, "train", store, taps=("neck",), image_px=16, device=CPU, among=among, holdings=shared)
        assert len(decodes) == sum(decodes.values()) == expected
        assert sum(reads.values()) == expected
        assert feed.description.startswith(f"train: {len(among)} samples;")


def test_images_that_were_decoded_for_another_store_are_still_checked(scene, tmp_path):
    images = scene.source.images.copy()
    images[5, 0, 0, 0] ^= 1
    changed = make_store(tmp_path / "s.zarr", dataclasses.replace(scene, source=Arrays(images)))
    shared, settings = Holdings(), {"image_px": 16, "device": CPU}
    Feed(scene, "train", None, taps=(), holdings=shared, **settings)
    with pytest.raises(RunError, match=r"features of sample 's005' in .* were made from other pixels"):
        Feed(scene, "train", changed, taps=("neck",), holdings=shared, **settings)


def test_a_part_of_the_training_set_is_recorded_and_val_and_test_stay_whole(scene, store, tmp_path):
    sizes = {}
    for fraction in (0.5, 1.0):
        folder = tmp_path / str(fraction)
        report = do(scene, store, folder, options=dataclasses.replace(QUICK, epochs=1, fraction=fraction))
        sizes[fraction] = [line.split(";")[0] for line in report.feeds]
        assert json.loads((folder / "settings.json").read_text())["train"]["fraction"] == fraction
        assert trained_model.load_description(folder).training["fraction"] == fraction
        assert evaluate(folder, scene, store, resamples=10)["n"] == 12
    assert sizes == {0.5: ["train: 12 samples", "val: 12 samples"], 1.0: ["train: 24 samples", "val: 12 samples"]}


def test_shots_are_recorded_and_a_run_without_them_is_that_of_an_earlier_version(scene, store, tmp_path):
    report = do(scene, store, tmp_path / "few", options=dataclasses.replace(QUICK, epochs=1, shots=2))
    assert [line.split(";")[0] for line in report.feeds] == ["train: 4 samples", "val: 12 samples"]
    assert json.loads((tmp_path / "few/settings.json").read_text())["train"]["shots"] == 2
    do(scene, store, tmp_path / "all", options=dataclasses.replace(QUICK, epochs=1))
    assert "shots" not in json.loads((tmp_path / "all/settings.json").read_text())["train"]
    with pytest.raises(DataError, match=r"train.shots is 13, and of some classes there are fewer"):
        do(scene, store, tmp_path / "many", options=dataclasses.replace(QUICK, shots=13))
    assert not (tmp_path / "many").exists()
    with pytest.raises(ConfigError, match=r"shots are 2 and its fraction is 0.5"):
        dataclasses.replace(QUICK, shots=2, fraction=0.5)


def test_seeds_draw_other_parts_and_variants_of_one_seed_the_same(scene, store, tmp_path, monkeypatch):
    seen = []
    original = Feed.__init__

    def note(self, *arguments, among=None, **options):
        if arguments[1] == "train":
            seen.append(tuple(among))
        original(self, *arguments, among=among, **options)

    monkeypatch.setattr(Feed, "__init__", note)
    for model, seed in ((PLAIN, 0), (TINY, 0), (PLAIN, 1)):
        options = dataclasses.replace(QUICK, epochs=1, fraction=0.25, seed=seed)
        train(scene, store, tmp_path / f"{len(seen)}", model=model, options=options)
    assert seen[0] == seen[1] != seen[2]
    assert np.bincount([scene.samples[i].label for i in seen[0]]).tolist() == [3, 3]


def test_what_is_held_already_needs_no_more_memory(scene, store, monkeypatch):
    shared, settings = Holdings(), {"taps": ("neck",), "image_px": 16, "device": CPU}
    Feed(scene, "train", store, holdings=shared, **settings)
    monkeypatch.setattr(feed_module, "free_host_bytes", lambda: 0)
    again = Feed(scene, "train", store, among=[1, 2], holdings=shared, **settings)
    assert again.description.endswith("in host memory")
    assert Feed(scene, "val", store, holdings=shared, **settings).description.endswith("read ahead of each step")


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 5\ninactive_file 250\n"}, 550),
        ({"memory.max": "1000\n", "memory.current": "1700\n"}, 0),
        ({"memory.max": "max\n", "memory.current": "700\n"}, None),
        ({}, None),
    ],
    ids=["with files in memory", "beyond its limit", "without a limit", "no container"],
)
def test_a_container_has_left_what_others_in_it_do_not_use(tmp_path, files, left):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert in_memory._left_in("memory.max", "memory.current", tmp_path) == left


def test_processes_of_a_team_share_the_memory(monkeypatch):
    monkeypatch.setattr(in_memory, "_left_in", lambda *names: 900)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert in_memory.free_host_bytes() == 225
