"""Stage two: train a gated classifier on stored features, keep the epoch that is best on val, continue after any stop.

Nothing random outlives an epoch: order, augmentation and dropout are drawn from the seed and the epoch's number. So
continuing needs no more than a checkpoint at the end of each epoch, at the price of repeating the one cut short.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import Store
from pipeline import metrics, run
from pipeline.augment import Augmentation
from pipeline.classifier import Classifier, ModelOptions
from pipeline.data import Dataset
from pipeline.errors import ConfigError, RunError
from pipeline.feed import Feed, Place
from pipeline.loop import Loop, Scores, infer
from pipeline.optimise import TrainOptions
from pipeline.progress import Progress, silent
from pipeline.tasks import head_of, outputs_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What to train on; nothing here changes the result beyond rounding.

    Attributes:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`.
        place: Where data wait: `"auto"` chooses from the sizes (see `pipeline.feed`).
        workers: Decoding threads.
        channels_last: Lay images out as (B, H, W, C), which many convolutions prefer.
        compiled: Use `torch.compile`.
    """

    device: str = "cpu"
    place: Place = "auto"
    workers: int = 2
    channels_last: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class TrainReport:
    """What a training run came to.

    Attributes:
        folder: Where its files are.
        metrics: Figures on val of the epoch whose weights were kept, `epoch` (counted from one) and `parameters`.
        history: One row per epoch.
        feeds: One line per split on where its data waited; empty if the run was finished before.
    """

    folder: Path
    metrics: dict[str, Any]
    history: list[Row]
    feeds: tuple[str, ...]


def train(
    dataset: Dataset,
    store: Store | None,
    folder: Path,
    *,
    model: ModelOptions,
    options: TrainOptions,
    augmentation: Augmentation | None = None,
    machine: Machine | None = None,
    allow_missing: bool = False,
    replace: bool = False,
    progress: Progress = silent,
) -> TrainReport:
    """Train the classifier in `folder`, from the start or from where it stopped; a finished run is left as it is.

    Args:
        dataset: Images, labels and splits.
        store: Features; may be None if `model` has no gate that reads one.
        folder: The run; made if it is not there.
        model: What to train.
        options: How to train it.
        augmentation: What images and gates go through; None for nothing.
        machine: What to train on.
        allow_missing: Train without the samples that the store lacks.
        replace: Start over where the folder holds a run with other settings.
        progress: Called after each step and each epoch.

    Raises:
        RunError: The store does not fit the data set, the folder holds another run, or the loss is not finite.
        DataError: AUC is not defined on val.
        ConfigError: An option is impossible.
    """
    augmentation, machine = augmentation or Augmentation(), machine or Machine()
    if model.taps and store is None:
        msg = f"The gates {list(model.gates)!r} read features: name a store, or set gates to []."
        raise ConfigError(msg)
    for split in ("train", "val"):
        labels = np.asarray(dataset.labels)[dataset.indices(split)]
        metrics.check_labels(dataset.task, labels, dataset.class_names, split)
    run.begin(folder, _settings(dataset, store, model, options, augmentation), replace=replace)
    if (folder / "model.json").is_file():
        run.tidy(folder)
        return TrainReport(folder, dict(run.load_description(folder).metrics), run.read_history(folder), ())
    with torch.random.fork_rng(devices=[torch.device(machine.device)] if "cuda" in machine.device else []):
        session = _Session(dataset, store, folder, model, options, augmentation, machine, allow_missing, progress)
        return session.run()


