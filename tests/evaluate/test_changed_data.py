"""No command scores or shows images that the run has learnt, whatever has become of the data set since."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.data import load_folder
from pipeline.errors import RunError
from pipeline.evaluate.evaluate import evaluate
from pipeline.explain.explain import explain
from pipeline.records import read_csv, write_csv
from pipeline.train.identity import check_samples
from tests.train.scenes import PLAIN, QUICK, Arrays, do, make_dataset, make_store


@pytest.fixture(scope="module")
def plain(scene, tmp_path_factory):
    """A finished run without features."""
    return do(scene, None, tmp_path_factory.mktemp("plain") / "run", model=PLAIN).folder


def drawn_anew(dataset, moved):
    """The data set with some samples in another split, as splits that were drawn again would have them."""
    samples = [dataclasses.replace(sample, split=moved.get(sample.id, sample.split)) for sample in dataset.samples]
    return dataclasses.replace(dataset, samples=tuple(samples))


def renamed(dataset):
    samples = [dataclasses.replace(sample, id=f"new-{sample.id}") for sample in dataset.samples]
    return dataclasses.replace(dataset, samples=tuple(samples))


def test_test_images_that_became_those_of_the_training_are_told(scene, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    assert "also_learnt" not in evaluate(tmp_path / "run", scene, None, resamples=20)
    images, where = scene.source.images.copy(), {sample.id: i for i, sample in enumerate(scene.samples)}
    tested = next(sample.id for sample in scene.samples if sample.split == "test")
    images[where[tested]] = images[where["s003"]]  # as a renumbering leaves them
    found = evaluate(tmp_path / "run", dataclasses.replace(scene, source=Arrays(images)), None, resamples=20)
    assert found["also_learnt"] == (
        f"1 of {found['n']} images of split 'test' have the pixels of images that the run was trained or chosen on: "
        f"'{tested}', for one, of one in 'train'"
    )


COMMANDS = pytest.mark.parametrize("command", [evaluate, explain])
PLACES = pytest.mark.parametrize("name_them", [lambda dataset: dataset, renamed], ids=["same names", "renamed"])


@COMMANDS
@PLACES
@pytest.mark.parametrize("moved", [{"s003": "test"}, {"s030": "test"}], ids=["trained on", "chosen on"])
def test_a_test_image_that_the_run_has_used_is_refused_by_its_pixels(scene, plain, command, name_them, moved):
    before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"1 of 13 images of split 'test' were used otherwise by the run") as refused:
        command(plain, name_them(drawn_anew(scene, moved)), None)
    assert next(iter(moved)) in str(refused.value)
    assert "train again" in str(refused.value)
    assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def half_read(scene, tmp_path_factory):
    """A run that has not read every second image, as may be where images are read ahead of each step."""
    folder = do(scene, None, tmp_path_factory.mktemp("half") / "run", model=PLAIN).folder
    rows = read_csv(folder / "samples.csv")
    for row in rows:
        if int(row["id"][1:]) % 2:
            row["pixels_sha256"] = ""
    write_csv(folder / "samples.csv", rows)
    return folder


@pytest.mark.parametrize(
    ("moved", "name_them"),
    [("s003", lambda dataset: dataset), ("s004", lambda dataset: dataset), ("s004", renamed)],
    ids=["by name, for it was not read", "by pixels", "by pixels though renamed"],
)
def test_images_that_the_run_has_not_read_are_known_by_name(scene, half_read, moved, name_them):
    with pytest.raises(RunError, match="1 of 13 images of split 'test' were used otherwise") as refused:
        evaluate(half_read, name_them(drawn_anew(scene, {moved: "test"})), None)
    assert moved in str(refused.value)


def test_another_image_under_the_name_of_one_that_was_read_is_no_leak(scene, half_read):
    images = scene.source.images.copy()
    images[4] = 255 - images[4]
    changed = dataclasses.replace(drawn_anew(scene, {"s004": "test"}), source=Arrays(images))
    assert evaluate(half_read, changed, None, resamples=20)["n"] == 13


def test_features_do_not_hide_it(scene, store, tmp_path):
    folder = do(scene, store, tmp_path / "run").folder
    changed = renamed(drawn_anew(scene, {"s003": "test"}))
    with pytest.raises(RunError, match="1 of 13 images of split 'test' were used otherwise"):
        evaluate(folder, changed, make_store(tmp_path / "s.zarr", changed))


def test_images_that_only_grew_are_scored_and_so_are_images_from_elsewhere(scene, plain):
    extra = make_dataset(seed=7)
    grown = dataclasses.replace(scene, samples=scene.samples[:-1])  # one test image fewer
    assert evaluate(plain, grown, None, resamples=20)["n"] == 11
    assert evaluate(plain, renamed(extra), None, resamples=20)["n"] == 12


def test_the_data_of_the_training_are_scored_even_where_splits_share_an_image(tmp_path):
    dataset = make_dataset()
    dataset.source.images[40] = dataset.source.images[0]  # a leak of the data set's own, which the report names
    folder = do(dataset, None, tmp_path / "run", model=PLAIN).folder
    assert evaluate(folder, dataset, None, resamples=20)["n"] == 12
    np.testing.assert_array_equal(dataset.read(40), dataset.read(0))


def test_an_older_run_takes_its_own_data_only(scene, tmp_path):
    folder = do(scene, None, tmp_path / "run", model=PLAIN).folder
    (folder / "samples.csv").unlink()
    assert evaluate(folder, scene, None, resamples=20)["n"] == 12
    with pytest.raises(RunError, match="an older version trained it, which did not record its images"):
        evaluate(folder, renamed(scene), None)


@pytest.fixture
def images(tmp_path):
    """A folder of two classes without splits: ten black and ten grey images, and some noise to tell them apart."""
    random = np.random.default_rng(0)
    for name, light in (("benign", 0), ("malignant", 120)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            pixels = light + random.integers(0, 60, (16, 16), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_a_run_goes_on_when_the_folder_grows_because_no_image_moves(images, tmp_path):
    run = do(load_folder(images), None, tmp_path / "run", model=PLAIN).folder
    before = evaluate(run, load_folder(images), None, resamples=20)["n"]
    for i in range(30, 60):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16), np.uint8)
        Image.fromarray(pixels).save(images / "benign" / f"{i}.png")
    (images / "benign" / "3.png").rename(images / "benign" / "4a.png")
    grown = load_folder(images)
    scored = evaluate(run, grown, None, resamples=20)["n"]
    assert scored == len(grown.indices("test")) > before


def test_a_run_on_splits_drawn_as_before_says_what_moved_and_the_way_back(images, tmp_path):
    earlier, now = load_folder(images, draw="balanced"), load_folder(images)
    run = do(earlier, None, tmp_path / "run", model=PLAIN).folder
    way_back = r"Until version 0.2.0 .* `--set data.split.draw=balanced` draws them so"
    with pytest.raises(RunError, match=rf"images of split 'test' were used otherwise .* {way_back}"):
        evaluate(run, now, None)
    moved = {s.id for s in earlier.samples if s.split != "test"} & {
        s.id for s, was in zip(now.samples, earlier.samples, strict=True) if s.split != was.split
    }
    said = rf"of the \d+ images that it has used, {len(moved)} are in another split now and 0 are gone; '.*', for one,"
    with pytest.raises(RunError, match=rf"(?i){said} was in '\w+' and is in '\w+'. {way_back}"):
        check_samples(run, now)
    with pytest.raises(RunError, match=r"holds a run with other settings: data\.samples_sha256") as refused:
        do(now, None, run, model=PLAIN, options=QUICK)
    assert f"{len(moved)} are in another split now" in refused.value.__notes__[0]
    assert evaluate(run, load_folder(images, draw="balanced"), None, resamples=20)["n"] == len(earlier.indices("test"))
