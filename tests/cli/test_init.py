"""`pipeline init` in the folder of somebody who has nothing but images: what it finds, and that the file runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.schema import load_config
from pipeline.data.guess import guess_group_pattern
from pipeline.errors import ConfigError, DataError
from pipeline.stages.first_config import Given, propose
from pipeline.stages.inputs import load_dataset

from .conftest import complaint, run_pipeline, succeed


def write(path: Path, value: Any = 0, size: tuple[int, int] = (40, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


def visits(root: Path, patients: int = 20, each: int = 2) -> None:
    """Two classes of `patients` each, whose names are patient_visit."""
    for k, name in enumerate(("healthy", "ill")):
        for patient in range(patients):
            for visit in range(each):
                write(root / name / f"{1000 * (k + 1) + patient:06d}_{visit:03d}.png", patient + visit)


def test_a_folder_becomes_a_configuration_that_loads(tmp_path: Path) -> None:
    visits(tmp_path / "my scans")
    for name in ("healthy/a.heic", "ill/b.heic", "notes.gif"):
        (tmp_path / "my scans" / name).touch()
    done = run_pipeline(tmp_path, "init", "my scans", "--encoder", "sam_demo")
    assert done.returncode == 0, done.stderr
    assert "ignored    3 (.heic 2, .gif 1)" in done.stdout
    assert "pipeline extract -c configs/my_scans.yaml" in done.stdout
    assert "40 in 80 images" in done.stdout
    assert next(line.split() for line in done.stdout.splitlines() if line.startswith("ill"))[-1] == "40"
    text = (tmp_path / "configs/my_scans.yaml").read_text()
    assert "guessed from the file names: 40 groups in 80 images, such as" in text
    report = succeed(tmp_path, "prepare", "-c", "configs/my_scans.yaml", "--set", "encoder.training.steps=0")
    assert report["data"]["train"] + report["data"]["val"] + report["data"]["test"] == 80


def test_masks_among_the_images_are_no_images(tmp_path: Path) -> None:
    for name in ("benign", "malignant"):
        for i in range(30):
            write(tmp_path / "busi" / name / f"{name} ({i}).png", i)
            write(tmp_path / "busi" / name / f"{name} ({i})_mask.png")
    done = run_pipeline(tmp_path, "init", "busi", "--encoder", "sam_demo")
    assert done.returncode == 0, done.stderr
    assert "guessed: 60 files are masks of images beside them" in (tmp_path / "configs/busi.yaml").read_text()
    quick = ("-c", "configs/busi.yaml", "--set", "encoder.training.steps=0")
    report = succeed(tmp_path, "prepare", *quick)["data"]
    assert report["counts"]["images"] == 60
    taken = succeed(tmp_path, "prepare", *quick, "--set", "data.masks=null")["data"]
    assert taken["counts"]["images"] == 120
    hint = '60 of the 120 images seem to be masks of the others: --set data.masks="{stem}_mask*" takes them'
    assert any(hint in note for note in taken["notes"])
    assert not any("seem to be masks" in note for note in report["notes"])
    said = complaint(tmp_path, "train", *quick, "--set", "data.expect={all: 780}", status=1)
    assert "busi: expected 780 in all and found 60 images (data.expect)" in said


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    visits(tmp_path / "scans", 6, 1)
    (tmp_path / "mine.yaml").write_text("mine")
    said = complaint(tmp_path, "init", "scans", "--out", "mine.yaml", status=2)
    assert "mine.yaml is there already and is left as it is: name another file with --out" in said
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert "name the data" in complaint(tmp_path, "init", status=2)


def test_a_pattern_of_patients_that_is_none_is_said_so(tmp_path: Path) -> None:
    visits(tmp_path / "scans", 6, 1)
    said = complaint(tmp_path, "init", "scans", "--group-pattern", "(", status=1)
    assert "the group pattern '(' is no regular expression" in said
    said = complaint(tmp_path, "init", "scans", "--group-pattern", "(nobody)|.", status=1)
    assert "the group pattern '(nobody)|.' does not match 12 names" in said


def test_the_patients_of_the_configuration_are_those_that_were_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    visits(Path("scans"))
    report = propose("scans", Given())
    dataset = load_dataset(load_config(Path(report["config"])))
    assert len({sample.group for sample in dataset.samples}) == report["groups"]["count"] == 40
    for group, names in report["groups"]["examples"].items():
        assert {s.group for s in dataset.samples if s.id in names} == {group}
    asked = []

    def refuse(flag: str, question: str, default: str) -> str:
        asked.append((flag, question))
        return "none"

    report = propose("scans", Given(), Path("alone.yaml"), refuse)
    ((flag, question),) = asked
    assert flag == "--group-pattern"
    assert "finds 40 patients in 80 images" in question
    assert "groups" not in report
    assert any("patient of its own" in note for note in report["notes"])
    assert "group_pattern" not in load_config(Path("alone.yaml")).data.model_fields_set


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ([f"{p:05d}_{v}.png" for p in range(20) for v in range(2)], r"^(\d+)[_-]"),
        ([f"{p:05d}_000.png" for p in range(20)], r"^(\d+)[_-]"),
        ([f"P{p}-left-{v}.jpg" for p in range(20) for v in range(3)], r"^([A-Za-z]+\d+)[_-]"),
        ([f"study_Patient{p}_{v}.jpg" for p in range(20) for v in range(3)], None.__class__),
        ([f"ISIC_{p:07d}.jpg" for p in range(20)], None),
        ([f"image_{p}.jpg" for p in range(40)], None),
        ([f"benign ({p}).png" for p in range(40)], None),
        ([f"{p}.png" for p in range(40)], None),
        ([f"{p}_{v}.png" for p in range(3) for v in range(20)], None),  # three would be a site or a class
    ],
)
def test_patients_are_guessed_where_names_tell_them(names: list[str], pattern: str | type | None) -> None:
    found = guess_group_pattern(names)
    if isinstance(pattern, type):
        assert found is not None
        assert found.startswith("(?i)(")
    else:
        assert found == pattern


def table(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_columns_of_a_table_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, object]] = [
        {"age": 30 + i % 40, "patient_id": i // 2, "diagnosis": ("nevus", "melanoma")[i // 2 % 2], "name": f"x{i}"}
        for i in range(60)
    ]
    for row in rows:
        write(tmp_path / "pictures" / f"{row['name']}.png")
    table(tmp_path / "labels.csv", rows)
    report = propose("labels.csv", Given())
    config = load_config(Path(report["config"]))
    said = config.data.model_dump(mode="json", exclude_defaults=True, exclude={"split"})
    assert said == {
        "layout": "csv",
        "path": "labels.csv",
        "images": "pictures",
        "path_column": "name",
        "label_column": "diagnosis",
        "group_column": "patient_id",
        "suffix": ".png",
        "positive": "melanoma",
    }
    dataset = load_dataset(config)
    assert dataset.class_names == ("melanoma", "nevus")
    assert report["counts"]["largest_group"] == 2
    for found in report["counts"]["classes"].values():  # of 30: 18, 4.5 and 7.5, about
        assert 3 <= found["val"] <= 6
        assert 5 <= found["test"] <= 10


def test_a_table_that_does_not_tell_names_the_flag(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": f"{i}.png", "a": i % 2, "b": i % 3} for i in range(12)]
    for i in range(12):
        write(tmp_path / f"{i}.png")
    table(tmp_path / "labels.csv", rows)
    with pytest.raises(ConfigError, match=r"name it with --label-column \('image: 12 values', 'a: 2 values', 'b: 3"):
        propose(str(tmp_path / "labels.csv"), Given(), tmp_path / "out.yaml")
    propose(str(tmp_path / "labels.csv"), Given(label_column="b"), tmp_path / "out.yaml")
    assert load_dataset(load_config(tmp_path / "out.yaml")).class_names == ("0", "1", "2")


def test_files_with_a_small_part_of_16_bits_are_read_by_percentile(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(6):
            (tmp_path / "ct" / name).mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(i).integers(0, 4096, (32, 32)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / "ct" / name / f"{i}.png")
    pages = [Image.fromarray(np.zeros((8, 8), np.uint8)) for _ in range(3)]
    pages[0].save(tmp_path / "ct/a/9.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "ct/b/8.png").write_bytes(b"no image")
    report = propose(str(tmp_path / "ct"), Given(), tmp_path / "ct.yaml")
    assert load_config(tmp_path / "ct.yaml").data.model_dump()["reading"]["depth"] == "percentile"
    notes = " ".join(report["notes"])
    assert "1 of 14 files have several pages (up to 3)" in notes
    assert "1 of 14 files cannot be opened" in notes


def test_a_folder_one_too_high_is_told_where_the_classes_are(tmp_path: Path) -> None:
    visits(tmp_path / "download" / "images", 6, 1)
    with pytest.raises(DataError) as caught:
        propose(str(tmp_path / "download"), Given(), tmp_path / "out.yaml")
    assert f"perhaps you mean {tmp_path / 'download' / 'images'}" in caught.value.__notes__


def test_the_demo_and_medmnist_need_no_data_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path(propose("demo", Given())["config"])).encoder.name == "sam_demo"
    report = propose("bloodmnist", Given(size_px=64, encoder="sam_vit_h"))
    config = load_config(Path(report["config"]))
    assert (str(config.data.path), config.encoder.name) == ("data/bloodmnist_64.npz", "sam_vit_h")
    with pytest.raises(ConfigError, match="'nothing' is no folder, no CSV table, no store and no MedMNIST set"):
        propose("nothing", Given())
    with pytest.raises(ConfigError, match=r"s3://b/x is a URL, .* data: {layout: folder, path: s3://b/x}"):
        propose("s3://b/x", Given())
    config = load_config(Path(propose("demo", Given(encoder="clip:demo"), Path("clip.yaml"))["config"]))
    assert (config.model.gates, config.model.fuse) == ((), ("embedding",))
    assert str(config.encoder.checkpoint) == "weights/clip_demo.safetensors"
    with pytest.raises(ConfigError, match="--encoder: there is no encoder 'sam'"):
        propose("pathmnist", Given(encoder="sam"))


@pytest.mark.parametrize("name", ["sam_vit_b", "sam2.1_hiera_tiny"])
def test_weights_of_a_published_encoder_go_by_its_name(name: str, tmp_path: Path) -> None:
    report = propose("bloodmnist", Given(encoder=name), tmp_path / "out.yaml")
    assert str(load_config(Path(report["config"])).encoder.checkpoint) == name
