"""Training learns, repeats itself, survives any stop, and refuses what cannot work."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import run
from pipeline.augment import Augmentation
from pipeline.classifier import Classifier, ModelOptions
from pipeline.errors import ConfigError, DataError, RunError
from pipeline.feed import Feed
from pipeline.loop import Loop, batches_of, infer
from pipeline.optimise import TrainOptions, learning_rate
from pipeline.tasks import head_of, outputs_of
from pipeline.train import Machine, train
from tests.train.scenes import QUICK, TAPS, TINY, make_dataset, make_store

CPU = torch.device("cpu")
PLAIN = dataclasses.replace(TINY, gates=())
AUGMENTED = Augmentation(flip_vertical=0.5, rotation_degrees=5, brightness=0.1)


def weights_of(folder):
    classifier, _ = run.load_classifier(folder)
    return classifier.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def do(dataset, store, folder, **changes):
    settings = {"model": TINY, "options": QUICK, "augmentation": AUGMENTED} | changes
    return train(dataset, store, folder, **settings)


@pytest.fixture(scope="module")
def finished(scene, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return do(scene, store, folder)


def test_it_learns_what_the_images_show(scene, tmp_path):
    report = do(scene, None, tmp_path, model=PLAIN, options=dataclasses.replace(QUICK, epochs=6))
    assert report.metrics["val"]["auc"] > 0.95
    assert report.history[-1]["train_loss"] < 0.3


def test_it_learns_what_only_the_features_show(tmp_path):
    dataset = make_dataset(counts=(48, 16, 2))
    noise = np.random.default_rng(1).integers(0, 256, dataset.source.images.shape, dtype=np.uint8)
    dataset = dataclasses.replace(dataset, source=dataclasses.replace(dataset.source, images=noise))
    labels = dataset.labels.astype(float)[:, None, None, None]
    neck = np.broadcast_to(np.where(labels == 1, 2.0, -2.0), (66, 3, 4, 4))
    store = make_store(tmp_path / "s.zarr", dataset, taps={"neck": (3, 4, 4)}, features={"neck": neck})
    model = dataclasses.replace(TINY, gates=(("neck", "stage4"),), mix="multiply", reduction=1)
    options = dataclasses.replace(QUICK, epochs=6, lr=5e-3)
    gated = train(dataset, store, tmp_path / "gated", model=model, options=options)
    plain = train(dataset, store, tmp_path / "plain", model=dataclasses.replace(model, gates=()), options=options)
    assert gated.metrics["val"]["auc"] == 1.0
    assert plain.metrics["val"]["auc"] < 0.9


def test_the_same_seed_gives_the_same_weights_and_another_does_not(scene, store, finished, tmp_path):
    again = do(scene, store, tmp_path / "again")
    assert equal(weights_of(again.folder), weights_of(finished.folder))
    other = do(scene, store, tmp_path / "other", options=dataclasses.replace(QUICK, seed=2))
    assert not equal(weights_of(other.folder), weights_of(finished.folder))


@pytest.mark.parametrize("place", ["host", "stream"])
def test_the_place_of_the_data_changes_nothing(scene, store, finished, tmp_path, place):
    report = do(scene, store, tmp_path, machine=Machine(place=place))
    assert equal(weights_of(report.folder), weights_of(finished.folder))


def test_both_store_formats_give_the_same_run(scene, finished, tmp_path):
    report = do(scene, make_store(tmp_path / "scene.h5", scene), tmp_path / "run")
    assert equal(weights_of(report.folder), weights_of(finished.folder))
    figures = [{k: v for k, v in row.items() if k not in {"seconds", "wait_share"}} for row in report.history]
    expected = [{k: v for k, v in row.items() if k not in {"seconds", "wait_share"}} for row in finished.history]
    assert figures == expected


def test_training_leaves_the_callers_random_numbers_alone(scene, store, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    do(scene, store, tmp_path, options=dataclasses.replace(QUICK, epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("options", [QUICK, dataclasses.replace(QUICK, ema_decay=0.9, optimiser="sgd", lr=0.01)])
def test_a_run_stopped_at_any_step_ends_with_the_same_weights(scene, store, tmp_path, stop_at, options):
    whole = do(scene, store, tmp_path / "whole", options=options)

    def stop(task, done, total, **info):
        if task == "train" and done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(scene, store, tmp_path / "stopped", options=options, progress=stop)
    report = do(scene, store, tmp_path / "stopped", options=options)
    assert equal(weights_of(report.folder), weights_of(whole.folder))
    assert [row["epoch"] for row in report.history] == [1, 2, 3]
    assert [row["val_loss"] for row in report.history] == [row["val_loss"] for row in whole.history]


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.train.scenes import QUICK, TINY, make_dataset, make_store, register_tiny
from pipeline.train import train

register_tiny()
folder = Path(sys.argv[1])
dataset = make_dataset()
store = make_store(folder / "s.zarr", dataset)
kills = 0
for call in (1, 2, 3, 5, 6, 8, 4, 100):  # syncs of each attempt until the kill; the last attempt lives
    child = os.fork()
    if not child:
        remaining = [call]
        sync = os.fsync
        def fsync(fd):
            remaining[0] -= 1
            if not remaining[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(fd)
        os.fsync = fsync
        train(dataset, store, folder / "run", model=TINY, options=QUICK)
        os._exit(0)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
print(kills)
"""