class _Session:
    """One process's work on a run, from its last checkpoint to its end."""

    def __init__(
        self,
        dataset: Dataset,
        store: Store | None,
        folder: Path,
        model: ModelOptions,
        options: TrainOptions,
        augmentation: Augmentation,
        machine: Machine,
        allow_missing: bool,
        progress: Progress,
    ) -> None:
        self.dataset, self.folder, self.options, self.progress = dataset, folder, options, progress
        self.head = head_of(dataset.task, options.loss)
        self.device = torch.device(machine.device)
        self.fingerprint = store.fingerprint if store is not None and model.taps else None
        self.train_feed, self.val_feed = (
            Feed(
                dataset,
                split,
                store,
                taps=model.taps,
                image_px=model.image_px,
                device=self.device,
                place=machine.place,
                workers=machine.workers,
                allow_missing=allow_missing,
                progress=progress,
            )
            for split in ("train", "val")
        )
        torch.manual_seed(options.seed)
        taps = {tap: shape for tap, (shape, _) in self.train_feed.shapes().items()}
        classifier = Classifier(model, taps, outputs_of(self.head, len(dataset.class_names))).to(self.device)
        self.taps, self.counts = taps, classifier.parameter_counts()
        self.loop = Loop(
            classifier,
            self.head,
            self.train_feed,
            options,
            augmentation,
            channels_last=machine.channels_last,
            compiled=machine.compiled,
        )
        self.history: list[Row] = []
        self.best: Row = {}
        checkpoint = run.load_checkpoint(folder, self.device)
        if checkpoint is not None:
            self.loop.load_state(checkpoint["loop"])
            self.history, self.best = json.loads(checkpoint["history"]), json.loads(checkpoint["best"])

    def run(self) -> TrainReport:
        """Train the epochs that are left, and finish the run."""
        while len(self.history) < self.options.epochs and not self._patience_is_over():
            epoch = len(self.history)
            row: Row = {"epoch": epoch + 1, **self.loop.run_epoch(epoch, self.progress)}
            scores = infer(self.loop.best_guess, self.head, self.val_feed, precision=self.options.precision)
            self._check_finite(scores, epoch + 1)
            figures = metrics.score(
                self.dataset.task, self.val_feed.labels, scores.probabilities, self.dataset.class_names
            )
            row |= {"val_loss": float(scores.losses.mean()), "val_auc": figures["auc"], "val_acc": figures["acc"]}
            self._keep(row, figures)
            shown = {key: row[key] for key in ("train_loss", "val_loss", "val_auc")}
            self.progress("epoch", epoch + 1, self.options.epochs, **shown)
        return self._finish()

    def _check_finite(self, scores: Scores, epoch: int) -> None:
        """Refuse an epoch whose last step broke the weights."""
        if not np.isfinite(scores.losses).all():
            msg = (
                f"After epoch {epoch} the loss on val is not finite. Likely cause: a learning rate of "
                f"{self.options.lr:g} that is too high: lower lr, or set clip_norm. The checkpoint before it stays."
            )
            raise RunError(msg)

    def _patience_is_over(self) -> bool:
        patience = self.options.patience
        return bool(patience and self.best and len(self.history) - self.best["epoch"] >= patience)

    def _keep(self, row: Row, figures: Mapping[str, Any]) -> None:
        """Write the epoch down: its weights if it is the best so far, then the checkpoint that names them."""
        self.history.append(row)
        rank = (row["val_auc"], -row["val_loss"])  # of equal AUC, the lower loss
        if not self.best or rank > (self.best["val"]["auc"], -self.best["val"]["loss"]):
            self.best = {"epoch": row["epoch"], "val": {"loss": row["val_loss"], **figures}}
            run.save_weights(self._best_file(), self.loop.best_guess.state_dict())
        history, best = json.dumps(self.history), json.dumps(self.best)
        run.save_checkpoint(self.folder, {"loop": self.loop.state(), "history": history, "best": best})
        for file in self.folder.glob("best-*.safetensors"):
            if file != self._best_file():
                file.unlink()
        run.write_json(self.folder / "history.json", self.history)
        run.write_csv(self.folder / "history.csv", self.history)

    def _best_file(self) -> Path:
        return self.folder / f"best-{self.best['epoch']:04d}.safetensors"

    def _finish(self) -> TrainReport:
        """Leave the best weights under their final name, described; then drop what only continuing needed."""
        counts = {**self.counts, "slca_share": self.counts["slca"] / self.counts["backbone"]}
        figures = {**self.best, "parameters": counts}
        with run.replacing(self.folder / "model.safetensors") as file:
            file.write(self._best_file().read_bytes())
        description = run.Description(
            model=self.loop.classifier.options,
            task=self.dataset.task,
            head=self.head,
            class_names=self.dataset.class_names,
            taps=self.taps,
            fingerprint=self.fingerprint,
            training=asdict(self.options),
            metrics=figures,
        )
        run.save_description(self.folder, description)
        run.tidy(self.folder)
        feeds = (self.train_feed.description, self.val_feed.description)
        return TrainReport(self.folder, figures, self.history, feeds)


def _settings(
    dataset: Dataset, store: Store | None, model: ModelOptions, options: TrainOptions, augmentation: Augmentation
) -> dict[str, Any]:
    """Everything that the result depends on, as JSON values."""
    samples = [[sample.id, sample.label, sample.split] for sample in dataset.samples]
    return {
        "data": {
            "samples_sha256": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
            "task": dataset.task,
            "class_names": list(dataset.class_names),
        },
        "features": store.fingerprint.fields if store is not None and model.taps else None,
        "model": asdict(model),
        "train": asdict(options),
        "augmentation": asdict(augmentation),
    }
