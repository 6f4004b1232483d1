"""MedFocusCLIP's own experiments: public data as they come, published numbers of images, and what is compared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.schema import Config, load_config
from pipeline.errors import DataError, RunError
from pipeline.progress import silent
from pipeline.stages import studies
from pipeline.stages.inputs import load_dataset
from pipeline.stages.studies import prepare
from pipeline.stages.study_plan import load_study
from tests.benchmarks import mask_hits
from tests.cli.conftest import ROOT

# What the archives unpack to below data/, and how many images the paper has in train, val and test; or in all.
COME_AS = {
    "covid_xray": ("Covid19-dataset/{train,test}", ("Covid", "Normal", "Viral Pneumonia"), (251, 0, 66)),
    "lung_disease": (
        "Lung Disease Dataset/{train,val,test}",
        ("Bacterial Pneumonia", "Corona Virus Disease", "Normal", "Tuberculosis", "Viral Pneumonia"),
        (6054, 2016, 2025),
    ),
    "brain_tumour": (
        "brain_tumour/{Training,Testing}",
        ("glioma", "meningioma", "notumor", "pituitary"),
        (5712, 0, 1311),
    ),
    "breast_ultrasound": ("Dataset_BUSI_with_GT", ("benign", "malignant", "normal"), (780,)),
}


def unpack(root: Path, name: str, numbers: tuple[int, ...]) -> None:
    """Lay out a data set of so many images as the public archive does; BUSI's with the masks beside the images."""
    folder, classes, _ = COME_AS[name]
    top, _, splits = folder.partition("/")
    found = (
        [root / "data" / top / split for split in splits.strip("{}").split(",")] if splits else [root / "data" / top]
    )
    for split, number in zip(found, [number for number in numbers if number], strict=True):
        for i in range(number):
            of_class = classes[i % len(classes)]
            stem = split / of_class / f"{of_class} ({i})"
            stem.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), i % 251, np.uint8)).save(stem.with_name(f"{stem.name}.png"))
            for end in ("_mask", "_mask_1")[: 1 + i % 2] if name == "breast_ultrasound" else ():
                Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save(stem.with_name(f"{stem.name}{end}.png"))


def config_of(name: str, *overrides: str) -> Config:
    return load_config(ROOT / f"configs/{name}.yaml", overrides)