def test_a_run_killed_while_it_writes_ends_with_the_same_weights(scene, store, tmp_path):
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 7
    whole = train(scene, store, tmp_path / "whole", model=TINY, options=QUICK)
    assert equal(weights_of(tmp_path / "run"), weights_of(whole.folder))
    files = {file.name for file in (tmp_path / "run").iterdir()}
    assert files == {"model.safetensors", "model.json", "settings.json", "history.csv", "history.json"}


def test_a_finished_run_is_left_as_it_is(scene, store, tmp_path):
    report = do(scene, store, tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = do(scene, store, tmp_path)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    assert (again.metrics, again.history) == (report.metrics, report.history)


def test_a_folder_takes_one_run(scene, store, tmp_path):
    quick = dataclasses.replace(QUICK, epochs=1)
    do(scene, store, tmp_path, options=quick)
    changed = dataclasses.replace(quick, lr=5e-4)
    message = r"holds a run with other settings: train.lr is 0.0005 and was 0.01. Name another folder, or replace"
    with pytest.raises(RunError, match=message):
        do(scene, store, tmp_path, options=changed)
    other = make_store(tmp_path / "other.zarr", scene, fields={"encoder": "other"})
    with pytest.raises(RunError, match=r"features.encoder is 'other' and was 'random'"):
        do(scene, other, tmp_path, options=quick)
    report = do(scene, store, tmp_path, options=changed, replace=True)
    assert report.history[0]["lr"] == pytest.approx(learning_rate(changed, 2, 3))


def test_the_history_is_a_table_and_json(finished):
    with (finished.folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    stored = json.loads((finished.folder / "history.json").read_text())
    assert stored == finished.history
    assert float(rows[1]["val_auc"]) == stored[1]["val_auc"]


def test_the_best_epoch_by_val_auc_is_kept(scene, store, finished, tmp_path):
    best = max(finished.history, key=lambda row: (row["val_auc"], -row["val_loss"]))
    assert finished.metrics["epoch"] == best["epoch"]
    classifier, description = run.load_classifier(finished.folder)
    feed = Feed(scene, "val", store, taps=TINY.taps, image_px=16, device=CPU)
    scores = infer(classifier, description.head, feed)
    assert scores.losses.mean() == pytest.approx(best["val_loss"])
    counts = finished.metrics["parameters"]
    assert counts["slca_share"] == counts["slca"] / counts["backbone"] > 0


@pytest.mark.parametrize("task", ["multiclass", "binary", "ordinal", "multilabel"])
def test_every_task_trains_and_scores(tmp_path, task):
    dataset = make_dataset(classes=2 if task == "binary" else 3, task=task)
    options = dataclasses.replace(QUICK, epochs=1, class_weights="balanced", label_smoothing=0.1)
    report = train(dataset, None, tmp_path, model=PLAIN, options=options)
    assert 0 <= report.metrics["val"]["auc"] <= 1
    classifier, description = run.load_classifier(tmp_path)
    feed = Feed(dataset, "test", None, taps=(), image_px=16, device=CPU)
    assert infer(classifier, description.head, feed).probabilities.shape == (12, len(dataset.class_names))


def test_patience_ends_a_run_that_has_stopped_improving(scene, tmp_path):
    options = dataclasses.replace(QUICK, epochs=30, patience=2)
    report = train(scene, None, tmp_path, model=PLAIN, options=options)
    assert len(report.history) == report.metrics["epoch"] + 2 < 30


def loop_of(dataset, store, options, model=TINY):
    feed = Feed(dataset, "train", store, taps=model.taps, image_px=model.image_px, device=CPU)
    head = head_of(dataset.task)
    torch.manual_seed(0)
    classifier = Classifier(model, TAPS, outputs_of(head, len(dataset.class_names)))
    return Loop(classifier, head, feed, options, Augmentation())


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


def test_a_loss_that_is_not_finite_names_step_samples_and_cause(scene, store, tmp_path):
    with pytest.raises(RunError, match=r"learning rate of 1e\+30 that is too high") as refusal:
        do(scene, store, tmp_path, options=dataclasses.replace(QUICK, lr=1e30, optimiser="sgd"))
    assert not (tmp_path / "model.json").exists()
    assert "checkpoint" in str(refusal.value)


def test_a_feature_that_is_not_finite_is_the_cause(scene, tmp_path):
    features = {tap: np.ones((48, *shape)) for tap, shape in TAPS.items()}
    features["neck"][7] = np.nan
    store = make_store(tmp_path / "s.zarr", scene, features=features)
    with pytest.raises(RunError, match=r"loss is nan at step \d+ .*stored features of tap 'neck' are not finite"):
        do(scene, store, tmp_path / "run")


def test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite(scene, store, tmp_path, monkeypatch):
    take_step = Loop._take_step

    def breaks(self, batch, whole, draws):
        if self.step == 4:  # the second epoch
            with torch.no_grad():
                next(self.classifier.parameters()).fill_(float("nan"))
        return take_step(self, batch, whole, draws)

    monkeypatch.setattr(Loop, "_take_step", breaks)
    with pytest.raises(RunError, match=r"The loss is nan at step \d+ on 8 of 8 samples"):
        do(scene, store, tmp_path)
    monkeypatch.undo()
    assert len(json.loads(run.load_checkpoint(tmp_path, CPU)["history"])) == 1
    assert len(do(scene, store, tmp_path).history) == 3


def test_a_val_split_of_one_class_is_refused_before_training(tmp_path):
    dataset = make_dataset()
    samples = tuple(dataclasses.replace(s, label=0) if s.split == "val" else s for s in dataset.samples)
    with pytest.raises(DataError, match=r"Split 'val' holds one class only \('a'\)"):
        do(dataclasses.replace(dataset, samples=samples), None, tmp_path / "run", model=PLAIN)
    assert not (tmp_path / "run").exists()


def test_gates_without_a_store_are_refused(scene, tmp_path):
    with pytest.raises(ConfigError, match=r"read features: name a store, or set gates to \[\]"):
        do(scene, None, tmp_path)


def test_a_broken_checkpoint_is_named(scene, store, tmp_path):
    run.begin(tmp_path, {}, replace=False)
    (tmp_path / "last.pt").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"last.pt' cannot be read .*: delete it and train again"):
        run.load_checkpoint(tmp_path, CPU)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"epochs": 0}, "epochs is 0"), ({"lr": 0.0}, "lr is 0.0"), ({"ema_decay": 1.0}, "ema_decay is 1.0")],
)
def test_impossible_options_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**wrong)


