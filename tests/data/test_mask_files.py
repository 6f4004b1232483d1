"""Masks that lie among the images of a folder: found by their names, merged, and never taken for images."""

from __future__ import annotations

import fnmatch
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import load_folder
from pipeline.data.guess import guess_masks
from pipeline.data.layouts.mask_files import masks_of
from pipeline.errors import ConfigError, DataError

BUSI = "{stem}_mask*.png"


def write(path: Path, pixels: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, np.uint8)).save(path)


@pytest.fixture
def busi(tmp_path: Path) -> Path:
    """The way BUSI comes, with images of two and of three masks, and normal ones whose mask is empty."""
    root = tmp_path / "Dataset_BUSI_with_GT"
    for name in ("benign", "malignant", "normal"):
        for number in (*range(1, 13), 100):
            stem = root / name / f"{name} ({number})"
            write(stem.with_name(f"{stem.name}.png"), [[number, 1], [1, 1]])
            write(stem.with_name(f"{stem.name}_mask.png"), [[0, 0], [0, 255 * (name != "normal")]])
    write(root / "benign/benign (4)_mask_1.png", [[255, 0], [0, 0]])
    write(root / "malignant/malignant (1)_mask_1.png", [[0, 255], [0, 0]])
    write(root / "malignant/malignant (1)_mask_2.png", [[0, 0], [255, 0]])
    return root


def test_masks_beside_images_are_theirs_and_no_samples(busi: Path) -> None:
    made = load_folder(busi, draw="balanced", masks=BUSI)
    assert len(made) == 39
    assert not [sample.id for sample in made.samples if "mask" in sample.id]
    masks = {sample.id: made.mask(i) for i, sample in enumerate(made.samples)}
    assert masks["benign/benign (1).png"].tolist() == [[False, False], [False, True]]
    assert masks["benign/benign (4).png"].tolist() == [[True, False], [False, True]]
    assert masks["malignant/malignant (1).png"].tolist() == [[False, True], [True, True]]
    assert masks["malignant/malignant (100).png"].tolist() == [[False, False], [False, True]]
    assert not masks["normal/normal (12).png"].any()
    assert made.ignored == {}
    assert len(load_folder(busi, draw="balanced")) == 81  # what a person gets who does not say what the masks are


def test_files_to_skip_are_no_samples_and_are_counted(busi: Path) -> None:
    by_name = load_folder(busi, draw="balanced", skip=["*_mask*"])
    by_path = load_folder(busi, draw="balanced", skip=["*/*_mask.png", "*_mask_?.png"])
    assert by_name.samples == by_path.samples == load_folder(busi, draw="balanced", masks=BUSI).samples
    assert by_name.ignored == by_path.ignored == {".png": 42}
    assert by_name.mask(0) is None


def test_masks_in_a_folder_beside_that_of_the_images(tmp_path: Path) -> None:
    for name in ("COVID", "Normal"):
        for number in range(20):
            write(tmp_path / name / "images" / f"{name}-{number}.png", [[7]])
            write(tmp_path / name / "masks" / f"{name}-{number}.png", [[number % 2]])
    made = load_folder(tmp_path, masks="../masks/{stem}.png")
    assert len(made) == 40
    assert {sample.id.split("/")[1] for sample in made.samples} == {"images"}
    assert made.samples[1].id == "COVID/images/COVID-1.png"
    assert made.mask(1).tolist() == [[True]]


def test_an_image_without_a_mask_has_none(busi: Path) -> None:
    (busi / "normal/normal (1)_mask.png").unlink()
    made = load_folder(busi, draw="balanced", masks=BUSI)
    assert [s.id for i, s in enumerate(made.samples) if made.mask(i) is None] == ["normal/normal (1).png"]


def test_a_pattern_that_finds_nothing_says_what_it_looked_for(busi: Path) -> None:
    said = r"no image has a mask by the pattern '\{stem\}-seg\.png' .* beside 'benign/benign \(1\)\.png' it would be "
    with pytest.raises(DataError, match=said + r"'benign \(1\)-seg\.png'"):
        load_folder(busi, draw="balanced", masks="{stem}-seg.png")


@pytest.mark.parametrize("pattern", ["*_mask.png", "mask.png", "*{stem}.png", "{stem}/mask.png", "{stem}_{stem}.png"])
def test_a_pattern_that_is_none_is_refused(busi: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.masks: got '.*', expected \{stem\} once .* '\{stem\}_mask\*\.png'"):
        load_folder(busi, draw="balanced", masks=pattern)


def test_masks_of_one_image_that_differ_in_size_are_an_error(busi: Path) -> None:
    write(busi / "benign/benign (4)_mask_1.png", [[255, 0, 0]])
    made = load_folder(busi, draw="balanced", masks=BUSI)
    index = [sample.id for sample in made.samples].index("benign/benign (4).png")
    with pytest.raises(DataError, match=r"'benign/benign \(4\)_mask_1\.png' .* differ in size, 2 x 2 and 1 x 3"):
        made.mask(index)


def test_masks_are_guessed_where_most_images_have_one(busi: Path) -> None:
    names = [sample.id for sample in load_folder(busi, draw="balanced").samples]
    assert guess_masks(names) == ("{stem}_mask*", 42)
    assert guess_masks([name for name in names if "mask" not in name]) is None
    assert guess_masks([f"c/images/{i}.png" for i in range(30)] + [f"c/masks/{i}.png" for i in range(30)]) == (
        "../masks/{stem}.*",
        30,
    )
    assert guess_masks([*(f"a/{i}.png" for i in range(9)), "a/1_mask.png"]) is None


def slow(names: list[str], tail: str) -> dict[str, tuple[str, ...]]:
    """Every pair of files compared."""
    found = {}
    for name in names:
        start = name.rsplit(".", 1)[0]
        of_it = [o for o in names if o != name and o.startswith(start) and fnmatch.fnmatch(o[len(start) :], tail)]
        found[name] = tuple(sorted(o for o in of_it if "/" not in o[len(start) :]))
    taken = {mask for masks in found.values() for mask in masks}
    return {name: masks for name, masks in found.items() if name not in taken}


def test_the_search_by_halves_finds_what_comparing_every_pair_does() -> None:
    draw = random.Random(0)
    most = 0
    for _ in range(200):
        names = {
            f"{draw.choice('ab')}/{draw.choice(['1', '10', 'x', 'x (1)', 'x[1]', '_'])}{end}.png"
            for end in draw.choices(["", "_mask", "_mask_1", "_mask_mask", "0", "_x/y_mask"], k=12)
        }
        tail = draw.choice(["_mask*.png", "_mask.png", "_mask_?.png", "*.png"])
        made = masks_of(sorted(names), "{stem}" + tail)
        assert made == slow(sorted(names), tail)
        most = max(most, max(map(len, made.values()), default=0))
    assert most > 2
