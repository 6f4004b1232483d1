"""What makes a run another run, beside its settings: first weights, groups; and what an older record leaves open."""

from __future__ import annotations

import dataclasses
import json

import pytest
import safetensors.torch

from pipeline import records
from pipeline.errors import RunError
from pipeline.evaluate.compare import other_settings
from pipeline.model.overlay import OverlayOptions
from pipeline.train.augment import Augmentation
from pipeline.train.identity import changed_inputs, identity_of, recorded_identity
from pipeline.train.train import training_part
from tests.train.scenes import PLAIN, QUICK, Tiny, do, equal, weights_of

ONE_EPOCH = dataclasses.replace(QUICK, epochs=1)


def write_weights(file, scale):
    safetensors.torch.save_file({key: value * scale for key, value in Tiny().state_dict().items()}, file)


def as_before(folder, *keys):
    """Take out of a run's record what earlier versions did not write."""
    for name, among in (("settings.json", ()), ("model.json", ("provenance", "settings"))):
        written = record = json.loads((folder / name).read_text())
        for key in among:
            record = record[key]
        for key in keys:
            section, _, leaf = key.rpartition(".")
            del (record[section] if section else record)[leaf]
        records.write_json(folder / name, written)


@pytest.fixture
def started(scene, tmp_path):
    """A function that trains, in a folder, the plain classifier from the weights in a file; and that file."""
    file = tmp_path / "first.safetensors"
    write_weights(file, 1.0)
    model = dataclasses.replace(PLAIN, weights=str(file))

    def start(folder, **changes):
        return do(scene, None, tmp_path / folder, model=model, options=ONE_EPOCH, **changes)

    return start, file


def test_other_first_weights_in_the_same_file_make_another_run(started, scene, tmp_path):
    start, file = started
    first = start("run")
    assert start("run").feeds == ()
    before = weights_of(first.folder)
    write_weights(file, 0.5)
    assert [found.field for found in changed_inputs(first.folder, scene, None, file)] == ["first_weights_sha256"]
    with pytest.raises(RunError, match=r"holds a run with other settings: first_weights_sha256 is '\w{12}' and was '"):
        start("run")
    other = start("other")
    (said,) = other_settings(first.folder, other.folder)
    assert said["setting"] == "first_weights_sha256"
    assert start("run", replace=True).feeds
    assert equal(weights_of(first.folder), weights_of(other.folder))
    assert not equal(weights_of(first.folder), before)


def test_a_run_that_did_not_record_its_first_weights_stays_valid(started, scene, tmp_path):
    start, file = started
    folder = start("run").folder
    as_before(folder, "first_weights_sha256")
    before = weights_of(folder)
    write_weights(file, 0.5)
    assert start("run", replace=True).feeds == ()
    assert equal(weights_of(folder), before)
    assert changed_inputs(folder, scene, None, file) == ()
    file.unlink()  # as where they were deleted once all runs were made
    assert changed_inputs(folder, scene, None, file) == ()


def in_pairs(dataset):
    """The data set with two images to a group."""
    samples = [
        dataclasses.replace(sample, group=f"{sample.split} {number // 2}")
        for number, sample in enumerate(dataset.samples)
    ]
    return dataclasses.replace(dataset, samples=tuple(samples))


def test_other_groups_make_another_run_for_they_choose_the_training_part(scene, tmp_path):
    half, paired = dataclasses.replace(ONE_EPOCH, fraction=0.5), in_pairs(scene)
    assert training_part(scene, half) != training_part(paired, half)
    folder = do(scene, None, tmp_path / "run", model=PLAIN, options=half).folder
    with pytest.raises(RunError, match=r"holds a run with other settings: data\.groups_sha256"):
        do(paired, None, folder, model=PLAIN, options=half)
    assert [found.field for found in changed_inputs(folder, paired, None, None)] == ["data.groups_sha256"]
    as_before(folder, "data.groups_sha256")
    assert do(paired, None, folder, model=PLAIN, options=half).feeds == ()
    assert changed_inputs(folder, paired, None, None) == ()


def test_drawn_weights_have_no_digest(scene, tmp_path):
    folder = do(scene, None, tmp_path / "run", model=PLAIN, options=ONE_EPOCH).folder
    assert "first_weights_sha256" not in recorded_identity(folder)
    assert changed_inputs(folder, scene, None, None) == ()


def test_an_option_of_the_overlay_that_came_later_counts_only_where_it_is_used(scene):
    def recorded(**options):
        model = dataclasses.replace(PLAIN, overlay=OverlayOptions(min_iou=0.5, **options))
        return identity_of(scene, None, model, ONE_EPOCH, Augmentation())["model"]["overlay"]

    assert "min_stability" not in recorded()
    assert recorded(min_stability=0.9) == recorded() | {"min_stability": 0.9}