def test_pooling_in_the_model_and_in_the_store_trains_the_same_classifier(scene, tmp_path):
    full = np.random.default_rng(3).standard_normal((48, 6, 16, 16)).astype("float32")
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(full), 4).numpy()
    histories = []
    for name, features, pool in (("full", full, 4), ("pooled", pooled, 1)):
        store = make_store(
            tmp_path / f"{name}.zarr", scene, taps={"early": features.shape[1:]}, features={"early": features}
        )
        model = ModelOptions(backbone="tiny", image_px=16, gates=(("early", "stage1"),), pool=pool)
        histories.append(do(scene, store, tmp_path / name, model=model).history)
    for key in ("train_loss", "val_loss"):
        assert [row[key] for row in histories[0]] == pytest.approx([row[key] for row in histories[1]], abs=1e-5)


def test_two_processes_train_as_one(scene, store, tmp_path):
    augmentation = Augmentation(flip_horizontal=0.5, rotation_degrees=10)
    alone = do(scene, store, tmp_path / "alone", augmentation=augmentation)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.train.team_member", str(store.path), str(tmp_path / "team")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    together = run.read_history(tmp_path / "team")
    for key in ("lr", "train_loss", "val_loss", "val_auc"):
        assert [row[key] for row in together] == pytest.approx([row[key] for row in alone.history], rel=1e-3), key
    for name, value in weights_of(tmp_path / "team").items():
        torch.testing.assert_close(value, weights_of(alone.folder)[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("machine", [Machine(channels_last=False), Machine(compiled=True)])
def test_layout_and_compiler_change_rounding_and_nothing_else(scene, store, tmp_path, monkeypatch, machine):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiler(module, backend="eager"))
    losses = []
    for number, chosen in enumerate((Machine(), machine)):
        steps = []

        def note(task, done, total, steps=steps, **info):
            if task == "train":
                steps.append(info["loss"])

        do(scene, store, tmp_path / str(number), machine=chosen, progress=note)
        losses.append(steps)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)  # before the first step
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=0.05)  # rounding grows with each


