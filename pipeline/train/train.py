"""Stage two: train a gated classifier on stored features, keep the epoch that is best on val, continue after any stop.

Nothing random outlives an epoch: order, augmentation and dropout are drawn from the seed and the epoch's number. So
continuing needs no more than a checkpoint at the end of each epoch, at the price of repeating the one cut short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import Store
from pipeline.clip import is_clip
from pipeline.data import Dataset, Split, few_shots, stratified_part
from pipeline.errors import ConfigError, RunError
from pipeline.evaluate import metrics
from pipeline.image_tap import of_features
from pipeline.model.backbones import Backbone
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.clip_backbone import ClipBackbone
from pipeline.model.tasks import head_of, outputs_of
from pipeline.model.uses import Seen
from pipeline.progress import Progress, silent
from pipeline.train import gate_spread, identity, parallel, provenance, run_folder, trained_model
from pipeline.train.augment import Augmentation, view_taps
from pipeline.train.feeding.feed import Feed, Place, check_taps
from pipeline.train.feeding.in_memory import Holdings
from pipeline.train.feeding.pooling import pool_rows
from pipeline.train.forward import infer
from pipeline.train.history import Journal
from pipeline.train.loop import Loop, check_sampling, share_of_alignment
from pipeline.train.optimise import TrainOptions
from pipeline.train.painted import count_masks

Row = dict[str, Any]
_FITTED_ON = 512  # training images whose features say how a channel is scaled: enough for two digits
_AT_ONCE = 32


@dataclass(frozen=True)
class Machine:
    """What to train on; nothing here changes the result beyond rounding.

    Attributes:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`.
        place: Where data wait: `"auto"` chooses from the sizes (see `pipeline.train.feeding.feed`).
        workers: Decoding threads.
        channels_last: Lay images out as (B, H, W, C), which convolutions prefer: ResNet-18 at 128 px trains 1.2 times
            faster on a CPU.
        compiled: Use `torch.compile`.
        tensorboard: Write the history for TensorBoard too, with the extra of that name.
    """

    device: str = "cpu"
    place: Place = "auto"
    workers: int = 2
    channels_last: bool = True
    compiled: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class TrainReport:
    """What a training run came to.

    Attributes:
        folder: Where its files are.
        metrics: Figures on val of the epoch whose weights were kept, `epoch` (counted from one), `gate_spread` by gate,
            `parameters`, `flops`.
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
    holdings: Holdings | None = None,
    progress: Progress = silent,
) -> TrainReport:
    """Train the classifier in `folder`, from the start or from where it stopped; a finished run is left as it is.

    Args:
        dataset: Images, labels and splits.
        store: Features; may be None if `model` reads none.
        folder: The run; made if it is not there.
        model: What to train.
        options: How to train it.
        augmentation: What images and gates go through; None for nothing.
        machine: What to train on.
        allow_missing: Train without the samples that the store lacks.
        replace: Start over where the folder holds a run with other settings.
        holdings: Images and features that other runs on the same objects have loaded; None to share nothing.
        progress: Called after each step and each epoch.

    Raises:
        RunError: The store does not fit the data set, the folder holds another run or another process writes it,
            or the loss is not finite.
        DataError: AUC is not defined on val.
        ConfigError: An option is impossible.
    """
    augmentation, machine = augmentation or Augmentation(), machine or Machine()
    if model.taps and store is None:
        raise ConfigError(_needs_store(model))
    among: dict[Split, list[int]] = {"train": training_part(dataset, options), "val": dataset.indices("val")}
    for split, indices in among.items():
        metrics.check_labels(dataset.task, np.asarray(dataset.labels)[indices], dataset.class_names, split)
    wanted = _what_to_feed(model, augmentation)
    if store is not None:
        check_taps(store, [tap for _, taps, _ in wanted for tap in taps])
    classifier = _build_classifier(model, options, dataset, store)  # before anything is decoded or written
    team, device = parallel.join(torch.device(machine.device))
    settings = identity.identity_of(dataset, store, model, options, augmentation)
    with run_folder.held(folder) if team.leads else nullcontext():
        if team.leads:
            _begin(folder, settings, dataset, replace=replace)
        team.wait()
        if (folder / "model.json").is_file():
            if team.leads:
                run_folder.tidy(folder)
            return TrainReport(
                folder, dict(trained_model.load_description(folder).metrics), run_folder.read_history(folder), ()
            )
        progress = progress if team.leads else silent
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            train_feed, val_feed = (
                Feed(
                    dataset,
                    split,
                    store,
                    taps=taps,
                    image_px=image_px,
                    device=device,
                    place=machine.place,
                    workers=machine.workers,
                    allow_missing=allow_missing,
                    among=among[split],
                    holdings=holdings,
                    progress=progress,
                )
                for split, taps, image_px in wanted
            )
            for feed in (train_feed, val_feed):  # without those that the store lacks
                metrics.check_labels(dataset.task, feed.labels, dataset.class_names, feed.split)
            if not run_folder.is_started(folder):  # else the checkpoint knows the scale of the features
                if classifier.pooled is not None and store is not None:
                    classifier.pooled.fit(pool_rows(store, train_feed.rows, model.fuse, progress=progress))
                if classifier.gates.fitted:
                    classifier.gates.fit(_some_features(train_feed, classifier.gates.fitted))
            loop = _build_loop(classifier, options, augmentation, machine, train_feed, dataset, team)
            journal = Journal(folder, tensorboard=machine.tensorboard)
            figures = _run_epochs(loop, val_feed, dataset, journal, options, progress)
        if team.leads:
            if classifier.overlay is not None:
                figures["overlay"] = {feed.split: count_masks(classifier, feed) for feed in (train_feed, val_feed)}
            identity.record_samples(folder, (train_feed, val_feed))
            made = provenance.of_training(
                dataset,
                store if model.taps else None,
                journal.history,
                settings=settings,
                trained_on=len(train_feed),
                device=machine.device,
            )
            journal.finish(_describe(loop, model, options, dataset, store, figures, made))
        return TrainReport(folder, figures, journal.history, (train_feed.description, val_feed.description))


def _needs_store(model: ModelOptions) -> str:
    """Say what of a model reads features, and what to do where there are none."""
    given = {"gates": list(model.gates), "fuse": list(model.fuse), "overlay": model.overlay}
    uses = {name: value for name, value in given.items() if value}
    return (
        f"The {' and '.join(f'{name} {value!r}' for name, value in uses.items())} read features: name a store, or "
        f"set {', '.join(f'{name} to ' + ('null' if name == 'overlay' else '[]') for name in uses)}."
    )


def _describe(
    loop: Loop,
    model: ModelOptions,
    options: TrainOptions,
    dataset: Dataset,
    store: Store | None,
    figures: Row,
    made: Mapping[str, Any],
) -> trained_model.Description:
    """What `model.json` says of the finished run."""
    return trained_model.Description(
        model=model,
        task=dataset.task,
        head=loop.head,
        class_names=dataset.class_names,
        taps=loop.classifier.taps,
        clip=_of_clip(loop.classifier.backbone),
        fingerprint=of_features(store.fingerprint) if store is not None and model.taps else None,
        training=asdict(options),
        metrics=figures,
        provenance=made,
    )


def _begin(folder: Path, settings: Mapping[str, Any], dataset: Dataset, *, replace: bool) -> None:
    """Claim the folder.

    Raises:
        RunError: It holds another run; the error's note says which images are others now, if any are.
    """
    try:
        run_folder.begin(folder, settings, replace=replace)
    except RunError as error:
        note = identity.what_changed(folder, dataset) if "data.samples_sha256" in str(error) else ""
        if note:
            error.add_note(note)
        raise


def training_part(dataset: Dataset, options: TrainOptions) -> list[int]:
    """Choose the training samples, `fraction` of them or `shots` of each class: positions in the data set, ascending.

    Raises:
        DataError: A class has fewer than `shots`.
    """
    indices = dataset.indices("train")
    labels, groups = ([getattr(dataset.samples[i], of) for i in indices] for of in ("label", "group"))
    if options.shots is None:
        chosen = stratified_part(labels, groups, fraction=options.fraction, seed=options.seed)
    else:
        chosen = few_shots(labels, groups, dataset.class_names, shots=options.shots, seed=options.seed)
    return [i for i, is_chosen in zip(indices, chosen, strict=True) if is_chosen]


def _what_to_feed(model: ModelOptions, augmentation: Augmentation) -> list[tuple[Split, tuple[str, ...], int | None]]:
    """Say which taps and which image side each split needs: training those of its views, and room to crop."""
    views = view_taps(model.feature_taps, augmentation.views)
    if not model.reads_images:
        return [("train", (*model.taps, *views), None), ("val", model.taps, None)]
    detailed_px = round(model.image_px * (1 + augmentation.margin))
    return [("train", (*model.taps, *views), detailed_px), ("val", model.taps, model.image_px)]


def _build_classifier(model: ModelOptions, options: TrainOptions, dataset: Dataset, store: Store | None) -> Classifier:
    """Build the classifier from its seed, on the CPU.

    Raises:
        ConfigError: There is no such backbone, stage or loss, or it does not fit the task.
        CheckpointError: The backbone's weights are not there, or not its own.
    """
    share_of_alignment(options, model.backbone)
    head = head_of(dataset.task, options.loss)
    check_sampling(options, head)
    if is_clip(model.backbone) and head != "softmax":
        remedy = "set train.loss to 'cross_entropy', or" if head == "continuation" else "for several labels at once"
        msg = (
            f"CLIP says which one of the prompts an image fits best, and the task of {dataset.name!r} is "
            f"{dataset.task}: {remedy} choose another backbone than {model.backbone!r}."
        )
        raise ConfigError(msg)
    specs = {} if store is None else store.taps
    shapes = {tap: (spec.channels, spec.height, spec.width) for tap, spec in specs.items() if tap in model.taps}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return Classifier(
            model,
            shapes,
            outputs_of(head, len(dataset.class_names)),
            classes=dataset.class_names,
            trains_text=options.text_lr > 0,
        )


def _build_loop(
    classifier: Classifier,
    options: TrainOptions,
    augmentation: Augmentation,
    machine: Machine,
    feed: Feed,
    dataset: Dataset,
    team: parallel.Team,
) -> Loop:
    """Put together what trains the classifier."""
    if team.size > 1:
        parallel.share_batch_norms(classifier)
    return Loop(
        classifier.to(feed.device),
        head_of(dataset.task, options.loss),
        feed,
        options,
        augmentation,
        team=team,
        channels_last=machine.channels_last,
        compiled=machine.compiled,
    )


def _of_clip(backbone: Backbone) -> dict[str, Any] | None:
    """What a description says of a CLIP: all that is needed to build and to explain it."""
    if not isinstance(backbone, ClipBackbone):
        return None
    return {"architecture": asdict(backbone.architecture.of_images()), "prompts": backbone.prompts}


def _run_epochs(
    loop: Loop, val_feed: Feed, dataset: Dataset, journal: Journal, options: TrainOptions, progress: Progress
) -> Row:
    """Train the epochs that are left; returns the figures of the best."""
    journal.resume(loop)
    while len(journal.history) < options.epochs and not journal.patience_is_over(options.patience):
        epoch = len(journal.history)
        row: Row = {"epoch": epoch + 1, **loop.run_epoch(epoch, progress)}
        scores = infer(loop.best_guess, loop.head, val_feed, precision=options.precision, team=loop.team)
        if not np.isfinite(scores.losses).all():
            msg = (
                f"After epoch {epoch + 1} the loss on val is not finite. Likely cause: a learning rate of "
                f"{options.lr:g} that is too high: lower lr, or set clip_norm. The checkpoint before it stays."
            )
            raise RunError(msg)
        figures = metrics.score(
            dataset.task, val_feed.labels, scores.probabilities, dataset.class_names, dataset.positive_class
        )
        row |= {"val_loss": float(scores.losses.mean()), "val_auc": figures["auc"], "val_acc": figures["acc"]}
        row |= gate_spread.columns(scores.gate_spreads)
        journal.add(row, figures, loop)
        shown = {key: row[key] for key in ("train_loss", "val_loss", "val_auc", "seconds")}
        shown["best_epoch"] = journal.best["epoch"]
        progress("epoch", epoch + 1, options.epochs, **shown)
    kept = gate_spread.from_row(journal.history[journal.best["epoch"] - 1])
    return {**journal.best, **({"gate_spread": kept} if kept else {}), **costs(loop.classifier)}


def _some_features(feed: Feed, taps: Sequence[str]) -> Iterator[Seen]:
    """Features of the training images at some taps, `_FITTED_ON` of them where there are more, at even distances.

    Raises:
        RunError: They are not finite, which would make every gate's scale so.
    """
    positions = torch.linspace(0, len(feed) - 1, min(len(feed), _FITTED_ON)).long()
    for part in torch.split(positions, _AT_ONCE):
        features, extents = feed.stored(part, taps)
        for tap, feature in features.items():
            bad = (~feature.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if bad:
                name = feed.ids[int(part[bad[0]])]
                msg = f"The stored features of tap {tap!r} are not finite in sample {name!r}: extract them again."
                raise RunError(msg)
        yield Seen(features, extents)


def costs(classifier: Classifier) -> Row:
    """Count parameters and operations, and the share that SLCA adds to the backbone's."""
    parameters, flops = classifier.parameter_counts(), classifier.flop_counts()
    return {
        "parameters": {**parameters, "slca_share": parameters["slca"] / parameters["backbone"]},
        "flops": {**flops, "slca_share": flops["slca"] / flops["backbone"]},
    }
