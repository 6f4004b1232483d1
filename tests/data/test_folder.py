"""Folders of classes, with splits of their own and without."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import Dataset, Reading, Split, load_folder
from pipeline.data.dataset import Draw
from pipeline.data.named import images_named
from pipeline.errors import DataError


def write(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 3), value, np.uint8)).save(path)


def classes(root: Path, per_class: int = 10) -> None:
    for name in ("b", "a"):
        for i in range(per_class):
            write(root / name / f"{i // 2}_{i}.png", i)


def test_classes_are_numbered_by_name_and_splits_drawn(tmp_path: Path) -> None:
    classes(tmp_path)
    made = load_folder(tmp_path, draw="balanced")
    assert made.class_names == ("a", "b")
    assert made.task == "binary"
    assert [s.id for s in made.samples] == sorted(s.id for s in made.samples)
    assert [s.label for s in made.samples] == [0] * 10 + [1] * 10
    assert made.samples[3].id == "a/1_3.png"
    assert made.samples[3].group == "a/1_3.png"
    assert made.read(3).tolist() == np.full((2, 3, 3), 3).tolist()
    assert Counter(s.label for s in made.samples if s.split == "train") == {0: 6, 1: 6}
    assert Counter(s.label for s in made.samples if s.split in ("val", "test")) == {0: 4, 1: 4}
    assert made.drawn == "balanced"


def test_images_that_come_go_or_get_another_name_move_no_other(tmp_path: Path) -> None:
    classes(tmp_path, per_class=40)
    before = {s.id: s.split for s in load_folder(tmp_path).samples}
    write(tmp_path / "a" / "new.png")
    write(tmp_path / "c" / "of_a_new_class.png")
    for i in range(30):
        write(tmp_path / "c" / f"{i}.png")
    (tmp_path / "b" / "3_7.png").unlink()
    (tmp_path / "b" / "3_6.png").rename(tmp_path / "b" / "renamed.png")
    after = {s.id: s.split for s in load_folder(tmp_path).samples}
    kept = before.keys() - {"b/3_7.png", "b/3_6.png"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert len(after) == len(kept) + 33


def test_a_pattern_on_the_file_name_keeps_patients_together(tmp_path: Path) -> None:
    classes(tmp_path, per_class=20)
    made = load_folder(tmp_path, group_pattern=r"^(\d+)_")
    splits: dict[str, set[str]] = {}
    for sample in made.samples:
        assert sample.group == Path(sample.id).name.split("_")[0]
        splits.setdefault(sample.group, set()).add(sample.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {s.split for s in made.samples} == {"train", "val", "test"}
    assert load_folder(tmp_path, group_pattern=r"^\d+").samples == made.samples


def test_what_is_no_image_of_a_class_is_counted_by_suffix(tmp_path: Path) -> None:
    classes(tmp_path)
    for name in ("a/x.heic", "b/deep/y.HEIC", "b/z.gif", "labels.csv", "README", "stray.png", ".hidden", "a/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    made = load_folder(tmp_path)
    assert len(made) == 20
    assert made.ignored == {".heic": 2, ".gif": 1, ".csv": 1, "no suffix": 1, ".png": 1}


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    classes(tmp_path)
    assert load_folder(tmp_path, seed=4).samples == load_folder(tmp_path, seed=4).samples
    assert load_folder(tmp_path, seed=4).samples != load_folder(tmp_path, seed=5).samples


def test_folders_of_splits_are_recognised_in_their_usual_spellings(tmp_path: Path) -> None:
    for split in ("Train", "validation", "test"):
        for name in ("x", "y", "z"):
            write(tmp_path / split / name / f"{split}.png")
    made = load_folder(tmp_path)
    assert made.class_names == ("x", "y", "z")
    assert made.task == "multiclass"
    assert [(s.id, s.split, s.label) for s in made.samples[2:5]] == [
        ("Train/z/Train.png", "train", 2),
        ("validation/x/validation.png", "val", 0),
        ("validation/y/validation.png", "val", 1),
    ]


def brain(root: Path) -> None:
    """The way the brain tumour MRI come: no val, and two images of each patient."""
    for split, patients in (("Training", 20), ("Testing", 6)):
        for name in ("glioma", "meningioma", "notumor", "pituitary"):
            for i in range(2 * patients):
                write(root / split / name / f"{split[:2]}{name}{i // 2}_{i}.jpg", i)


@pytest.mark.parametrize("draw", ["steady", "balanced"])
def test_val_is_drawn_from_train_where_the_splits_are_train_and_test_alone(tmp_path: Path, draw: Draw) -> None:
    brain(tmp_path)
    fractions: dict[Split, float] = {"val": 0.3, "test": 0.25}

    def load(seed: int) -> Dataset:
        return load_folder(tmp_path, group_pattern=r"^([^_]+)_", fractions=fractions, draw=draw, seed=seed)

    made = load(1)
    assert {s.id for s in made.samples if s.split == "test"} == {s.id for s in made.samples if "Testing" in s.id}
    found = Counter(s.split for s in made.samples)
    assert found["train"] + found["val"] == 160
    assert 0.2 * 160 < found["val"] < 0.4 * 160
    assert {s.label for s in made.samples if s.split == "val"} == {0, 1, 2, 3}
    splits: dict[str, set[str]] = {}
    for sample in made.samples:
        splits.setdefault(sample.group, set()).add(sample.split)
    assert all(len(of_group) == 1 for of_group in splits.values())
    assert load(1).samples == made.samples != load(2).samples
    assert (made.drawn, made.val_drawn) == (None, True)


def test_val_is_not_drawn_where_it_is_there_or_not_wanted(tmp_path: Path) -> None:
    brain(tmp_path)
    for options in ({"draw": None}, {"fractions": {"val": 0.0, "test": 0.25}}):
        made = load_folder(tmp_path, **options)  # type: ignore[arg-type]
        assert Counter(s.split for s in made.samples) == {"train": 160, "test": 48}
        assert not made.val_drawn
    for name in ("glioma", "meningioma", "notumor", "pituitary"):
        write(tmp_path / "Validation" / name / "a.jpg")
    made = load_folder(tmp_path)
    assert Counter(s.split for s in made.samples) == {"train": 160, "val": 4, "test": 48}
    assert not made.val_drawn


def test_other_files_are_passed_over_and_deeper_ones_found(tmp_path: Path) -> None:
    classes(tmp_path)
    write(tmp_path / "a" / "study" / "deep.TIF")
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"x")
    write(tmp_path / ".cache" / "c" / "0.png")
    write(tmp_path / "a" / ".cache" / "0.png")
    made = load_folder(tmp_path)
    assert len(made) == 21
    assert "a/study/deep.TIF" in [s.id for s in made.samples]


def test_the_reading_rule_reaches_the_pixels_and_the_stamp(tmp_path: Path) -> None:
    classes(tmp_path)
    Image.fromarray(np.array([[100, 300]], np.uint16)).save(tmp_path / "a" / "0_0.png")
    plain, stretched = load_folder(tmp_path), load_folder(tmp_path, reading=Reading("percentile", (0, 100)))
    assert plain.read(0)[0, :, 0].tolist() == [0, 1]
    assert stretched.read(0)[0, :, 0].tolist() == [0, 255]
    assert plain.stamp(0) != stretched.stamp(0)


def test_a_stamp_changes_with_the_file_and_only_then(tmp_path: Path) -> None:
    classes(tmp_path)
    made = load_folder(tmp_path)
    before = [made.stamp(i) for i in range(len(made))]
    assert len(set(before)) == len(made)
    assert [made.stamp(i) for i in range(len(made))] == before
    os.utime(tmp_path / "a" / "0_0.png", ns=(1, 1))
    write(tmp_path / "a" / "0_1.png", 77)
    (tmp_path / "a" / "1_2.png").unlink()
    after = [made.stamp(i) for i in range(len(made))]
    assert [i for i in range(len(made)) if after[i] != before[i]] == [0, 1, 2]
    assert after[2] is None
    assert str(tmp_path) not in str(after)


def test_files_of_one_size_and_time_that_change_places_have_other_stamps(tmp_path: Path) -> None:
    classes(tmp_path)
    first, second = (tmp_path / "a" / f"swapped_{i}.bmp" for i in range(2))
    for value, path in enumerate((first, second)):
        write(path, value)
        os.utime(path, (1, 1))
    made = load_folder(tmp_path)
    numbers = [i for i, sample in enumerate(made.samples) if "swapped" in sample.id]
    before = [made.stamp(i) for i in numbers]
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert not {made.stamp(i) for i in numbers} & set(before)


def test_it_travels_to_other_processes(tmp_path: Path) -> None:
    classes(tmp_path)
    made = load_folder(tmp_path)
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert np.array_equal(again.read(5), made.read(5))


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"/c: the class has no image \(\.png.*add some or remove the folder"):
        load_folder(tmp_path)


def test_a_class_that_only_val_has_is_refused(tmp_path: Path) -> None:
    for name in ("train/x/1.png", "train/y/1.png", "val/x/2.png", "val/z/2.png"):
        write(tmp_path / name)
    with pytest.raises(DataError, match=r"train has no sample of 'z \(val 1, test 0\)'"):
        load_folder(tmp_path)


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train/x/7_1.png", "train/y/8_1.png", "test/x/7_2.png", "test/y/9_1.png"):
        write(tmp_path / name)
    assert len(load_folder(tmp_path)) == 4
    with pytest.raises(DataError, match=r"1 groups lie in more than one split: '7 \(train, test\)'"):
        load_folder(tmp_path, group_pattern=r"^\d+")


def test_linked_folders_are_followed_at_any_depth_and_loops_are_refused(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    classes(root)
    for name in ("7_0.png", "deep/7_1.png"):
        write(elsewhere / name)
    (root / "a/linked").symlink_to(elsewhere)
    added = {"a/linked/7_0.png", "a/linked/deep/7_1.png"}
    assert {sample.id for sample in load_folder(root).samples} >= added
    assert {f"{root}/{name}" for name in added} < set(images_named([str(root)]))
    (elsewhere / "deep/back").symlink_to(root / "a")
    for look in (lambda: load_folder(root), lambda: images_named([str(root)])):
        with pytest.raises(DataError, match="/back' links to a folder that it lies in"):
            look()


def test_what_is_no_such_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder; expected class/image or split/class/image"):
        load_folder(tmp_path / "gone")
    for masks in (None, "{stem}_mask.png"):
        with pytest.raises(DataError, match="there are no samples"):
            load_folder(tmp_path, masks=masks)
    write(tmp_path / "train" / "x" / "1.png")
    write(tmp_path / "tumour" / "1.png")
    with pytest.raises(DataError, match="beside splits there are other folders: 'tumour'"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"'\(' is no regular expression"),
        (r"^p(\d+)", r"does not match 4 names: 'a/0_0\.png', 'a/0_1\.png'"),
        (r"^(?:p(\d+)|\d+)_", r"does not match 4 names: 'a/0_0\.png', 'a/0_1\.png'"),
    ],
)
def test_a_pattern_that_names_no_group_is_refused(tmp_path: Path, pattern: str, message: str) -> None:
    classes(tmp_path, per_class=2)
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path, group_pattern=pattern)


def test_real_chest_x_rays(real_data: Path) -> None:
    made = load_folder(real_data / "nih_cxr", group_pattern=r"^(\d+)_", draw="balanced")
    assert made.class_names == ("No_findings", "Pneumonia")
    assert len(made) == 40
    assert Counter((s.label, s.split) for s in made.samples) == Counter(
        {(k, split): n for k in (0, 1) for split, n in (("train", 12), ("val", 3), ("test", 5))}
    )
    assert made.samples[0].group == "00001308"
    assert made.read(0).shape == (1024, 1024, 3)
