"""A run survives any stop, shares its folder with no other, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import records
from pipeline.errors import ConfigError, DataError, PipelineError, RunError
from pipeline.train import run_folder
from pipeline.train.augment import Augmentation
from pipeline.train.loop import Loop
from pipeline.train.optimise import learning_rate
from pipeline.train.train import train
from tests.train.scenes import PLAIN, QUICK, STEADY, TAPS, TINY, do, equal, make_dataset, make_store, weights_of

CPU = torch.device("cpu")


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


def test_a_stop_right_after_the_last_checkpoint_loses_no_row_of_the_history(scene, store, tmp_path, monkeypatch):
    write, whole = records.write_json, do(scene, store, tmp_path / "whole").history

    def stop(path, value):
        if path.name == "history.json" and len(value) == QUICK.epochs:
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(records, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        do(scene, store, tmp_path / "stopped")
    monkeypatch.undo()
    report = do(scene, store, tmp_path / "stopped")
    written = run_folder.read_history(report.folder)
    assert written == report.history
    assert [row["val_loss"] for row in written] == [row["val_loss"] for row in whole]
    assert len((report.folder / "history.csv").read_text().splitlines()) == 1 + QUICK.epochs


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.train.scenes import QUICK, TINY, make_dataset, make_store, register_tiny
from pipeline.train.train import train

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
    assert files == {"samples.csv", "model.safetensors", "model.json", "settings.json", "history.csv", "history.json"}


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
    message = r"holds a run with other settings: train.lr is 0.0005 and was 0.01\. .* \(`--set run=.*`--replace`"
    with pytest.raises(RunError, match=message):
        do(scene, store, tmp_path, options=changed)
    other = make_store(tmp_path / "other.zarr", scene, fields={"encoder": "other"})
    with pytest.raises(RunError, match=r"features.encoder is 'other' and was 'random'"):
        do(scene, other, tmp_path, options=quick)
    report = do(scene, store, tmp_path, options=changed, replace=True)
    assert report.history[0]["lr"] == pytest.approx(learning_rate(changed, 2, 3))


def test_nothing_of_a_run_outlives_it_in_its_folder(scene, store, tmp_path):
    do(scene, store, tmp_path, options=dataclasses.replace(QUICK, epochs=1))
    for name in ("probe.json", "probe.csv", "probe.png", "report.html", "metrics.json", "mine.txt"):
        (tmp_path / name).write_text("of the run before")
    for name in ("tensorboard", "explain", "external", "earlier"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of_the_run_before").touch()
    do(scene, store, tmp_path, options=dataclasses.replace(QUICK, epochs=1, lr=5e-4), replace=True)
    files = {"samples.csv", "model.safetensors", "model.json", "settings.json", "history.csv", "history.json"}
    assert {path.name for path in tmp_path.iterdir()} == files | {"mine.txt"}


def test_a_folder_has_one_process_that_writes_it(scene, store, tmp_path):
    other, tried = dataclasses.replace(QUICK, lr=5e-4), []

    def meanwhile(task, done, total, **info):
        if task == "epoch" and done == 2:
            for options in (QUICK, other):
                with pytest.raises(RunError, match=r"is being written by process \d+ since"):
                    do(scene, store, tmp_path / "run", options=options, replace=True)
                tried.append(options)

    report = do(scene, store, tmp_path / "run", progress=meanwhile)
    assert tried == [QUICK, other]
    assert [row["epoch"] for row in report.history] == [1, 2, 3]
    assert not (tmp_path / "run" / "lock").exists()


def test_a_loss_that_is_not_finite_names_step_samples_and_cause(scene, store, tmp_path):
    with pytest.raises(RunError, match=r"learning rate of 1e\+30 that is too high") as refusal:
        do(scene, store, tmp_path, options=dataclasses.replace(QUICK, lr=1e30, optimiser="sgd"))
    assert not (tmp_path / "model.json").exists()
    assert "checkpoint" in str(refusal.value)


def test_a_feature_that_is_not_finite_is_the_cause(scene, tmp_path):
    features = {tap: np.ones((48, *shape)) for tap, shape in TAPS.items()}
    features["neck"][7] = np.nan
    store = make_store(tmp_path / "s.zarr", scene, features=features)
    with pytest.raises(RunError, match=r"stored features of tap 'neck' are not finite in sample 's007'"):
        do(scene, store, tmp_path / "run")


def test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite(scene, store, tmp_path, monkeypatch):
    take_step = Loop._take_step

    def breaks(self, batch, whole, draws):
        if self.step == 4:  # the second epoch
            with torch.no_grad():
                next(self.classifier.parameters()).fill_(float("nan"))
        return take_step(self, batch, whole, draws)

    monkeypatch.setattr(Loop, "_take_step", breaks)
    with pytest.raises(RunError, match="The loss is nan at step 5 on 8 of 8 samples"):
        do(scene, store, tmp_path)
    monkeypatch.undo()
    assert len(json.loads(run_folder.load_checkpoint(tmp_path, CPU)["history"])) == 1
    assert len(do(scene, store, tmp_path).history) == 3


def test_a_val_split_of_one_class_is_refused_before_training(tmp_path):
    dataset = make_dataset()
    samples = tuple(dataclasses.replace(s, label=0) if s.split == "val" else s for s in dataset.samples)
    with pytest.raises(DataError, match=r"Split 'val' holds one class only \('a'\)"):
        do(dataclasses.replace(dataset, samples=samples), None, tmp_path / "run", model=PLAIN)
    assert not (tmp_path / "run").exists()


def test_gates_without_a_store_are_refused(scene, tmp_path):
    with pytest.raises(ConfigError, match=r"^The gates .* read features: name a store, or set gates to \[\]"):
        do(scene, None, tmp_path)


def test_a_broken_checkpoint_is_named(scene, store, tmp_path):
    run_folder.begin(tmp_path, {}, replace=False)
    (tmp_path / "last.pt").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"last.pt' cannot be read .*: delete it and train again"):
        run_folder.load_checkpoint(tmp_path, CPU)


def test_two_processes_train_as_one(scene, store, tmp_path):
    augmentation = Augmentation(flip_horizontal=0.5, rotation_degrees=10)
    alone = do(scene, store, tmp_path / "alone", augmentation=augmentation, options=STEADY)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.train.team_member", str(store.path), str(tmp_path / "team")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    together = run_folder.read_history(tmp_path / "team")
    for key in ("lr", "train_loss", "val_loss", "val_auc"):
        assert [row[key] for row in together] == pytest.approx([row[key] for row in alone.history], rel=1e-4), key
    for name, value in weights_of(tmp_path / "team").items():
        torch.testing.assert_close(value, weights_of(alone.folder)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet81"}, "resnet81"),
        ({"gates": (("early", "stage9"),)}, "names no stage"),
        ({"gates": (("late", "stage1"),)}, "holds no tap 'late'"),
        ({"weights": "there/is/none.pth"}, "no file of weights"),
    ],
)
def test_a_typo_is_found_before_anything_is_decoded_or_written(scene, store, tmp_path, change, message):
    reads = []
    watched = dataclasses.replace(scene, source=Watched(scene.source, reads))
    with pytest.raises(PipelineError, match=message):
        do(watched, store, tmp_path / "run", model=dataclasses.replace(TINY, **change))
    assert not reads
    assert not (tmp_path / "run").exists()


def test_balanced_sampling_of_several_labels_is_refused_before_anything_is_decoded_or_written(tmp_path):
    reads, dataset = [], make_dataset(classes=3, task="multilabel")
    watched = dataclasses.replace(dataset, source=Watched(dataset.source, reads))
    options = dataclasses.replace(QUICK, sampling="balanced")
    with pytest.raises(ConfigError, match="this task has several: set sampling to 'shuffle'"):
        do(watched, None, tmp_path / "run", model=PLAIN, options=options)
    assert not reads
    assert not (tmp_path / "run").exists()


def test_what_never_finished_an_epoch_is_no_run(scene, store, tmp_path):
    def stop(task, done, total, **info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(scene, store, tmp_path, progress=stop)
    assert (tmp_path / "settings.json").is_file()
    other = dataclasses.replace(QUICK, lr=5e-4, epochs=1)
    assert do(scene, store, tmp_path, options=other).metrics["epoch"] == 1
    with pytest.raises(RunError, match=r"train.lr is 0.01 and was 0.0005"):
        do(scene, store, tmp_path)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A source of pixels that writes down what is read."""

    source: object
    reads: list

    def read(self, index):
        self.reads.append(index)
        return self.source.read(index)

    def stamp(self, index):
        return None

    def mask(self, index):
        return None
