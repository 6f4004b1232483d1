"""MedMNIST archives, made here and real."""

from __future__ import annotations

import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data import load_medmnist
from pipeline.data.dataset import SPLITS
from pipeline.data.layouts.medmnist_sets import SETS, SIZES_PX
from pipeline.errors import DataError

Arrays = dict[str, npt.NDArray[Any]]


def arrays(shape: tuple[int, ...] = (4, 4), classes: int = 3) -> Arrays:
    rng = np.random.default_rng(0)
    made: Arrays = {}
    for split, count in (("train", 9), ("val", 3), ("test", 5)):
        made[f"{split}_images"] = rng.integers(0, 256, (count, *shape), np.uint8)
        made[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return made


def save(path: Path, content: Arrays, *, compressed: bool = True) -> Path:
    with path.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **content)
    return path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_images_labels_and_splits_are_those_of_the_arrays(
    tmp_path: Path, shape: tuple[int, ...], compressed: bool
) -> None:
    content = arrays(shape)
    made = load_medmnist(save(tmp_path / "own.npz", content, compressed=compressed))
    assert [s.id for s in made.samples][:2] == ["train/000000", "train/000001"]
    assert made.samples[9].id == made.samples[9].group == "val/000000"
    assert made.samples[16].id == "test/000004"
    assert made.class_names == ("class 0", "class 1", "class 2")
    assert made.task == "multiclass"
    assert made.labels.tolist() == np.concatenate([content[f"{s}_labels"][:, 0] for s in SPLITS]).tolist()
    images = np.concatenate([content[f"{s}_images"] for s in SPLITS])
    for i in range(len(made)):
        image = made.read(i)
        assert image.dtype == np.uint8
        assert image.flags.writeable
        np.testing.assert_array_equal(image, images[i] if images[i].ndim == 3 else np.dstack([images[i]] * 3))


def test_masks_come_from_an_archive_of_their_own(tmp_path: Path) -> None:
    path, masks = save(tmp_path / "own.npz", arrays()), Arrays()
    for split, count in (("train", 9), ("val", 3), ("test", 5)):
        masks[f"{split}_masks"] = np.random.default_rng(1).integers(0, 2, (count, 6, 8), np.uint8) * 255
    made = pickle.loads(pickle.dumps(load_medmnist(path, masks=save(tmp_path / "masks.npz", masks))))
    found = [made.mask(i) for i in range(len(made))]
    np.testing.assert_array_equal(np.stack(found), np.concatenate([masks[f"{s}_masks"] for s in SPLITS]) == 255)
    assert load_medmnist(path).mask(0) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_masks": np.zeros((2, 4, 4), np.uint8)}, r"masks\.npz: val has 2 masks, and .*own\.npz 3 images"),
        (
            {"val_masks": np.zeros((3, 4, 4), np.float32)},
            r"val_masks is float32 \(3, 4, 4\); expected integers or bool",
        ),
        ({"val_masks": np.zeros(3, np.uint8)}, r"val_masks is uint8 \(3,\); expected integers or bool \(n, H, W\)"),
        ({"val_masks": None}, "no array 'val_masks'"),
    ],
)
def test_masks_of_other_images_are_refused(tmp_path: Path, change: Arrays, message: str) -> None:
    masks = {
        f"{split}_masks": np.zeros((count, 4, 4), np.uint8) for split, count in zip(SPLITS, (9, 3, 5), strict=True)
    }
    content = {name: array for name, array in {**masks, **change}.items() if array is not None}
    path = save(tmp_path / "own.npz", arrays())
    with pytest.raises(DataError, match=message):
        load_medmnist(path, masks=save(tmp_path / "masks.npz", content))


def test_labels_of_several_columns_are_multilabel(tmp_path: Path) -> None:
    content = arrays()
    for split in SPLITS:
        count = len(content[f"{split}_images"])
        content[f"{split}_labels"] = (np.arange(count)[:, None] >> np.arange(3) & 1).astype(np.uint8)
    made = load_medmnist(save(tmp_path / "own.npz", content))
    assert made.task == "multilabel"
    assert made.samples[5].label == (1, 0, 1)
    assert made.labels.shape == (17, 3)


@pytest.mark.parametrize("name", ["retinamnist", "retinamnist_128"])
def test_an_official_name_brings_task_and_class_names(tmp_path: Path, name: str) -> None:
    made = load_medmnist(save(tmp_path / f"{name}.npz", arrays(classes=5)), class_names=())
    assert made.task == "ordinal"
    assert made.class_names == ("0", "1", "2", "3", "4")


