"""Every layout is loaded by its name and plain values."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from pipeline.config.schema import CsvData, DemoData, FolderData, MedMnistData, SplitRule, StoreData
from pipeline.data import Dataset, Reading, load_dataset
from pipeline.errors import ConfigError, DataError

SECTIONS = (DemoData, MedMnistData, FolderData, CsvData)
LAYOUTS = [get_args(section.model_fields["layout"].annotation)[0] for section in SECTIONS]
OPTIONS = {
    "name": "breastmnist", "masks": None, "group_pattern": None, "images": Path("images"), "path_column": "file",
    "split": {"val": 0.15, "test": 0.25, "seed": 0, "draw": "steady"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_configuration_has_its_loader(tmp_path: Path, layout: str) -> None:
    wanted = {
        "csv": ("path_column", "images", "split"),
        "folder": ("group_pattern", "split"),
        "medmnist": ("name", "masks"),
    }
    options = {key: OPTIONS[key] for key in wanted.get(layout, ())}
    with pytest.raises(DataError):  # of the loader: there is nothing at that place
        load_dataset(layout, path=tmp_path / "nothing", reading=Reading(), **options)


def test_other_numbers_of_images_than_expected_are_an_error_in_every_layout(tmp_path: Path) -> None:
    for split, count in (("Training", 40), ("Testing", 5)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (2, 2), i).save(tmp_path / split / name / f"{split}{i}.png")

    def load(expect: dict[str, int] | None, path: Path = tmp_path, only_test: bool = False) -> Dataset:
        options = {"group_pattern": None, "split": OPTIONS["split"]}
        return load_dataset("folder", path=path, reading=Reading(), expect=expect, only_test=only_test, **options)

    made = load({"train": 80, "test": 10, "all": 90})
    assert made.val_drawn  # from the 80
    assert 0 < len(made.indices("val")) < 40
    assert len(load({"train": 80, "test": 10}, only_test=True).indices("val")) == 0
    assert load({}).samples == load(None).samples == made.samples
    said = (
        r"expected 251 in train and found 80, 66 in test and found 10 images \(data\.expect\)\. Look whether the "
        r"download is whole .* --set data\.expect=null"
    )
    with pytest.raises(DataError, match=said):
        load({"train": 251, "test": 66})
    with pytest.raises(DataError, match="expected 91 in all and found 90"):
        load({"all": 91})
    with pytest.raises(DataError, match=r"data\.expect names test, train, and this data set has no splits of its own"):
        load({"train": 60, "test": 20}, tmp_path / "Training")
    assert len(load({"all": 80}, tmp_path / "Training")) == 80
    assert all("expect" in section.model_fields for section in (*SECTIONS, StoreData))


def test_an_unknown_layout_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="no layout 'dicomdir'; valid: demo, folder, csv, medmnist"):
        load_dataset("dicomdir", path=Path(), reading=Reading())


def test_the_positive_class_is_named_in_every_layout_and_checked(tmp_path: Path) -> None:
    for name in ("benign", "malignant"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    options = {"group_pattern": None, "split": {"val": 0.0, "test": 0.25, "seed": 0, "draw": "steady"}}

    def load(**named: str | None):
        return load_dataset("folder", path=tmp_path, reading=Reading(), **options, **named)

    assert load().positive_class == 1
    named = load(positive="benign")
    assert named.positive_class == 0
    assert (named.class_names, named.samples) == (load().class_names, load().samples)
    with pytest.raises(DataError, match=r"data\.positive is 'Malignant', .* did you mean 'malignant'"):
        load(positive="Malignant")
    assert all("positive" in section.model_fields for section in SECTIONS)


def test_nothing_is_drawn_where_the_configuration_says_so(tmp_path: Path) -> None:
    """One patient a class: every draw would leave some split without a class."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (2, 2), i).save(tmp_path / name / f"{name}_{i}.png")
    section = FolderData(layout="folder", path=str(tmp_path), group_pattern="^(.)", split=SplitRule(draw=None))
    made = load_dataset(**section.model_dump(exclude={"reading"}), reading=Reading())
    assert [sample.split for sample in made.samples] == ["test"] * 6
    assert made.drawn is None
