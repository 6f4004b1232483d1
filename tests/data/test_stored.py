"""A store as a data set: labels, splits and groups that travel with it."""

from __future__ import annotations

import numpy as np
import pytest

import cache
from cache.labels import parse_labels
from pipeline.data import pixel_digest
from pipeline.data.layouts.stored import load_stored
from pipeline.errors import DataError
from tests.train.scenes import make_dataset, make_store


def sent(tmp_path, dataset, labels, **options):
    make_store(tmp_path / "home.zarr", dataset, **options).close()
    cache.convert_store(tmp_path / "home.zarr", tmp_path / "sent.zarr", labels=labels).close()
    return tmp_path / "sent.zarr"


def labels_of(dataset, **changes):
    samples = dataset.samples
    given = {
        "class_names": dataset.class_names,
        "labels": tuple(sample.label for sample in samples),
        "splits": tuple(sample.split for sample in samples),
        "groups": tuple(f"patient {i // 2}" for i in range(len(samples))),
        "task": dataset.task,
    }
    return cache.Labels(**{**given, **changes})


@pytest.mark.parametrize("task", ["multiclass", "ordinal", "multilabel"])
def test_samples_are_those_that_were_sent(tmp_path, task):
    dataset = make_dataset(classes=3, task=task)
    found = load_stored(sent(tmp_path, dataset, labels_of(dataset)))
    assert found.task == task
    assert found.class_names == dataset.class_names
    for ours, theirs in zip(found.samples, dataset.samples, strict=True):
        assert (ours.id, ours.label, ours.split) == (theirs.id, theirs.label, theirs.split)
    assert found.samples[5].group == "patient 2"
    assert found.recorded_digest(7) == pixel_digest(dataset.read(7))
    with pytest.raises(DataError, match=r"there is no image of 's003', a sample of a store of features"):
        found.read(3)


def test_an_older_store_says_less_and_is_read_for_what_it_says(tmp_path):
    dataset = make_dataset(classes=3, task="ordinal")
    found = load_stored(sent(tmp_path, dataset, labels_of(dataset, groups=(), task="")))
    assert found.task == "multiclass"
    assert found.samples[5].group == found.samples[5].id
    assert load_stored(tmp_path / "sent.zarr", task="ordinal").task == "ordinal"
    stored = cache.Labels(("a", "b"), (0, 1), ("train", "val")).to_json()
    assert stored.keys() == {"class_names", "labels", "splits"}  # as older versions read it


def test_groups_get_pseudonyms_and_stay_together(tmp_path):
    dataset = make_dataset()
    make_store(tmp_path / "home.zarr", dataset).close()
    cache.pseudonymise_store(
        tmp_path / "home.zarr", tmp_path / "sent.zarr", key=bytes(range(32)), mapping=tmp_path / "who.csv",
        labels=labels_of(dataset),
    ).close()  # fmt: skip
    found = load_stored(tmp_path / "sent.zarr")
    new = cache.keyed_pseudonyms([sample.id for sample in dataset.samples], bytes(range(32)))
    group = {sample.id: sample.group for sample in found.samples}
    groups = [group[new[sample.id]] for sample in dataset.samples]
    assert cache.are_pseudonyms(groups)
    assert len(set(groups)) == len(groups) // 2
    assert groups[4] == groups[5] != groups[6]
    label = {sample.id: (sample.label, sample.split) for sample in found.samples}
    assert [label[new[s.id]] for s in dataset.samples] == [(s.label, s.split) for s in dataset.samples]
    assert b"patient" not in b"".join(
        path.read_bytes() for path in (tmp_path / "sent.zarr").rglob("*") if path.is_file()
    )
    assert found.recorded_digest(0) is None
    with pytest.raises(DataError, match="a pseudonym of a store of features"):
        found.read(0)


def test_labels_of_a_stranger_are_looked_at(tmp_path):
    dataset = make_dataset()
    strange = tuple("holdout" if s.split == "test" else s.split for s in dataset.samples)
    path = sent(tmp_path, dataset, labels_of(dataset, splits=strange))
    with pytest.raises(DataError, match=r"name the splits 'holdout'; expected train, val, test"):
        load_stored(path)
    good = {"class_names": ["a", "b"], "labels": [0, 1], "splits": ["train", "val"]}
    assert parse_labels({**good, "groups": ["x", "y"], "task": "binary"}, 2, "here").groups == ("x", "y")
    for wrong in ({"groups": ["x"]}, {"groups": [1, 2]}, {"groups": "xy"}, {"task": 3}, {"grops": ["x", "y"]}):
        with pytest.raises(cache.UntrustedStoreError):
            parse_labels({**good, **wrong}, 2, "here")


def test_a_class_that_train_lacks_is_named(tmp_path):
    dataset = make_dataset()
    labels = tuple(0 if s.split == "train" else s.label for s in dataset.samples)
    path = sent(tmp_path, dataset, labels_of(dataset, labels=labels, groups=()))
    with pytest.raises(DataError, match=r"train has no sample of 'b"):
        load_stored(path)


def test_stored_images_are_those_that_were_stored(tmp_path):
    dataset = make_dataset(side=32)
    images = {"image": np.stack([image.transpose(2, 0, 1) for image in dataset.source.images])}
    rows = [cache.Row(sample.id, pixel_digest(dataset.read(i))) for i, sample in enumerate(dataset.samples)]
    specs = {"image": cache.TapSpec(3, 32, 32, "uint8")}
    with cache.create_store(
        tmp_path / "i.zarr", fingerprint=cache.Fingerprint({}), taps=specs, rows=rows, labels=labels_of(dataset)
    ) as writer:
        for plan in writer.pending:
            part = {"image": np.ascontiguousarray(images["image"][list(plan.rows)])}
            writer.write(plan, part, np.ones((len(plan.rows), 2), np.float32))
        writer.commit().close()
    found = load_stored(tmp_path / "i.zarr")
    np.testing.assert_array_equal(found.read(9), dataset.read(9))