def test_a_margin_keeps_training_images_larger_and_val_as_the_classifier_sees_it(tmp_path, monkeypatch):
    dataset = make_dataset(side=32)
    sizes = []
    batches = Feed.batches

    def watched(self, order):
        for batch in batches(self, order):
            sizes.append((self.description.split(":")[0], batch.images.shape[-1]))
            yield batch

    monkeypatch.setattr(Feed, "batches", watched)
    augmentation = Augmentation(crop=0.8, margin=0.25)
    options = dataclasses.replace(QUICK, epochs=1)
    report = train(dataset, None, tmp_path, model=PLAIN, options=options, augmentation=augmentation)
    assert set(sizes) == {("train", 20), ("val", 16)}
    assert np.isfinite(report.history[0]["train_loss"])


def test_reduced_precision_trains_where_it_is_asked_for(scene, store, tmp_path):
    options = dataclasses.replace(QUICK, precision="bfloat16")
    report = do(scene, store, tmp_path / "reduced", options=options)
    whole = do(scene, store, tmp_path / "whole")
    assert report.history[0]["train_loss"] != whole.history[0]["train_loss"]
    assert report.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=0.1)


def test_tensorboard_gets_a_file_per_epoch(scene, tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    do(scene, None, tmp_path, model=PLAIN, machine=Machine(tensorboard=True))
    assert len(list((tmp_path / "tensorboard").iterdir())) == QUICK.epochs


def test_tensorboard_is_asked_for_before_an_epoch_is_lost(scene, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="needs the extra of that name: install it with"):
        do(scene, None, tmp_path, model=PLAIN, machine=Machine(tensorboard=True))
    assert not (tmp_path / "history.csv").exists()
