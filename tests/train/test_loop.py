"""What one epoch does with its options: schedules, clipping, frozen parts, sampling."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.model.backbones import standardise
from pipeline.model.classifier import Classifier
from pipeline.model.geometry import sample_image
from pipeline.model.tasks import head_of, outputs_of
from pipeline.train.augment import Augmentation
from pipeline.train.feeding.feed import Feed
from pipeline.train.loop import Loop, batches_of
from pipeline.train.optimise import TrainOptions, build_optimiser, learning_rate, set_learning_rate
from tests.train.scenes import PLAIN, QUICK, TAPS, TINY, make_dataset

CPU = torch.device("cpu")


def loop_of(dataset, store, options, model=TINY, augmentation=None):
    feed = Feed(dataset, "train", store, taps=model.taps, image_px=model.image_px, device=CPU)
    head = head_of(dataset.task)
    torch.manual_seed(0)
    classifier = Classifier(model, TAPS, outputs_of(head, len(dataset.class_names)))
    return Loop(classifier, head, feed, options, augmentation or Augmentation())


def silent(task, done, total, **info):
    return None


def test_frozen_parts_stay_as_they_start(scene, store):
    loop = loop_of(scene, store, dataclasses.replace(QUICK, freeze=("stem", "stage2")))
    before = {key: value.clone() for key, value in loop.classifier.state_dict().items()}
    loop.run_epoch(0, silent)
    moved = {
        key.split(".")[2]
        for key, value in loop.classifier.state_dict().items()
        if not torch.equal(before[key], value)
        if key.startswith("backbone.stages")
    }
    assert moved == {"1", "3", "4"}
    probe = loop_of(scene, store, dataclasses.replace(QUICK, freeze=("backbone",)), PLAIN)
    trainable = [key for key, p in probe.classifier.named_parameters() if p.requires_grad]
    assert trainable == ["backbone.head.2.weight", "backbone.head.2.bias"]
    with pytest.raises(ConfigError, match="freeze names 'stage9': choose from stem"):
        loop_of(scene, store, dataclasses.replace(QUICK, freeze=("stage9",)))


def test_gradients_are_clipped_to_the_norm_asked_for(scene, store):
    steps = []
    for clip in (0.0, 1e-4):
        options = dataclasses.replace(
            QUICK, optimiser="sgd", clip_norm=clip, schedule="constant", lr=1.0, batch_size=24
        )
        loop = loop_of(scene, store, options)
        before = torch.cat([p.detach().flatten().clone() for p in loop.classifier.parameters()])
        loop.run_epoch(0, silent)
        after = torch.cat([p.detach().flatten() for p in loop.classifier.parameters()])
        steps.append((after - before).norm().item())
    assert steps[1] == pytest.approx(1.9e-4, rel=0.02)  # lr * norm * (1 + Nesterov's momentum), one step
    assert steps[0] > 0.01


def test_balanced_sampling_draws_rare_classes_as_often(tmp_path):
    dataset = make_dataset(counts=(400, 4, 4))
    rare = tuple(
        dataclasses.replace(s, label=int(i % 10 == 0) if s.split == "train" else s.label)
        for i, s in enumerate(dataset.samples)
    )
    dataset = dataclasses.replace(dataset, samples=rare)
    loop = loop_of(dataset, None, dataclasses.replace(QUICK, sampling="balanced"), PLAIN)
    drawn = torch.cat([loop._order(epoch) for epoch in range(5)])
    assert loop.feed.labels[drawn].mean() == pytest.approx(0.5, abs=0.05)


def test_a_last_batch_of_one_joins_the_batch_before():
    assert [len(b) for b in batches_of(torch.arange(9), 4)] == [4, 5]
    assert [len(b) for b in batches_of(torch.arange(10), 4)] == [4, 4, 2]
    assert torch.equal(torch.cat(batches_of(torch.arange(9), 4)), torch.arange(9))


def test_learning_rates_follow_their_schedules():
    def rates(**options):
        settings = TrainOptions(**{"epochs": 4, "lr": 1.0} | options)
        return [round(learning_rate(settings, step, 2), 6) for step in range(8)]

    assert rates(schedule="constant") == [1.0] * 8
    assert rates(schedule="step", milestones=(1, 3), gamma=0.1) == [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert rates(schedule="poly") == [round((1 - step / 8) ** 0.9, 6) for step in range(8)]
    assert rates() == [round((1 + np.cos(np.pi * step / 8)) / 2, 6) for step in range(8)]
    warmed = rates(warmup_epochs=2)
    assert warmed[:4] == [0.25, 0.5, 0.75, 1.0]
    assert warmed[4:] == [round((1 + np.cos(np.pi * step / 4)) / 2, 6) for step in range(4)]
    assert rates(warmup_epochs=0.5)[:2] == [1.0, round((1 + np.cos(np.pi * 0.5 / 3.5 * 0)) / 2, 6)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"epochs": 0}, "epochs is 0"), ({"lr": 0.0}, "lr is 0.0"), ({"ema_decay": 1.0}, "ema_decay is 1.0")],
)
def test_impossible_options_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**wrong)


def test_gates_move_with_the_images_that_they_belong_to(scene, store, monkeypatch):
    augmentation = Augmentation(flip_horizontal=0.5, rotation_degrees=90, shift=0.1)
    loop = loop_of(scene, store, QUICK, augmentation=augmentation)
    given, seen = [], []
    batches, forward = Feed.batches, Classifier.forward

    def watched_batches(self, order):
        for batch in batches(self, order):
            given.append(batch)
            yield batch

    def watched_forward(self, images, features, extents=None, affine=None):
        seen.append((images.detach().clone(), features, affine))
        return forward(self, images, features, extents, affine)

    monkeypatch.setattr(Feed, "batches", watched_batches)
    monkeypatch.setattr(Classifier, "forward", watched_forward)
    loop.run_epoch(0, silent)
    assert len(seen) == len(given) == 3
    for batch, (images, features, affine) in zip(given, seen, strict=True):
        torch.testing.assert_close(images, standardise(sample_image(batch.images, affine, 16)))
        assert len(affine.unique(dim=0)) == len(affine)  # a map for each sample
        assert features.keys() == set(TAPS)
        for position, early in zip(batch.positions.tolist(), features["early"], strict=True):
            row = store.ids.index(scene.samples[scene.indices("train")[position]].id)
            assert torch.equal(early, torch.from_numpy(store.read([row])["early"][0]))


def test_the_gates_alone_have_a_rate_of_their_own():
    torch.manual_seed(0)
    classifier = Classifier(TINY, TAPS, outputs=2)
    options = dataclasses.replace(QUICK, gate_lr=7.0, weight_decay=0.5)
    optimiser = build_optimiser(options, classifier)
    set_learning_rate(optimiser, 0.01)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert len(rates) == len(list(classifier.parameters()))
    for name, parameter in classifier.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.07 if name.startswith("gates.") else 0.01), name
        assert decays[id(parameter)] == (0.5 if parameter.ndim > 1 else 0.0), name


def test_without_gates_their_rate_is_nothing():
    plain = Classifier(PLAIN, {}, outputs=2)
    assert {group["times"] for group in build_optimiser(QUICK, plain).param_groups} == {1.0}
