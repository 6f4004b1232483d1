"""The same run on a store that has grown: rows are found wherever they lie, and what is otherwise is said."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import cache
from pipeline.errors import RunError
from pipeline.evaluate.evaluate import evaluate
from pipeline.evaluate.external import evaluate_elsewhere
from pipeline.explain.explain import explain
from pipeline.records import read_csv
from pipeline.train.identity import data_identity
from tests.train.scenes import QUICK, Arrays, do, make_dataset, make_store

TAPS = {"early": (5, 4, 4), "neck": (3, 4, 4)}


def features_of(dataset):
    """Features that follow from the id alone, so that stores of any samples agree."""
    return {
        tap: np.stack(
            [np.random.default_rng([int(s.id[1:]), len(tap)]).standard_normal(shape) for s in dataset.samples]
        )
        for tap, shape in TAPS.items()
    }


def grown(dataset, count=8, split="test"):
    """The data set with new images, which come first."""
    more = make_dataset((count, 0, 0), seed=5)
    new = [dataclasses.replace(s, id=f"s9{i:02d}", group=f"g9{i:02d}", split=split) for i, s in enumerate(more.samples)]
    images = np.concatenate([more.source.images, dataset.source.images])
    return dataclasses.replace(dataset, samples=(*new, *dataset.samples), source=Arrays(images))


@pytest.fixture
def before(tmp_path, scene):
    """A run on a store of the scene alone, evaluated."""
    store = make_store(tmp_path / "store.zarr", scene, features=features_of(scene))
    folder = do(scene, store, tmp_path / "run").folder
    evaluate(folder, scene, store, resamples=20)
    return folder, store


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_with_other_images_besides_serves_the_run_as_before(before, scene, tmp_path):
    folder, store = before
    more = grown(scene)
    newer = make_store(tmp_path / "newer.zarr", more, features=features_of(more))
    assert newer.ids[:2] == ("s900", "s901")  # the rows have moved
    assert newer.version != store.version
    assert data_identity(scene, newer) == data_identity(scene, store)
    wanted = contents(folder)
    assert do(scene, newer, folder).feeds == ()  # the training is done, and stays as it is
    found = evaluate(folder, scene, newer, resamples=20)
    assert "data_changed" not in found
    assert {name: data for name, data in contents(folder).items() if name.suffix != ".png"} == {
        name: data for name, data in wanted.items() if name.suffix != ".png"
    }
    assert explain(folder, scene, newer, count=1)


def test_a_store_whose_images_of_the_run_have_changed_is_another(before, scene, tmp_path):
    folder, store = before
    images = scene.source.images.copy()
    images[3] = 255 - images[3]
    other = dataclasses.replace(scene, source=Arrays(images))
    newer = make_store(tmp_path / "newer.zarr", other, features=features_of(other))
    assert data_identity(other, newer) != data_identity(scene, store)
    with pytest.raises(RunError, match=r"data\.pixels_sha256"):
        do(other, newer, folder)


def test_new_test_images_are_scored_and_the_earlier_scores_kept(before, scene, tmp_path):
    folder, _ = before
    earlier = {name: data for name, data in contents(folder).items() if name.suffix == ".csv" or name.stem == "metrics"}
    more = grown(scene)
    newer = make_store(tmp_path / "newer.zarr", more, features=features_of(more))
    found = evaluate(folder, more, newer, resamples=20)
    assert found["n"] == 20
    assert "0 are in another split now and 0 are gone; the data set had 48 images and has 56" in found["data_changed"]
    kept = contents(folder / "earlier/1")
    names = {"metrics.json", "predictions.csv", "roc.csv", "decision_curve.csv"}
    assert names <= {name.name for name in kept}
    assert all(earlier[name] == data for name, data in kept.items() if name in earlier)
    assert len(read_csv(folder / "predictions.csv")) == 20
    evaluate(folder, more, newer, resamples=20)  # on the same images again: nothing to keep
    assert not (folder / "earlier/2").exists()
    evaluate(folder, scene, newer, resamples=20)
    assert json.loads((folder / "earlier/2/metrics.json").read_text())["n"] == 20


def test_a_run_that_is_started_over_forgets_what_the_last_one_came_to(before, scene, tmp_path):
    folder, store = before
    elsewhere = make_dataset((8, 0, 8), seed=3)
    elsewhere = dataclasses.replace(
        elsewhere, samples=tuple(dataclasses.replace(s, id=f"s5{i:02d}") for i, s in enumerate(elsewhere.samples))
    )
    theirs = make_store(tmp_path / "theirs.zarr", elsewhere, features=features_of(elsewhere))
    evaluate_elsewhere(folder, "there", elsewhere, theirs, resamples=20)
    more = grown(scene)
    newer = make_store(tmp_path / "newer.zarr", more, features=features_of(more))
    evaluate(folder, more, newer, resamples=20)
    assert (folder / "external/there/metrics.json").is_file()
    assert (folder / "earlier/1/metrics.json").is_file()
    do(scene, store, folder, options=dataclasses.replace(QUICK, epochs=1), replace=True)
    assert not [path for path in folder.rglob("*") if path.name in ("external", "earlier", "metrics.json")]


def test_training_again_says_what_has_changed(before, scene, tmp_path):
    folder, _ = before
    more = grown(scene, split="train")
    newer = make_store(tmp_path / "newer.zarr", more, features=features_of(more))
    with pytest.raises(RunError, match="holds a run with other settings") as refused:
        do(more, newer, folder)
    assert "the data set had 48 images and has 56" in "".join(refused.value.__notes__)


def test_a_store_without_digests_tells_no_pixels(scene, tmp_path):
    make_store(tmp_path / "store.zarr", scene, features=features_of(scene)).close()
    cache.pseudonymise_store(
        tmp_path / "store.zarr", tmp_path / "copy.zarr", key=b"k" * 32, mapping=tmp_path / "ids.csv"
    )
    assert data_identity(scene, cache.open_store(tmp_path / "copy.zarr"))["pixels_sha256"] is None
