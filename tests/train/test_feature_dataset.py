"""`FeatureDataset` under torch's own `DataLoader`: every row once, right, with its image and label, in any worker."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader

import cache
import pipeline
from pipeline.data import pixel_digest, read_image
from pipeline.data.resize import squared
from pipeline.errors import DataError
from pipeline.image_tap import specify

COUNT = 13
LABELS = cache.Labels(
    ("benign", "malignant"),
    tuple(i % 2 for i in range(COUNT)),
    tuple("test" if i > 9 else "train" for i in range(COUNT)),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    (folder / "sub").mkdir()
    for i in range(COUNT):
        Pillow.fromarray(random.integers(0, 255, (20, 30 + i, 3), np.uint8)).save(folder / name(i))
    return folder


def name(number: int) -> str:
    return f"sub/{number:02d}.png"


def make(path: Path, images: Path, *, labels: cache.Labels | None = LABELS, image_px: int | None = None) -> Path:
    """A store of random features for the images."""
    random = np.random.default_rng(1)
    taps = {"neck": cache.TapSpec(3, 4, 4, "float16"), "late": cache.TapSpec(2, 4, 4, "float32"), **specify(image_px)}
    pixels = [read_image(images / name(i)) for i in range(COUNT)]
    rows = [cache.Row(name(i), pixel_digest(image)) for i, image in enumerate(pixels)]
    options = {"fingerprint": cache.Fingerprint({"encoder": "random"}), "taps": taps, "rows": rows, "labels": labels}
    with cache.create_store(path, **options) as writer:
        for plan in writer.pending:
            features = {
                tap: random.standard_normal((len(plan.rows), *spec.shape)).astype(spec.dtype)
                for tap, spec in taps.items()
            }
            if image_px:
                features["image"] = np.stack([squared(pixels[row], image_px).numpy() for row in plan.rows])
            extents = np.array([[20 / (30 + row), 1] for row in plan.rows], np.float32)
            writer.write(plan, features, extents=extents)
        writer.commit()
    return path


@pytest.fixture(scope="module")
def path(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("store") / "store.zarr", images)


def mean_of(sample_id: str) -> float:
    """What a function may give for an image; at the top of a module, so that it pickles."""
    return float(int(sample_id[4:6]))


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_a_loader_gives_every_row_once_and_right(path: Path, images: Path, context: str | None) -> None:
    torch.manual_seed(0)
    dataset = pipeline.FeatureDataset(path, images, image_px=16)
    count = {None: 0, "fork": 2, "spawn": 1}[context]  # one that is spawned imports torch for seconds
    workers = {"num_workers": count, "multiprocessing_context": context} if count else {}
    loader = DataLoader(dataset, batch_size=4, shuffle=True, **workers)
    store, seen = cache.open_store(path), []
    for batch in loader:
        wanted = store[batch["id"]]
        for tap in ("neck", "late"):
            np.testing.assert_array_equal(batch["features"][tap], wanted[tap])
        rows = [store.ids.index(sample_id) for sample_id in batch["id"]]
        np.testing.assert_array_equal(batch["extents"], store.extents[rows])
        assert batch["label"].dtype == torch.int64
        assert batch["label"].tolist() == [LABELS.labels[row] for row in rows]
        for image, sample_id in zip(batch["image"], batch["id"], strict=True):
            assert torch.equal(image, squared(read_image(images / sample_id), 16))
        seen += batch["id"]
    assert sorted(seen) == sorted(store.ids)
    assert seen != list(store.ids)


def test_a_batch_is_one_read_of_the_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = cache.Store.read

    def counted(store, rows, *arguments, **options):
        reads.append(len(rows))
        return read(store, rows, *arguments, **options)

    monkeypatch.setattr(cache.Store, "read", counted)
    assert len(list(DataLoader(pipeline.FeatureDataset(path), batch_size=5))) == 3
    assert reads == [5, 5, 3]


def test_a_split_and_taps_can_be_chosen(path: Path) -> None:
    dataset = pipeline.FeatureDataset(cache.open_store(path), split="test", taps=["late"])
    assert dataset.ids == tuple(map(name, (10, 11, 12)))
    assert dataset.class_names == ("benign", "malignant")
    item = dataset[-1]
    assert set(item) == {"id", "features", "extents", "label"}
    assert set(item["features"]) == {"late"}
    assert item["id"] == name(12)
    assert [item["id"] for item in dataset] == list(dataset.ids)  # by index until there is none
    assert "3 samples of late, label" in repr(dataset)


@pytest.mark.parametrize(
    "labels", [[10 * i for i in range(COUNT)], {name(i): 10 * i for i in range(COUNT)}, np.arange(COUNT) * 10]
)
def test_labels_of_ones_own_come_by_row_or_by_id(path: Path, labels) -> None:
    dataset = pipeline.FeatureDataset(path, labels=labels, split="test")
    assert dataset.labels.tolist() == [100, 110, 120]
    assert dataset[1]["label"] == 110


def test_several_labels_at_once(images: Path, tmp_path: Path) -> None:
    labels = cache.Labels(("a", "b"), tuple((i % 2, 1) for i in range(COUNT)), ("train",) * COUNT)
    (batch,) = DataLoader(pipeline.FeatureDataset(make(tmp_path / "store.h5", images, labels=labels)), batch_size=COUNT)
    assert batch["label"].tolist() == [[i % 2, 1] for i in range(COUNT)]


def test_without_labels_and_images_there_are_none(images: Path, tmp_path: Path) -> None:
    dataset = pipeline.FeatureDataset(make(tmp_path / "store.zarr", images, labels=None))
    assert set(dataset[0]) == {"id", "features", "extents"}
    assert dataset.class_names is None
    with pytest.raises(DataError, match="no split 'train': no labels travel with it"):
        pipeline.FeatureDataset(tmp_path / "store.zarr", split="train")


def test_images_may_come_from_the_store_or_a_function(images: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "store.zarr", images, image_px=24)
    dataset = pipeline.FeatureDataset(path)
    assert torch.equal(dataset[3]["image"], squared(read_image(images / name(3)), 24))
    assert set(dataset[3]["features"]) == {"neck", "late"}
    own = pipeline.FeatureDataset(path, mean_of)
    found = DataLoader(pickle.loads(pickle.dumps(own)), batch_size=COUNT)
    assert next(iter(found))["image"].tolist() == [float(i) for i in range(COUNT)]


def test_images_with_other_pixels_are_refused(path: Path, images: Path, tmp_path: Path) -> None:
    for i in range(COUNT):
        (tmp_path / name(i)).parent.mkdir(exist_ok=True)
        (tmp_path / name(i)).write_bytes((images / name((i + 1) % COUNT)).read_bytes())
    with pytest.raises(DataError, match="were made from other pixels"):
        pipeline.FeatureDataset(path, tmp_path)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": "elsewhere"}, "no file 'sub/00.png', the first sample"),
        ({"labels": [0, 1]}, "2 labels for 13 rows"),
        ({"labels": {name(0): 1}}, "12 samples have no label, 'sub/01.png' for one"),
        ({"taps": ["early"]}, "no tap 'early'; it has neck, late"),
        ({"split": "val"}, "no split 'val': it knows test, train"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_store_is_refused(path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        pipeline.FeatureDataset(path, **options)


def test_damage_reaches_the_loop_from_a_worker(images: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "store.zarr", images)
    shard = path / "neck/c.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 4
    shard.write_bytes(content)
    loader = DataLoader(pipeline.FeatureDataset(path), batch_size=4, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(cache.DamagedRowError, match=r"sub/00\.png"):
        list(loader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only there is memory pinned")
def test_batches_are_pinned(path: Path) -> None:
    loader = DataLoader(pipeline.FeatureDataset(path), batch_size=4, num_workers=2, pin_memory=True)
    for batch in loader:
        assert batch["features"]["neck"].is_pinned()
        assert batch["label"].is_pinned()