def test_names_and_task_can_be_given(tmp_path: Path) -> None:
    made = load_medmnist(save(tmp_path / "own.npz", arrays()), class_names=("x", "y", "z"), task="ordinal")
    assert (made.class_names, made.task) == (("x", "y", "z"), "ordinal")


def test_it_reads_from_many_threads_and_processes(tmp_path: Path) -> None:
    content = arrays()
    made = load_medmnist(save(tmp_path / "own.npz", content))
    again = pickle.loads(pickle.dumps(made))
    expected = [made.read(i).tolist() for i in range(17)]
    with ThreadPoolExecutor(8) as pool:
        assert [image.tolist() for image in pool.map(again.read, range(17))] == expected


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    made = load_medmnist(save(tmp_path / "own.npz", arrays()))
    made.read(0)
    assert not list(scratch.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"own\.npz: val cannot be unpacked .*MiB are needed in .*gone; make room"):
        made.read(9)


def test_a_stamp_names_archive_and_row(tmp_path: Path) -> None:
    path = save(tmp_path / "own.npz", arrays())
    made = load_medmnist(path)
    stamps = {made.stamp(i) for i in range(17)}
    assert len(stamps) == 17
    assert str(tmp_path) not in str(stamps)
    save(path, arrays(classes=2))
    assert not stamps & {made.stamp(i) for i in range(17)}
    path.unlink()
    assert made.stamp(0) is None


def test_a_missing_archive_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"breastmnist\.npz: there is no such file; `pipeline prepare` fetches it"):
        load_medmnist(tmp_path / "breastmnist.npz")


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "own.npz", arrays())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"own\.npz: .* cannot be read .*fetch it again"):
        load_medmnist(path)


def test_a_flipped_byte_in_the_images_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "own.npz", arrays((32, 32)), compressed=False)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    made = load_medmnist(path)
    with pytest.raises(DataError, match=r"'train_images' cannot be read .*CRC"):
        made.read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_images": None}, "the archive has no array 'val_images'"),
        ({"val_images": np.zeros((3, 4, 4), np.float32)}, r"val_images is float32 \(3, 4, 4\); expected uint8"),
        ({"val_images": np.zeros((3, 4, 4, 4), np.uint8)}, r"val_images is uint8 \(3, 4, 4, 4\)"),
        ({"val_images": np.zeros((2, 4, 4), np.uint8)}, "val has 2 images and 3 labels"),
        ({"val_labels": np.zeros((3, 1), np.float32)}, r"val_labels is float32 \(3, 1\); expected integers"),
        ({"val_labels": np.array([[None]] * 3)}, "'val_labels' cannot be read .*allow_pickle"),
        ({"val_labels": np.full((3, 1), 7)}, "train has no sample of|no sample belongs to"),
    ],
)
def test_an_archive_of_another_layout_is_refused(tmp_path: Path, change: Arrays, message: str) -> None:
    content = {key: value for key, value in {**arrays(), **change}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        load_medmnist(save(tmp_path / "own.npz", content))


def test_the_official_table_is_complete() -> None:
    digests = [md5 for known in SETS.values() for md5 in known.md5]
    assert len(set(digests)) == len(digests) == 12 * len(SIZES_PX)
    assert all(len(md5) == 32 and int(md5, 16) for md5 in digests)
    assert {name for name, known in SETS.items() if known.task == "binary"} == {"breastmnist", "pneumoniamnist"}
    assert len(SETS["chestmnist"].class_names) == 14


@pytest.mark.parametrize(
    ("name", "counts", "classes", "task"),
    [
        ("breastmnist", (546, 78, 156), ("malignant", "normal, benign"), "binary"),
        ("breastmnist_224", (546, 78, 156), ("malignant", "normal, benign"), "binary"),
        ("retinamnist", (1080, 120, 400), ("0", "1", "2", "3", "4"), "ordinal"),
        ("pneumoniamnist", (4708, 524, 624), ("normal", "pneumonia"), "binary"),
    ],
)
def test_real_archives(
    real_data: Path, name: str, counts: tuple[int, ...], classes: tuple[str, ...], task: str
) -> None:
    made = load_medmnist(real_data / f"{name}.npz")
    assert tuple(len(made.indices(split)) for split in ("train", "val", "test")) == counts
    assert (made.class_names, made.task) == (classes, task)
    with np.load(real_data / f"{name}.npz") as archive:
        for split in ("train", "test"):
            first = made.indices(split)[0]
            stored = archive[f"{split}_images"][3]
            np.testing.assert_array_equal(made.read(first + 3), stored if stored.ndim == 3 else np.dstack([stored] * 3))
            assert made.labels[made.indices(split)].tolist() == archive[f"{split}_labels"][:, 0].tolist()