@pytest.mark.parametrize("name", COME_AS)
def test_the_public_folders_load_as_they_come(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(number and 60 + 6 * k for k, number in enumerate(COME_AS[name][2]))
    unpack(tmp_path, name, few)
    monkeypatch.chdir(tmp_path)
    made = load_dataset(config_of(name, "data.expect=null"))
    assert made.class_names == COME_AS[name][1]
    found = Counter(sample.split for sample in made.samples)
    assert set(found) == {"train", "val", "test"}
    assert sum(found.values()) == sum(few)
    if len(few) > 1:
        assert found["test"] == few[2]
    masks = [made.mask(i) for i in range(len(made))]
    assert all(mask is not None and mask.any() for mask in masks) == (name == "breast_ultrasound")
    assert not any("mask" in sample.id for sample in made.samples)
    with pytest.raises(DataError, match=r"expected \d+ in \w+ and found \d+"):
        load_dataset(config_of(name))


@pytest.mark.parametrize("name", COME_AS)
def test_the_published_numbers_are_the_expected_ones(name: str) -> None:
    numbers = COME_AS[name][2]
    wanted = dict(zip(("train", "val", "test"), numbers, strict=True)) if len(numbers) > 1 else {"all": numbers[0]}
    assert config_of(name).data.expect == {split: number for split, number in wanted.items() if number}


def test_a_whole_data_set_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack(tmp_path, "covid_xray", (251, 0, 66))
    monkeypatch.chdir(tmp_path)
    made = load_dataset(config_of("covid_xray"))
    assert Counter(sample.split for sample in made.samples) == {"train": 213, "val": 38, "test": 66}


@pytest.mark.parametrize("name", COME_AS)
def test_a_study_has_the_papers_fractions_and_comparisons(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(Path(f"configs/paper/medfocusclip_{name}.yaml"))
    assert {run.cell["fraction"] for run in study.runs} == {0.05, 0.1, 0.2, 0.5, 1.0}
    assert {run.seed for run in study.runs} == {0, 1, 2}
    of = {run.cell["variant"]: study.configs[run.name].model for run in study.runs}
    assert set(of) == {"clip", "medfocusclip", "binary", "cutout", "swin", "swin_overlay"}
    assert of["clip"].backbone == of["medfocusclip"].backbone == "clip:ViT-B-32"
    painted = {name: model.overlay.palette for name, model in of.items() if model.overlay is not None}
    assert painted == {"medfocusclip": "rank", "binary": "binary", "cutout": "cutout", "swin_overlay": "rank"}
    assert set(of["clip"].clip.words) <= set(COME_AS[name][1])
    assert of["clip"].clip.templates == ("This is a photo of {class}",)
    assert next(iter(study.configs.values())).encoder.name.startswith("sam2_hiera")


SMALL = """\
base: configs/default.yaml
folder: studies/small
baseline: known
set:
  data: {layout: demo, path: data/small, count: 24, size_px: 64, seed: 3}
  encoder: {name: mask, checkpoint: none, taps: [masks, "masks:shifted"]}
  store.path: features/small.zarr
  model.gates: []
variants:
  known: {model.overlay: {tap: masks}}
  elsewhere: {model.overlay: {tap: "masks:shifted"}}
"""


def test_known_masks_hit_the_lesions_and_shifted_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    prepare(load_study(Path("small.yaml")), silent)
    known, elsewhere = (mask_hits.measure(Path("small.yaml"), name, None, 50) for name in ("known", "elsewhere"))
    assert known["images"] == elsewhere["images"] == 24
    assert known["best_iou"]["value"] > 0.97  # the stored map has cells of a quarter of a pixel
    assert known["recall"]["value"] == 1
    assert elsewhere["best_iou"]["value"] < 0.2
    assert known["masks_an_image"] == {"median": 1.0, "none": 0}
    assert mask_hits.measure(Path("small.yaml"), "known", "test", 50)["images"] < 24


FOUND = (
    SMALL.replace("baseline: known", "baseline: sam").partition("variants:")[0]
    + """\
  train: {epochs: 1, batch_size: 8}
  model.image_px: 32
variants:
  sam:
    encoder: {name: sam_demo, checkpoint: weights/sam.pth, taps: [masks], training: {steps: 0}}
    store.path: features/sam.zarr
    model.overlay: {tap: masks}
"""
)


def test_masks_made_by_other_rules_than_configured_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "found.yaml").write_text(FOUND)
    monkeypatch.chdir(tmp_path)
    plan = load_study(Path("found.yaml"))
    prepare(plan, silent)
    (tmp_path / "other.yaml").write_text(FOUND.replace("taps: [masks],", "taps: [masks], masks: {overlap: 0.5},"))
    with pytest.raises(RunError, match=r"encoder\.masks\.overlap asks for 0\.5, and the store has 0\.7"):
        studies.study(load_study(Path("other.yaml")), silent)
    assert studies.study(plan, silent)["missing"] == 0


def test_the_study_on_the_demo_has_the_oracle_and_its_controls_under_both_backbones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(Path("configs/studies/demo_masks.yaml"))
    assert study.baseline == "none"
    assert len(study.runs) == 6 * 2 * 5 * 5  # variants, backbones, fractions, seeds
    assert {run.cell["backbone"] for run in study.runs} == {"ResNet-18", "CLIP"}
    assert {run.cell["fraction"] for run in study.runs} == {0.05, 0.1, 0.2, 0.5, 1.0}
    made = {run.cell["variant"]: study.configs[run.name] for run in study.runs}
    painted = {
        name: (config.encoder.name, config.model.overlay.tap, config.model.overlay.palette)
        for name, config in made.items()
        if config.model.overlay is not None
    }
    assert painted == {
        "oracle": ("mask", "masks", "rank"),
        "random": ("mask", "masks:random", "rank"),
        "sam": ("sam_demo", "masks", "rank"),
        "binary": ("sam_demo", "masks", "binary"),
        "cutout": ("sam_demo", "masks", "cutout"),
    }
    assert made["none"].model.overlay is None
