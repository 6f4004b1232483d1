"""CLIP in training: stops, adapters, what moves and what does not, and which tasks it takes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.explain.heat import look
from pipeline.model.classifier import ModelOptions
from pipeline.model.clip_backbone import ClipOptions
from pipeline.train import trained_model
from pipeline.train.finished_run import Trained
from pipeline.train.forward import infer
from pipeline.train.loop import share_of_alignment
from pipeline.train.optimise import TrainOptions
from pipeline.train.train import Machine, train
from tests.train.scenes import do, equal, make_dataset, weights_of

DEMO = ModelOptions(backbone="clip:demo", image_px=32, gates=())
OPTIONS = TrainOptions(epochs=2, batch_size=8, lr=1e-3, seed=1, text_lr=0.5)
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 5},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def transformer(tmp_path):
    """A small transformer of a folder."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    return dataclasses.replace(DEMO, backbone=f"clip:local-dir:{tmp_path / 'small'}")


def started(scene, model, **changes):
    """The weights that a training starts with, as a finished model has them."""
    report = do(scene, None, changes.pop("folder"), model=model, options=TrainOptions(
        **{"epochs": 1, "batch_size": 8, "lr": 1e-12, "weight_decay": 0.0, "seed": 1, **changes}))  # fmt: skip
    return weights_of(report.folder)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_stopped_run_ends_with_the_same_weights(scene, tmp_path, transformer, adapters):
    model = dataclasses.replace(transformer, clip=ClipOptions(lora=2)) if adapters else DEMO
    whole = do(scene, None, tmp_path / "whole", model=model, options=OPTIONS)

    def stop(task, done, total, **info):
        if task == "train" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(scene, None, tmp_path / "stopped", model=model, options=OPTIONS, progress=stop)
    report = do(scene, None, tmp_path / "stopped", model=model, options=OPTIONS)
    assert equal(weights_of(report.folder), weights_of(whole.folder))
    assert [row["val_loss"] for row in report.history] == [row["val_loss"] for row in whole.history]
    description = trained_model.load_description(report.folder)
    assert description.model == model
    assert description.clip["prompts"] == {name: [f"This is a photo of {name}"] for name in "ab"}
    assert not any("text" in key or "lora" in key for key in weights_of(report.folder))


def test_a_finished_model_needs_no_folder_and_no_words(scene, tmp_path, transformer):
    report = do(scene, None, tmp_path / "run", model=transformer, options=dataclasses.replace(OPTIONS, text_lr=0.0))
    (tmp_path / "small" / "open_clip_config.json").unlink()
    classifier, description = trained_model.load_classifier(report.folder)
    assert classifier.backbone.head[-1].classes.norm(dim=1) == pytest.approx([1, 1])
    assert str(tmp_path) not in json.dumps(dict(description.clip))


def test_text_frozen_stays_and_a_frozen_tower_leaves_the_temperature(scene, tmp_path, transformer):
    before = started(scene, transformer, folder=tmp_path / "start")
    frozen = dataclasses.replace(OPTIONS, text_lr=0.0, freeze=("backbone",), epochs=1)
    after = weights_of(do(scene, None, tmp_path / "frozen", model=transformer, options=frozen).folder)
    moved = {key for key in after if not torch.allclose(before[key], after[key], atol=1e-7)}
    assert moved == {"backbone.head.1.logit_scale"}
    last = dataclasses.replace(frozen, freeze=("stem", "stage1", "stage2", "stage3", "stage4"), text_lr=1.0)
    after = weights_of(do(scene, None, tmp_path / "last", model=transformer, options=last).folder)
    moved = {key for key in after if not torch.allclose(before[key], after[key], atol=1e-7)}
    assert {key.split(".")[1] for key in moved} == {"head"}
    assert "backbone.head.1.classes" in moved


def test_alignment_is_half_of_the_objective_of_clip_and_nothing_of_others():
    assert share_of_alignment(OPTIONS, "clip:demo") == 0.5
    assert share_of_alignment(dataclasses.replace(OPTIONS, alignment=0.2), "clip:demo") == 0.2
    plain = TrainOptions()
    assert share_of_alignment(plain, "resnet18") == 0.0
    for key in ("alignment", "text_lr"):
        with pytest.raises(ConfigError, match=rf"train's {key} is 0.3, and 'resnet18' reads no texts"):
            share_of_alignment(dataclasses.replace(plain, **{key: 0.3}), "resnet18")
    with pytest.raises(ConfigError, match=r"alignment is 1\.5: give its share of the objective, from 0 to 1"):
        TrainOptions(alignment=1.5)
    with pytest.raises(ConfigError, match="text_lr is -1"):
        TrainOptions(text_lr=-1)


def test_the_objective_is_weighed_as_it_says(scene, tmp_path):
    first = {}
    for share in (0.0, 0.5, 1.0):
        options = TrainOptions(epochs=1, batch_size=24, lr=1e-9, seed=1, alignment=share)
        report = train(scene, None, tmp_path / f"{share}", model=DEMO, options=options)
        first[share] = report.history[0]["train_loss"]
    assert first[0.5] == pytest.approx((first[0.0] + first[1.0]) / 2, abs=1e-5)
    assert abs(first[0.0] - first[1.0]) > 1e-3


def test_tasks_that_are_not_one_of_several_prompts_are_refused_before_long_work(tmp_path):
    several = make_dataset(classes=3, task="multilabel")
    with pytest.raises(ConfigError, match=r"task of 'scene' is multilabel: for several labels at once choose another"):
        do(several, None, tmp_path / "a", model=DEMO, options=OPTIONS)
    grades = make_dataset(classes=3, task="ordinal")
    with pytest.raises(ConfigError, match=r"is ordinal: set train.loss to 'cross_entropy', or choose another backbone"):
        do(grades, None, tmp_path / "b", model=DEMO, options=OPTIONS)
    assert not (tmp_path / "a").exists()


def test_grad_cam_sees_the_patches_of_a_transformer(scene, tmp_path, transformer):
    report = do(scene, None, tmp_path / "run", model=transformer, options=dataclasses.replace(OPTIONS, epochs=1))
    opened = Trained(report.folder, scene, None, machine=Machine())
    feed = opened.feed("test")
    heat = look(opened.classifier, opened.description.head, feed)
    assert heat.probabilities == pytest.approx(infer(opened.classifier, opened.description.head, feed).probabilities)
    assert heat.grad_cam.values.shape == (12, 1, 4, 4)
    assert (heat.grad_cam.values.flatten(1).amax(dim=1) > 0).any()
