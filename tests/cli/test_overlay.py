"""The real commands on masks that a frozen SAM found, and on known ones, from images to what is handed on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import cache
from tests.cli.conftest import complaint, copy_of, succeed

SAM = """\
data: {layout: demo, path: data/demo, count: 48, size_px: 64, seed: 0}
encoder:
  name: sam_demo
  checkpoint: weights/whole.pth
  taps: [neck, masks]
  pool: 4
  training: {steps: 0, seed: 1}
  masks: {points: 4, predicted_iou: 0, stability: 0, min_region_px: 4}
store: {path: features/masks.zarr}
model:
  backbone: resnet18
  image_px: 64
  gates: [{tap: neck, stage: stage4}]
  overlay: {tap: masks, palette: random, max_masks: 4}
train: {epochs: 1, batch_size: 8, lr: 1e-3, augment: {flip_horizontal: 0.5}}
run: runs/masks
"""
KNOWN = (
    "encoder.name=mask",
    'encoder.taps=["mask", "masks", "masks:shifted", "masks:random"]',
    "encoder.masks={}",
    "encoder.pool=1",
    "store.path=features/known.zarr",
    "model.gates=[{tap: mask, stage: stage1}]",
    "model.overlay={tap: masks}",
    "run=runs/known",
)


def settings(*overrides: str) -> list[str]:
    return ["-c", "sam.yaml", *(word for override in overrides for word in ("--set", override))]


@pytest.fixture(scope="module")
def found(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run on masks that SAM found is trained and evaluated."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("found"))
    (folder / "sam.yaml").write_text(SAM)
    for command in ("prepare", "extract", "train", "evaluate"):
        succeed(folder, command, *settings())
    return folder


def test_new_images_are_painted_as_the_stored_ones_are(found: Path) -> None:
    rows = list(csv.DictReader((found / "runs/masks/predictions.csv").read_text().splitlines()))[:3]
    images = [str(Path("data/demo") / row["id"]) for row in rows]
    said = succeed(found, "predict", *settings(), *images)["predictions"]
    succeed(found, "export", *settings(), "--onnx", "runs/masks", "handed")
    handed = succeed(found, "predict", "--model", "handed", "--checkpoint", "weights/whole.pth", *images)["predictions"]
    for row, one, other in zip(rows, said, handed, strict=True):
        expected = {name: float(row[f"p_{name}"]) for name in one["probabilities"]}
        assert one["probabilities"] == pytest.approx(expected, abs=2e-3)
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-6)
    assert "Painted over its images: masks in colours of each image's own" in (found / "handed/README.md").read_text()
    assert (found / "handed/model.onnx").is_file()


def test_the_explanation_and_the_page_tell_of_masks(found: Path) -> None:
    told = succeed(found, "explain", *settings(), "--count", "1")["overlay"]
    with cache.open_store(found / "features/masks.zarr") as store:
        assert store.read([0])["mask_scores"].any()
    assert told["max_masks"] == 4
    assert 0 < told["masks"] <= 4
    assert told["cases"][0]["masks"][0]["predicted_iou"] is not None
    assert told["localisation"]["images"] == told["images"]
    succeed(found, "report", *settings())
    page = (found / "runs/masks/report.html").read_text()
    for words in ("What each mask changes", "images without any mask, which are taken as they are", "painted over the"):
        assert words in page


def test_known_masks_and_their_controls_are_trained_on_from_one_store(found: Path) -> None:
    succeed(found, "extract", *settings(*KNOWN))
    for tap in ("masks", "masks:shifted", "masks:random"):
        run = f"run=runs/known_{tap.replace(':', '_')}"
        given = settings(*KNOWN, f"model.overlay.tap={tap}", run)
        assert succeed(found, "train", *given)["overlay"]["train"]["without_masks"] == 0
        succeed(found, "evaluate", *given)
    compared = succeed(found, "compare", "runs/known_masks", "runs/known_masks_random")
    assert "model.overlay.tap" in json.dumps(compared)
    with cache.open_store(found / "features/known.zarr") as store:
        assert {"mask", "masks", "masks:shifted", "masks:random"} <= set(store.taps)
        maps = store.read([0])
        assert (maps["masks"] > 0).sum() == (maps["masks:random"] > 0).sum() == (maps["masks:shifted"] > 0).sum()
    said = complaint(
        found, "export", *settings(*KNOWN, "run=runs/known_masks_random"), "runs/known_masks_random", "no", status=1
    )
    assert "reads the known masks, which new images do not have" in said


def test_what_cannot_be_painted_is_refused_in_words(found: Path) -> None:
    for override, words in (
        ("model.overlay.tap=neck", "model.overlay.tap is 'neck', which is no map of masks"),
        ("model.overlay.opacity=2", "--set model.overlay.opacity: got 2, expected"),
        ("model.overlay.tap=masks:random", "holds no tap 'masks:random', only neck"),
        ("model.image_px=2048", "more than 4 times wider than what is stored"),
        ("model.gates=[{tap: masks, stage: stem}]", "holds masks and no features: paint it with model.overlay"),
    ):
        status = 1 if "holds no tap" in words else 2
        assert words in complaint(found, "train", *settings(override, "run=runs/no"), status=status)
    assert not (found / "runs/no").exists()


@pytest.mark.parametrize("command", ["prepare", "extract"])
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("encoder.masks.side_px=16", "model.image_px=96"), "stored at 16 cells a side: an overlay more than 4 times"),
        (("encoder.name=clip:demo", "encoder.pool=null"), "'clip:demo' has no mask decoder and so no tap 'masks'"),
        (("encoder.taps=[neck, mask]",), "sam_demo has no tap 'mask'"),
    ],
)
def test_what_no_classifier_could_use_is_said_before_anything_is_made(
    tmp_path: Path, command: str, overrides: tuple[str, ...], words: str
) -> None:
    (tmp_path / "sam.yaml").write_text(SAM)
    assert words in " ".join(complaint(tmp_path, command, *settings(*overrides), status=2).split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sam.yaml"]


def test_a_store_and_a_configuration_need_not_list_the_same_taps(found: Path) -> None:
    succeed(found, "store", "convert", "features/masks.zarr", "features/neck.zarr", "--tap", "neck")
    said = complaint(found, "train", *settings("store.path=features/neck.zarr", "run=runs/no"), status=1)
    assert "'features/neck.zarr' holds no tap 'masks', only neck: extract it (encoder.taps, then" in " ".join(
        said.split()
    )
    assert len(said.split()) < 40  # and nothing else, such as how masks would have been made
    assert not (found / "runs/no").exists()
    painted = ("encoder.taps=[masks]", "model.gates=[]", "run=runs/painted")
    succeed(found, "train", *settings(*painted))  # of neck and masks
    succeed(found, "store", "convert", "features/masks.zarr", "features/only.zarr", "--tap", "masks")
    succeed(found, "train", *settings("store.path=features/only.zarr", "model.gates=[]", "run=runs/only"))
    weights = [(found / "runs" / run / "model.safetensors").read_bytes() for run in ("painted", "only")]
    assert weights[0] == weights[1]
