"""What stored features are worth by themselves: each tap, and all together, under two simple classifiers.

Logistic regression and nearest neighbours on pooled, standardised features, in seconds and without an image. Val
chooses how strong the penalty is, how many neighbours vote, and which tap becomes a run: the linear classifier, in a
folder like that of any other. Figures on test are there to describe the taps; none of them chooses anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from cache import Store
from pipeline import records
from pipeline.data import Dataset, Split
from pipeline.errors import RunError
from pipeline.evaluate import metrics, plots
from pipeline.evaluate.evaluate import scores_with_intervals
from pipeline.image_tap import of_features
from pipeline.mask_tap import features_of, others_of
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.pooled import standard
from pipeline.model.tasks import Head, head_of, losses, outputs_of, probabilities
from pipeline.progress import Progress, silent
from pipeline.train import identity, provenance, run_folder, trained_model
from pipeline.train.augment import Augmentation
from pipeline.train.feeding.feed import Feed, check_taps
from pipeline.train.feeding.pooling import pool_rows
from pipeline.train.logistic import STRENGTHS, Layer, fit_path
from pipeline.train.optimise import TrainOptions
from pipeline.train.train import costs, training_part

ALL = "all"  # what the table calls all taps together
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100)  # votes to choose from: our choice
Method = Literal["logistic regression", "nearest neighbours", "zero-shot", "Tip-Adapter", "Tip-Adapter-F"]
Row = dict[str, Any]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Tried:
    """One setting of a classifier on some taps, and what it says: of val, and of test where there is one.

    Attributes:
        setting: `c` or `k`.
        said: (n, K) probabilities, by split.
        history: What a run records of it.
        layer: Of the regression; None for neighbours.
    """

    setting: Mapping[str, float]
    said: Mapping[Split, Floats]
    history: Row
    layer: Layer | None = None


@dataclass(frozen=True)
class Fitting:
    """How a classifier of stored features is fitted and scored, whatever it is.

    Attributes:
        options: Of these `fraction`, `shots` and `seed` choose the training samples, and `loss` and `class_weights`
            count; the rest is for training by gradient.
        resamples: Draws of groups for the intervals.
        seed: Of the draws.
        allow_missing: Leave out samples that the store lacks.
        replace: Start over where the folder holds a run with other settings.
        progress: Called as it goes on.
    """

    options: TrainOptions = field(default_factory=TrainOptions)
    resamples: int = 2000
    seed: int = 0
    allow_missing: bool = False
    replace: bool = False
    progress: Progress = silent


def probe(
    dataset: Dataset, store: Store, folder: Path, fitting: Fitting | None = None, *, taps: Sequence[str] = ()
) -> dict[str, Any]:
    """Score each tap of a store and all of them together, and leave the one that val chooses as a run.

    Writes, beside what a run has, `probe.json`, `probe.csv` and `probe.png`: the table.

    Args:
        dataset: Labels and splits; its images are not read.
        store: Features.
        folder: The run; made if it is not there.
        fitting: How; None for the defaults.
        taps: Those to look at; by default all that the store holds of images as they are (not `neck@hflip`).

    Returns:
        `run`, its folder; `chosen`, the taps that val chose; `samples` by split; `table`, a row per tap and method in
        the order of AUC on val: `taps`, `method`, its `setting`, `val` and `test` (see `metrics.score`, with
        `intervals`; None where there is no test split), whether it is `chosen`; and `plot`.

    Raises:
        RunError: The store lacks samples or a tap, a feature is not finite, or the folder holds another run.
        DataError: AUC is not defined on a split.
    """
    fitting = fitting or Fitting()
    options, progress = fitting.options, fitting.progress
    held = [tap for tap in features_of(store.taps) if "@" not in tap]
    names = tuple(dict.fromkeys(taps)) or tuple(held)
    check_taps(store, names)
    if unfit := [tap for tap in names if tap in others_of(names)]:
        msg = f"The tap {unfit[0]!r} holds masks and no features: probe {', '.join(held) or 'another store'}."
        raise RunError(msg)
    if not names:
        msg = f"{str(store.path)!r} holds no features, only images or masks: extract some (encoder.taps)."
        raise RunError(msg)
    samples = Samples(dataset, store, names, head_of(dataset.task, options.loss), fitting)
    candidates = {tap: (tap,) for tap in names} | ({ALL: names} if len(names) > 1 else {})
    rows: list[Row] = []
    best: tuple[tuple[float, float], Tried, Sequence[Tried], tuple[str, ...]] | None = None
    for done, (name, several) in enumerate(candidates.items(), start=1):
        pooled = samples.pooled(several)
        path = list(samples.regressions(pooled))
        chosen = max(path, key=rank)
        rows.append(samples.row(name, several, "logistic regression", chosen))
        if best is None or rank(chosen) > best[0]:
            best = rank(chosen), chosen, path, several
        neighbours = max(samples.neighbours(pooled), key=rank)
        rows.append(samples.row(name, several, "nearest neighbours", neighbours))
        progress("probe", done, len(candidates), tap=name, val_auc=chosen.history["val_auc"])
    assert best is not None
    _, chosen, chosen_path, several = best
    for row in rows:
        row["chosen"] = row["taps"] == list(several) and row["method"] == "logistic regression"
    rows.sort(key=lambda row: -row["val"]["auc"])
    model = ModelOptions(backbone="none", gates=(), fuse=several)
    training = {
        "solver": "logistic regression",
        "candidates": list(names),
        **chosen.setting,
        **{key: getattr(options, key) for key in ("seed", "fraction", "loss", "class_weights")},
        **({} if options.shots is None else {"shots": options.shots}),
        "precision": "float32",
    }
    layer = chosen.layer
    assert layer is not None

    def fill(classifier: Classifier) -> None:
        assert classifier.pooled is not None
        classifier.pooled.fit(samples.raw("train", several))
        weight, bias = (torch.from_numpy(part).float() for part in layer)
        classifier.backbone.head[-1].load_state_dict({"weight": weight, "bias": bias})

    write_run(samples, folder, model, training, chosen, chosen_path, fill)
    return write_table(folder, samples, rows, several)


class Samples:
    """The samples of a probe, checked: labels, and pooled features of some taps on demand."""

    def __init__(self, dataset: Dataset, store: Store, taps: Sequence[str], head: Head, fitting: Fitting) -> None:
        self.dataset, self.store, self.head, self.fitting = dataset, store, head, fitting
        self.feeds = _feeds(dataset, store, taps, fitting)
        self.classes = len(dataset.class_names)
        self._pooled: dict[tuple[str, Split], Tensor] = {}

    def pooled(self, taps: Sequence[str]) -> dict[Split, Tensor]:
        """Standardised features (n, D) float32 of some taps by split, as the run will compute them."""
        raw = {split: self.raw(split, taps) for split in self.feeds}
        mean, scale = (part.float() for part in standard(raw["train"]))
        return {split: (values - mean) / scale for split, values in raw.items()}

    def raw(self, split: Split, taps: Sequence[str]) -> Tensor:
        """Pooled features (n, D) of a split as they are; of each tap they are read once."""
        for tap in taps:
            if (tap, split) not in self._pooled:
                rows = self.feeds[split].rows
                self._pooled[tap, split] = pool_rows(self.store, rows, (tap,), progress=self.fitting.progress)
        return torch.cat([self._pooled[tap, split] for tap in taps], dim=1)

    def regressions(self, pooled: Mapping[Split, Tensor]) -> Iterator[Tried]:
        """Fit every strength of the penalty, the strongest first."""
        train, labels = pooled["train"].double().numpy(), self.feeds["train"].labels
        fits = fit_path(self.head, train, labels, class_weights=self.fitting.options.class_weights)
        began = time.perf_counter()
        for number, (strength, layer) in enumerate(zip(STRENGTHS, fits, strict=True), start=1):
            weight, bias = (torch.from_numpy(part).float() for part in layer)
            outputs = {split: F.linear(x, weight, bias) for split, x in pooled.items()}
            said = {split: probabilities(self.head, z.double()).numpy() for split, z in outputs.items()}
            costs_of = {
                split: float(losses(self.head, z, torch.from_numpy(self.feeds[split].labels)).mean())
                for split, z in outputs.items()
            }
            history = {
                "epoch": number,
                "c": strength,
                "train_loss": costs_of["train"],
                **self.on_val(said["val"], costs_of["val"]),
                "seconds": time.perf_counter() - began,
            }
            yield Tried({"c": strength}, said, history, layer)
            began = time.perf_counter()

    def neighbours(self, pooled: Mapping[Split, Tensor]) -> Iterator[Tried]:
        """Let the nearest training samples vote, by the angle between standardised features."""
        from sklearn.neighbors import NearestNeighbors  # half a second, for those who ask

        votes = metrics.one_hot(self.dataset.task, self.feeds["train"].labels, self.classes).astype(np.float64)
        counts = sorted({min(k, len(votes)) for k in NEIGHBOURS})
        search = NearestNeighbors(n_neighbors=counts[-1], metric="cosine", algorithm="brute")
        search.fit(pooled["train"].numpy())
        nearest = {
            split: search.kneighbors(x.numpy(), return_distance=False)
            for split, x in pooled.items()
            if split != "train"
        }
        for k in counts:
            said: dict[Split, Floats] = {split: votes[some[:, :k]].mean(axis=1) for split, some in nearest.items()}
            yield Tried({"k": k}, said, self.on_val(said["val"], 1 / k))  # of equal AUCs the one of more votes

    def on_val(self, said: Floats, loss: float) -> Row:
        """What val is chosen by, for the history."""
        feed, task = self.feeds["val"], self.dataset.task
        found = metrics.score(task, feed.labels, said, self.dataset.class_names, self.dataset.positive_class)
        return {"val_loss": loss, "val_auc": found["auc"], "val_acc": found["acc"]}

    def row(self, name: str, taps: Sequence[str], method: Method, tried: Tried) -> dict[str, Any]:
        """One row of the table."""
        scored = {split: self._scored(split, said) for split, said in tried.said.items() if split != "train"}
        return {
            "tap": name,
            "taps": list(taps),
            "method": method,
            "setting": dict(tried.setting),
            "val": scored["val"],
            "test": scored.get("test"),
        }

    def _scored(self, split: Split, said: Floats) -> dict[str, Any]:
        of, feed = self.dataset, self.feeds[split]
        return scores_with_intervals(
            of.task,
            feed.labels,
            feed.groups,
            said,
            of.class_names,
            of.positive_class,
            resamples=self.fitting.resamples,
            seed=self.fitting.seed,
        )


def rank(tried: Tried) -> tuple[float, float]:
    """The rule by which an epoch is chosen: the highest AUC on val, and of equal ones the lowest loss."""
    return tried.history["val_auc"], -tried.history["val_loss"]


def _feeds(dataset: Dataset, store: Store, taps: Sequence[str], fitting: Fitting) -> dict[Split, Feed]:
    """The samples of each split, checked; nothing of them is read yet."""
    among: dict[Split, list[int]] = {"train": training_part(dataset, fitting.options), "val": dataset.indices("val")}
    if dataset.indices("test"):
        among["test"] = dataset.indices("test")
    feeds: dict[Split, Feed] = {
        split: Feed(
            dataset,
            split,
            store,
            taps=taps,
            image_px=None,
            device=torch.device("cpu"),
            place="stream",  # rows are read as they are pooled
            allow_missing=fitting.allow_missing,
            among=indices,
            progress=fitting.progress,
        )
        for split, indices in among.items()
    }
    for split, feed in feeds.items():
        metrics.check_labels(dataset.task, feed.labels, dataset.class_names, split)
    return feeds


def write_run(
    samples: Samples,
    folder: Path,
    model: ModelOptions,
    training: Mapping[str, Any],
    chosen: Tried,
    path: Sequence[Tried],
    fill: Callable[[Classifier], None],
) -> None:
    """Leave a classifier as a run: the files that `train` leaves.

    Args:
        samples: It was fitted on.
        folder: The run.
        model: What is built.
        training: How it was fitted, with what val chose.
        chosen: What val chose.
        path: Everything it chose from.
        fill: Puts what was fitted into the classifier.
    """
    dataset, store = samples.dataset, samples.store
    settings = {
        **identity.identity_of(dataset, store, model, TrainOptions(), Augmentation()),
        "train": {key: value for key, value in training.items() if key not in (*chosen.setting, "precision")},
        "augmentation": {},
    }
    with run_folder.held(folder):
        run_folder.begin(folder, settings, replace=samples.fitting.replace)
        if (folder / "model.json").is_file():
            return  # the same run, made before
        shapes = {tap: (spec.channels, spec.height, spec.width) for tap in model.fuse for spec in (store.taps[tap],)}
        classifier = Classifier(model, shapes, outputs_of(samples.head, samples.classes))
        with torch.no_grad():
            fill(classifier)
        history = [tried.history for tried in path]
        val = samples.feeds["val"]
        figures = {
            "epoch": chosen.history["epoch"],
            "val": {
                "loss": chosen.history["val_loss"],
                **metrics.score(
                    dataset.task, val.labels, chosen.said["val"], dataset.class_names, dataset.positive_class
                ),
            },
            **costs(classifier),
        }
        identity.record_samples(folder, (samples.feeds["train"], val))
        records.write_json(folder / "history.json", history)
        records.write_csv(folder / "history.csv", history)
        trained_model.save_weights(folder / "model.safetensors", classifier.state_dict())
        trained_model.save_description(
            folder,
            trained_model.Description(
                model=model,
                task=dataset.task,
                head=samples.head,
                class_names=dataset.class_names,
                taps=classifier.taps,
                fingerprint=of_features(store.fingerprint),
                training=training,
                metrics=figures,
                provenance=provenance.of_training(
                    dataset, store, history, settings=settings, trained_on=len(samples.feeds["train"]), device="cpu"
                ),
            ),
        )


def write_table(folder: Path, samples: Samples, rows: Sequence[Row], chosen: Sequence[str]) -> dict[str, Any]:
    """Leave the table for programs, for spreadsheets and as a picture."""
    found = {
        "run": str(folder),
        "chosen": list(chosen),
        "samples": {split: len(feed) for split, feed in samples.feeds.items()},
        "table": list(rows),
        "plot": str(folder / "probe.png"),
    }
    records.write_json(folder / "probe.json", {key: found[key] for key in ("chosen", "samples", "table")})
    records.write_csv(folder / "probe.csv", [_flat(row) for row in rows])
    plots.draw_probe(folder / "probe.png", rows)
    return found


def _flat(row: Row) -> dict[str, object]:
    """A row of the table for a spreadsheet: scores of the whole, with the interval of each on test."""
    flat: dict[str, object] = {key: row[key] for key in ("tap", "method", "chosen")}
    flat["setting"] = ", ".join(f"{name} = {value:g}" for name, value in row["setting"].items())
    for split in ("val", "test"):
        for score in ("auc", "ap", "acc", "balanced_acc", "f1", "kappa", "ece", "brier"):
            found = row[split]
            if found is not None and score in found:
                flat[f"{split}_{score}"] = found[score]
                flat[f"{split}_{score}_low"], flat[f"{split}_{score}_high"] = (
                    found["intervals"][score][end] for end in ("low", "high")
                )
    return flat
