"""The generated data set: repeatable, whole, and with no way to tell the class but the lesion's shape."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from pipeline.config.schema import DemoData, load_config
from pipeline.data import Difficulty, demo_arrays, demo_objects, generate_demo, load_demo
from pipeline.data.layouts.demo_images import STANDARD, draw, roll
from pipeline.errors import ConfigError, DataError
from pipeline.progress import silent
from pipeline.stages.prepare import prepare_data

DEFAULT = Path(__file__).parents[2] / "configs/default.yaml"


@pytest.fixture(scope="module")
def many() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    return demo_arrays(900, 48, seed=5)


def bytes_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_it_is_what_it_says_on_disk(tmp_path: Path) -> None:
    assert generate_demo(tmp_path / "demo", count=60, size_px=32, seed=3)
    made = load_demo(tmp_path / "demo")
    assert (made.name, made.class_names, made.task) == ("demo", ("lobed", "round", "spiked"), "multiclass")
    assert Counter(s.label for s in made.samples) == Counter({0: 20, 1: 20, 2: 20})
    images, masks, labels = demo_arrays(60, 32, seed=3)
    assert made.labels.tolist() == labels.tolist()
    for i in (0, 31, 59):
        np.testing.assert_array_equal(made.read(i), np.dstack([images[i]] * 3))
        mask = made.mask(i)
        assert mask is not None
        np.testing.assert_array_equal(mask, masks[i])
    shares = Counter(s.split for s in made.samples)
    assert abs(shares["train"] - 36) <= 3
    assert abs(shares["test"] - 15) <= 3


def test_patients_have_one_to_three_images_of_one_class(tmp_path: Path) -> None:
    rows = roll(360, 0)
    visits = Counter(patient for _, patient, _ in rows)
    assert set(visits.values()) == {1, 2, 3}
    assert len({(patient, label) for label, patient, _ in rows}) == len(visits)
    assert max(Counter(label for label, _, _ in rows).values()) <= 123


def test_the_same_parameters_give_the_same_bytes(tmp_path: Path) -> None:
    generate_demo(tmp_path / "a", count=12, size_px=32, seed=3)
    generate_demo(tmp_path / "b", count=12, size_px=32, seed=3)
    generate_demo(tmp_path / "c", count=12, size_px=32, seed=4)
    assert bytes_below(tmp_path / "a") == bytes_below(tmp_path / "b")
    assert bytes_below(tmp_path / "a")["images/p0000_0.png"] != bytes_below(tmp_path / "c")["images/p0000_0.png"]


def test_another_seed_shares_no_image_and_a_longer_series_begins_alike() -> None:
    short, long, other = (demo_arrays(n, 32, seed=s)[0] for n, s in ((6, 1), (9, 1), (9, 2)))
    np.testing.assert_array_equal(short, long[:6])
    assert not {i.tobytes() for i in long} & {i.tobytes() for i in other}
    assert len({i.tobytes() for i in long}) == 9


def test_what_is_there_is_kept_and_other_parameters_replace_it(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    assert generate_demo(root, count=6, size_px=32)
    before = (root / "demo.csv").stat().st_mtime_ns
    assert not generate_demo(root, count=6, size_px=32)
    assert (root / "demo.csv").stat().st_mtime_ns == before
    assert generate_demo(root, count=9, size_px=32)
    assert len(load_demo(root)) == 9
    assert generate_demo(root, count=9, size_px=32, difficulty=Difficulty(speckle=0.1))
    (root / "masks" / "p0000_0.png").unlink()
    with pytest.raises(DataError, match=r"1 of 18 files are not below .*'masks/p0000_0\.png'"):
        load_demo(root)
    assert generate_demo(root, count=9, size_px=32, difficulty=Difficulty(speckle=0.1))
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(DataError, match="mine: this is no demo data set and would be replaced by one"):
        generate_demo(tmp_path / "mine", count=6, size_px=32)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "dear"
    with pytest.raises(DataError, match="there is no demo data set; `pipeline prepare` makes it"):
        load_demo(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    assert generate_demo(tmp_path / "empty", count=6, size_px=32)


def test_a_kill_leaves_no_half_data_set(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    program = f"from pathlib import Path; from pipeline.data import generate_demo; generate_demo(Path({str(root)!r}))"
    process = subprocess.Popen([sys.executable, "-c", program])
    images = tmp_path / "demo.partial" / "images"
    while process.poll() is None and not (images.is_dir() and len(os.listdir(images)) > 5):  # noqa: PTH208
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not root.exists()
    assert images.is_dir()
    generate_demo(root, count=9, size_px=32)
    assert len(load_demo(root)) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_parameters_are_beside_the_images(tmp_path: Path) -> None:
    generate_demo(tmp_path / "demo", count=6, size_px=32, seed=9)
    found: dict[str, Any] = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert (found["count"], found["size_px"], found["seed"]) == (6, 32, 9)
    assert found["difficulty"]["speckle"] == Difficulty().speckle


def test_difficulty_is_configured_and_its_defaults_are_the_standard_ones(tmp_path: Path) -> None:
    config = load_config(DEFAULT)
    assert isinstance(config.data, DemoData)
    assert Difficulty(**config.data.difficulty.model_dump()) == STANDARD
    overrides = [f"data.path={tmp_path / 'faint'}", "data.count=6", "data.size_px=32"]
    prepare_data(load_config(DEFAULT, [*overrides, "data.difficulty.contrast=[1, 2]"]), silent)
    images, _, _ = demo_arrays(6, 32, 0, difficulty=Difficulty(contrast=(1, 2)))
    np.testing.assert_array_equal(load_demo(tmp_path / "faint").read(5)[..., 0], images[5])
    with pytest.raises(ConfigError, match=r"difficulty\.structures: got \[3, 1\]; the smaller number comes first"):
        Difficulty(structures=(3, 1))


def separability(features: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> float:
    """Cross-validated macro AUC of a forest: .5 if the features say nothing about the class."""
    forest = RandomForestClassifier(60, min_samples_leaf=8, random_state=0)
    scores = cross_val_predict(forest, features, labels, cv=4, method="predict_proba")
    return float(roc_auc_score(labels, scores, multi_class="ovr"))


def test_nothing_but_the_shape_tells_the_class(many: tuple[Any, ...]) -> None:
    images, masks, labels = many
    grid = (np.arange(48) + 0.5) / 48
    area = masks.mean((1, 2))
    y = (masks * grid[:, None]).sum((1, 2)) / masks.sum((1, 2))
    x = (masks * grid).sum((1, 2)) / masks.sum((1, 2))
    outside = np.where(masks, np.nan, images)
    giveaways = {
        "position": np.stack([y, x], 1),
        "area": area[:, None],
        "tissue": np.stack([np.nanmean(outside, (1, 2)), np.nanstd(outside, (1, 2))], 1),
        "rows and columns": np.concatenate([images.mean(1)[:, ::6], images.mean(2)[:, ::6]], 1),
        "histogram": np.stack([np.percentile(images, q, (1, 2)) for q in (1, 5, 25, 50, 75, 95, 99)], 1),
    }
    found = {name: separability(values, labels) for name, values in giveaways.items()}
    assert all(abs(auc - 0.5) < 0.06 for auc in found.values()), found


@pytest.mark.parametrize("patient", range(8))
def test_another_class_changes_the_lesions_contour_and_nothing_else(patient: int) -> None:
    drawings = [draw(label, patient, 0, 96, 0, Difficulty()) for label in range(3)]
    first_image, first_mask, first_structures = drawings[0]
    areas = [mask.sum() for _, mask, _ in drawings]
    assert max(areas) < 1.08 * min(areas)
    everywhere = np.logical_or.reduce([mask for _, mask, _ in drawings])
    rows, columns = (np.flatnonzero(everywhere.any(axis)) for axis in (1, 0))
    around = np.zeros_like(everywhere)
    edge = 4  # px that the lesion's soft edge reaches beyond its mask
    around[max(rows[0] - edge, 0) : rows[-1] + 1 + edge, max(columns[0] - edge, 0) : columns[-1] + 1 + edge] = True
    for image, mask, structures in drawings[1:]:
        assert (mask != first_mask).sum() > 20
        np.testing.assert_array_equal(structures, first_structures)
        np.testing.assert_array_equal(image[~around], first_image[~around])


def test_the_mask_tells_the_class(many: tuple[Any, ...]) -> None:
    _, masks, labels = many
    area = masks.sum((1, 2))
    edges = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    assert separability(np.stack([edges / np.sqrt(area), area], 1), labels) > 0.75


def test_every_lesion_is_whole_and_darker_than_its_surroundings(many: tuple[Any, ...]) -> None:
    images, masks, _ = many
    border = masks[:, 0].any() or masks[:, -1].any() or masks[:, :, 0].any() or masks[:, :, -1].any()
    assert not border
    inside = (images * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (images * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    assert (inside < outside).mean() > 0.99
    assert (images == 0).mean() < 0.05
    assert (images == 255).mean() < 0.05


def test_masks_of_structures_are_where_it_is_bright_and_the_lesion_is_not() -> None:
    images, lesions, _ = demo_arrays(60, 64, seed=5)
    same_images, objects = demo_objects(60, 64, seed=5)
    np.testing.assert_array_equal(same_images, images)
    np.testing.assert_array_equal(objects[:, 0], lesions)
    structures = objects[:, 1:]
    counts = structures.any((2, 3)).sum(1)
    assert structures.shape == (60, 3, 64, 64)
    assert set(counts.tolist()) <= {0, 1, 2, 3}
    assert counts.mean() > 0.5  # those that would touch the lesion are left out
    assert not (structures.any(1) & lesions).any()
    tissue = ~objects.any(1)
    brighter = [
        images[i][mask].mean() > images[i][tissue[i]].mean() for i in range(60) for mask in structures[i] if mask.any()
    ]
    assert np.mean(brighter) > 0.85  # tissue has layers and loss with depth, so a faint one in a dark layer may not be
