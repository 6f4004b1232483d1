"""CSV tables as people keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import load_csv
from pipeline.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight images, 001.png to 008.png, each of its own grey."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(1, 9):
        Image.fromarray(np.full((2, 2), i, np.uint8)).save(root / f"{i:03d}.png")
    return root


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_found_by_name_and_ids_stay_text(tmp_path: Path, images: Path) -> None:
    table = write(
        tmp_path,
        "\ufeffage,image,finding,set,patient\n"
        '61,"001","benign, cystic",train,"0007"\n'
        '50,"002",malignant,Training,"0008"\n'
        '44,"003",malignant,valid,"7"\n'
        '39,"004","benign, cystic",TEST,"8"\n',
    )
    made = load_csv(
        table,
        root=images,
        path_column="image",
        label_column="finding",
        split_column="set",
        group_column="patient",
        suffix=".png",
    )
    assert made.class_names == ("benign, cystic", "malignant")
    assert made.task == "binary"
    assert [(s.id, s.label, s.split, s.group) for s in made.samples] == [
        ("001", 0, "train", "0007"),
        ("002", 1, "train", "0008"),
        ("003", 1, "val", "7"),
        ("004", 0, "test", "8"),
    ]
    assert [made.read(i)[0, 0, 0] for i in range(4)] == [1, 2, 3, 4]


def test_numeric_classes_are_in_the_order_of_their_values(tmp_path: Path, images: Path) -> None:
    table = write(tmp_path, "f,grade\n001.png,10\n002.png,2\n003.png,0\n")
    made = load_csv(
        table, root=images, path_column="f", label_column="grade", task="ordinal", fractions={"val": 0, "test": 0}
    )
    assert made.class_names == ("0", "2", "10")
    assert made.labels.tolist() == [2, 1, 0]
    assert made.task == "ordinal"


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        (("1", "01", "001"), ("001", "01", "1")),  # one value: by name, and not as a set happens to have them
        (("3", "--5", "2"), ("--5", "2", "3")),
        (("2", "1" * 5000, "10"), ("10", "1" * 5000, "2")),
    ],
)
def test_classes_that_no_number_orders_are_in_the_order_of_their_names(
    tmp_path: Path, images: Path, cells: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    lines = [f"00{i + 1}.png,{cells[i % 3]}" for i in range(8)]
    table = write(tmp_path, "\n".join(["image,stage", *lines]))
    made = load_csv(table, root=images, path_column="image", label_column="stage", draw=None)
    assert made.class_names == wanted


def test_one_table_per_split_with_a_column_per_class_and_a_rest(tmp_path: Path, images: Path) -> None:
    """The way ISIC 2017 comes."""
    header = "image_id,melanoma,seborrheic_keratosis\n"
    tables: dict[Any, Path] = {
        "train": write(tmp_path, header + "001,1.0,0.0\n002,0.0,1.0\n003,0.0,0.0\n", "train.csv"),
        "val": write(tmp_path, header + "004,0,1\n", "val.csv"),
        "test": write(tmp_path, header + "005,1,0\n", "test.csv"),
    }
    made = load_csv(
        tables,
        root=images,
        path_column="image_id",
        suffix=".png",
        label_columns=("melanoma", "seborrheic_keratosis"),
        rest_class="nevus",
    )
    assert made.class_names == ("melanoma", "seborrheic_keratosis", "nevus")
    assert made.labels.tolist() == [0, 1, 2, 1, 0]
    assert [s.split for s in made.samples] == ["train", "train", "train", "val", "test"]
    write(tmp_path, header + "005,1,0\n002,0,1\n", "test.csv")
    with pytest.raises(DataError, match=r"1 ids occur more than once: '002 \(train, test\)'"):
        load_csv(
            tables,
            root=images,
            path_column="image_id",
            suffix=".png",
            label_columns=("melanoma", "seborrheic_keratosis"),
            rest_class="nevus",
        )


def test_multilabel_takes_any_number_of_ones(tmp_path: Path, images: Path) -> None:
    table = write(tmp_path, "f,a,b\n001.png,1,1\n002.png,0,0\n003.png,0,1\n")
    made = load_csv(
        table,
        root=images,
        path_column="f",
        label_columns=("a", "b"),
        task="multilabel",
        fractions={"val": 0, "test": 0},
    )
    assert made.labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    with pytest.raises(DataError, match=r"table\.csv, line 2: 2 of 'a', 'b' are 1 and exactly one class is expected"):
        load_csv(table, root=images, path_column="f", label_columns=("a", "b"))


def test_without_splits_they_are_drawn_and_keep_patients_together(tmp_path: Path, images: Path) -> None:
    lines = [f"{i:03d}.png,{'ab'[i % 2]},p{i // 3}" for i in range(1, 9)]
    table = write(tmp_path, "\n".join(["f,y,who", *lines]))
    made = load_csv(table, root=images, path_column="f", label_column="y", group_column="who", seed=4)
    splits: dict[str, set[str]] = {}
    for sample in made.samples:
        splits.setdefault(sample.group, set()).add(sample.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {s.split for s in made.samples} > {"train"}


def test_masks_are_read_beside_the_images(tmp_path: Path, images: Path) -> None:
    Image.fromarray(np.array([[0, 255], [1, 0]], np.uint8)).save(images / "m.png")
    table = write(tmp_path, "f,y,m\n001.png,a,m.png\n002.png,b,m.png\n003.png,b, \n")
    made = load_csv(
        table,
        root=images,
        path_column="f",
        label_column="y",
        mask_column="m",
        fractions={"val": 0, "test": 0},
    )
    mask = made.mask(1)
    assert mask is not None
    assert mask.tolist() == [[False, True], [True, False]]
    assert made.mask(2) is None


def test_missing_files_are_listed(tmp_path: Path, images: Path) -> None:
    names = ["001.png", *(f"gone{i:02d}.png" for i in range(14))]
    table = write(tmp_path, "f,y\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names)))
    with pytest.raises(DataError, match=r"14 of 15 files are not below .*images: 'gone00\.png'.* and 4 more"):
        load_csv(table, root=images, path_column="f", label_column="y")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../x.png"])
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, images: Path, name: str) -> None:
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "secret.png")
    table = write(tmp_path, f"f,y\n001.png,a\n{name},b\n")
    with pytest.raises(DataError, match=rf"1 paths leave .*images: '{name}'"):
        load_csv(table, root=images, path_column="f", label_column="y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table is empty; expected a line with the names of its columns"),
        ("F,y\n", r"table\.csv: there is no column 'f'; it has 'F', 'y'"),
        ("f,label\n001.png,a\n", "there is no column 'y'; it has 'f', 'label'"),
        ("f,y,y\n001.png,a,b\n", "the column 'y' is there 2 times"),
        ("f,y\n", "there are no samples"),
        ("f,y\n001.png,a\n002.png,\n", r"line 3: 'y' is empty; fill it in or remove the line"),
        ("f,y\n001.png\n", "line 2: 'y' is empty"),
        ("f,y\n001.png,a,b\n", r"line 2: there are more cells than the header has"),
        ('f,y\n001.png,"a\n', "this is no CSV table in UTF-8"),
        ("f,y\n001.png,a\n001.png,b\n", r"1 ids occur more than once: '001\.png"),
        ("f,y\n001.png,a\n002.png,a\n", "needs at least two classes and has 1: 'a'"),
    ],
)
def test_a_table_that_says_something_else_is_refused(tmp_path: Path, images: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_csv(write(tmp_path, text), root=images, path_column="f", label_column="y")


def test_unreadable_tables_are_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: the table cannot be read \(No such file"):
        load_csv(tmp_path / "gone.csv", root=images, path_column="f", label_column="y")
    (tmp_path / "latin.csv").write_bytes(b"f,y\n001.png,gr\xfc\xdf\n")
    with pytest.raises(DataError, match=r"latin\.csv: this is no CSV table in UTF-8"):
        load_csv(tmp_path / "latin.csv", root=images, path_column="f", label_column="y")


def test_unknown_splits_are_listed(tmp_path: Path, images: Path) -> None:
    table = write(tmp_path, "f,y,s\n001.png,a,train\n002.png,b,dev\n003.png,b,fold 2\n")
    with pytest.raises(DataError, match="the column 's' holds 'dev', 'fold 2'; use train, val and test"):
        load_csv(table, root=images, path_column="f", label_column="y", split_column="s")


@pytest.mark.parametrize("cell", ["2", "0.5", "yes", "nan"])
def test_a_column_per_class_holds_bits(tmp_path: Path, images: Path, cell: str) -> None:
    table = write(tmp_path, f"f,a,b\n001.png,1,0\n002.png,0,{cell}\n")
    with pytest.raises(DataError, match=f"line 3: 'b' is '{cell}'; a column per class holds 0 or 1"):
        load_csv(table, root=images, path_column="f", label_columns=("a", "b"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either label_column"),
        ({"label_column": "y", "label_columns": ("a",)}, "give either label_column"),
        ({"label_columns": ("y",), "task": "multilabel", "rest_class": "none"}, "a multilabel task says 'none' by"),
    ],
)
def test_contradictory_columns_are_refused(
    tmp_path: Path, images: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_csv(write(tmp_path, "f,y\n001.png,1\n"), root=images, path_column="f", **arguments)


def test_tables_per_split_leave_no_room_for_a_split_column(tmp_path: Path, images: Path) -> None:
    table = write(tmp_path, "f,y,s\n001.png,a,train\n")
    with pytest.raises(DataError, match="with one table per split there is no split_column"):
        load_csv({"train": table}, root=images, path_column="f", label_column="y", split_column="s")


def with_subgroups(tmp_path: Path, images: Path, **options: Any):
    table = write(
        tmp_path,
        "image,finding,set,sex,age\n"
        "001,cyst,train,f,39.5\n002,tumour,train,m,40\n003,cyst,val,,59\n004,tumour,test,f,60\n005,cyst,test,m,\n",
    )
    columns = {"path_column": "image", "label_column": "finding", "split_column": "set", "suffix": ".png"}
    return load_csv(table, root=images, **columns, **options)


def test_columns_of_subgroups_go_with_the_samples_as_text_or_in_bands(tmp_path: Path, images: Path) -> None:
    made = with_subgroups(tmp_path, images, subgroup_columns=("sex", "age"), subgroup_bands={"age": (40, 60)})
    assert made.subgroup_names == ("sex", "age")
    assert [sample.subgroups for sample in made.samples] == [
        ("f", "under 40"),
        ("m", "40 to under 60"),
        ("", "40 to under 60"),
        ("f", "60 and over"),
        ("m", ""),
    ]
    assert with_subgroups(tmp_path, images).samples[0].subgroups == ()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"subgroup_columns": ("gender",)}, "there is no column 'gender'"),
        ({"subgroup_columns": ("sex",), "subgroup_bands": {"sex": (1,)}}, "line 2: 'sex' is 'f'; a column with bands"),
        ({"subgroup_columns": ("sex",), "subgroup_bands": {"age": (1,)}}, "'age', which is not among subgroup_columns"),
        ({"subgroup_columns": ("age",), "subgroup_bands": {"age": (60, 40)}}, "limits in ascending order"),
    ],
)
def test_columns_of_subgroups_that_cannot_be_are_refused(tmp_path: Path, images: Path, options, problem) -> None:
    with pytest.raises(DataError, match=problem):
        with_subgroups(tmp_path, images, **options)


def test_a_column_of_numbers_asks_for_bands(tmp_path: Path, images: Path) -> None:
    for i in range(9, 40):
        Image.fromarray(np.full((2, 2), i, np.uint8)).save(images / f"{i:03d}.png")
    lines = [f"{i:03d},{'ab'[i % 2]},{'train' if i < 30 else 'test'},{i}" for i in range(1, 40)]
    table = write(tmp_path, "\n".join(["image,finding,set,age", *lines]))
    columns = {"path_column": "image", "label_column": "finding", "split_column": "set", "suffix": ".png"}
    with pytest.raises(DataError, match=r"'age' has 39 values.*cut numbers into bands, as subgroup_bands: {age: \[40"):
        load_csv(table, root=images, **columns, subgroup_columns=("age",))


def test_val_is_drawn_from_train_where_the_column_has_train_and_test_alone(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    lines = ["f,c,split,patient"]
    for i in range(80):
        Image.fromarray(np.full((2, 2), i, np.uint8)).save(root / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i // 2 % 2]},{'test' if i < 20 else 'train'},p{i // 2}")
    table = write(tmp_path, "\n".join(lines))
    columns = {"path_column": "f", "label_column": "c", "split_column": "split", "group_column": "patient"}
    made = load_csv(table, root=root, fractions={"val": 0.3, "test": 0.0}, **columns)  # type: ignore[arg-type]
    assert made.val_drawn
    assert [s.split for s in made.samples[:20]] == ["test"] * 20
    assert 8 < len(made.indices("val")) < 30
    assert len({(s.group, s.split) for s in made.samples}) == 40
