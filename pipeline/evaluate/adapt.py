"""CLIP's image features from a store, classified by class prompts and few training images: baselines in seconds.

`zero_shot` asks the class prompts alone. `tip` (Tip-Adapter) adds a cache of the training images, and `tip_f`
(Tip-Adapter-F) fine-tunes its keys; the formula is in `pipeline.model.cached`. Val chooses how much the cache weighs,
how near an image must be to count, and the epoch; the values to choose from are ours. The original makes its keys from
ten random crops of each image, and chooses on test where a data set has no val; here an image has the one feature that
the store has, and test chooses nothing. What comes out is a run like any other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cache import Store
from pipeline.data import Dataset
from pipeline.errors import ConfigError, RunError
from pipeline.evaluate.probe import Fitting, Method, Row, Samples, Tried, rank, write_run, write_table
from pipeline.model.cached import near
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.tasks import head_of, losses, probabilities
from pipeline.train.feeding.feed import check_taps

Adapter = Literal["zero_shot", "tip", "tip_f"]
TAP = "embedding"
ADAPTERS: Mapping[Adapter, Method] = {"zero_shot": "zero-shot", "tip": "Tip-Adapter", "tip_f": "Tip-Adapter-F"}
ALPHAS = tuple(float(f"{10**power:.2g}") for power in np.arange(-1.0, 1.51, 0.25))
BETAS = tuple(float(f"{10**power:.2g}") for power in np.arange(-0.5, 1.76, 0.25))
_FIRST = (1.0, 5.5)  # alpha and beta while keys are tuned, as in the original
_EPOCHS, _LR, _BATCH = 20, 1e-3, 32  # the original's, but for its batches of 256, which few images do not fill


@dataclass(frozen=True)
class Texts:
    """What a text tower makes of the classes.

    Attributes:
        classes: (K, E), the embedding of each class, of length one.
        scale: CLIP's temperature exp(s).
        prompts: The texts of each class, for the record.
        weights_sha256: Of the file that both towers come from.
    """

    classes: Tensor
    scale: float
    prompts: Mapping[str, Sequence[str]]
    weights_sha256: str


def adapt(
    dataset: Dataset, store: Store, folder: Path, fitting: Fitting | None = None, *, method: Adapter, texts: Texts
) -> dict[str, Any]:
    """Score class prompts, and a cache up to the one that is asked for, which becomes a run.

    Args:
        dataset: Labels and splits; its images are not read.
        store: With the tap `embedding` of the CLIP whose texts these are.
        folder: The run; made if it is not there.
        fitting: How; None for the defaults. Of its options `class_weights` does not count, and the training samples
            are the cached images.
        method: What becomes the run.
        texts: Of its classes.

    Returns:
        See `probe.probe`.

    Raises:
        ConfigError: An image may have several labels, or grades are ordered.
        RunError: The store is of another encoder, lacks samples or the tap, or the folder holds another run.
        DataError: AUC is not defined on a split.
    """
    fitting = fitting or Fitting()
    head = head_of(dataset.task, fitting.options.loss)
    if head != "softmax":
        msg = (
            f"probe.method is {method!r}, which tells classes apart one against the others, and the task is "
            f"{dataset.task!r}: set probe.method to 'linear'"
            + (", or train.loss to 'cross_entropy' to take grades as classes." if dataset.task == "ordinal" else ".")
        )
        raise ConfigError(msg)
    _check_store(store, texts)
    samples = Samples(dataset, store, (TAP,), head, fitting)
    size = texts.classes.shape[1]
    features = {split: F.normalize(samples.raw(split, (TAP,))[:, :size], dim=1) for split in samples.feeds}
    bench = _Bench(samples, features, texts)
    rows: list[Row] = []
    chosen: _Fitted | None = None
    path: list[_Fitted] = []
    several = list(ADAPTERS)[: list(ADAPTERS).index(method) + 1]
    for done, name in enumerate(several, start=1):
        path = list(bench.tries(name))
        chosen = max(path, key=lambda fitted: rank(fitted.tried))
        row = samples.row(TAP, (TAP,), ADAPTERS[name], chosen.tried)
        rows.append({**row, "chosen": name == method})
        fitting.progress("probe", done, len(several), tap=TAP, val_auc=chosen.tried.history["val_auc"])
    assert chosen is not None
    rows.sort(key=lambda row: -row["val"]["auc"])
    _write(samples, folder, method, chosen, path, texts)
    return write_table(folder, samples, rows, (TAP,))


def _check_store(store: Store, texts: Texts) -> None:
    """Refuse features of another model than the texts'.

    Raises:
        RunError: They are.
    """
    check_taps(store, (TAP,))
    fields = store.fingerprint.fields
    if fields.get("weights_sha256") != texts.weights_sha256:
        msg = (
            f"{str(store.path)!r} holds image features of the weights {str(fields.get('weights_sha256'))[:12]!r} of "
            f"{fields.get('encoder')!r}, and the texts are of {texts.weights_sha256[:12]!r}: configure the encoder "
            f"that the store was made with."
        )
        raise RunError(msg)


@dataclass(frozen=True)
class _Fitted:
    """One setting of the head: what it says, and what it holds."""

    tried: Tried
    keys: Tensor
    values: Tensor
    alpha: float = 0.0
    beta: float = 1.0


class _Bench:
    """Image features (n, E) of length one by split, and what is tried on them."""

    def __init__(self, samples: Samples, features: Mapping[Any, Tensor], texts: Texts) -> None:
        self.samples, self.features, self.texts = samples, features, texts
        labels = torch.from_numpy(samples.feeds["train"].labels)
        self.labels, self.values = labels, F.one_hot(labels, samples.classes).float()
        self.asked = {split: texts.scale * f @ texts.classes.T for split, f in features.items()}

    def tries(self, method: Adapter) -> Iterator[_Fitted]:
        """Everything that val chooses from."""
        if method == "zero_shot":
            nothing = torch.zeros(0, self.texts.classes.shape[1]), torch.zeros(0, self.samples.classes)
            yield _Fitted(self._tried({}, self.asked, 1), *nothing)
        elif method == "tip":
            yield from self._searched(self.features["train"], 1, {})
        else:
            tuned = list(self._tuned())
            best = max(tuned, key=lambda fitted: rank(fitted.tried))
            epoch = best.tried.setting["epoch"]
            yield from tuned
            yield from self._searched(best.keys, len(tuned) + 1, {"epoch": epoch})

    def _searched(self, keys: Tensor, first: int, setting: Mapping[str, float]) -> Iterator[_Fitted]:
        """Every alpha and beta with these keys."""
        for number, beta in enumerate(BETAS):
            added = {split: near(f @ keys.T, beta) @ self.values for split, f in self.features.items()}
            for place, alpha in enumerate(ALPHAS):
                logits = {split: self.asked[split] + alpha * added[split] for split in added}
                tried = self._tried(
                    {**setting, "alpha": alpha, "beta": beta}, logits, first + number * len(ALPHAS) + place
                )
                yield _Fitted(tried, keys, self.values, alpha, beta)

    def _tuned(self) -> Iterator[_Fitted]:
        """Keys after each epoch of fine-tuning, by the cross-entropy of the cached images themselves."""
        alpha, beta = _FIRST
        generator = torch.Generator().manual_seed(self.samples.fitting.options.seed)
        keys = self.features["train"].clone().requires_grad_()
        steps = _EPOCHS * -(-len(keys) // _BATCH)
        optimiser = torch.optim.AdamW([keys], lr=_LR, eps=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for epoch in range(1, _EPOCHS + 1):
            for batch in torch.split(torch.randperm(len(keys), generator=generator), _BATCH):
                f, asked = self.features["train"][batch], self.asked["train"][batch]
                loss = F.cross_entropy(asked + alpha * near(f @ keys.T, beta) @ self.values, self.labels[batch])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
            now = keys.detach().clone()
            logits = {
                split: self.asked[split] + alpha * near(f @ now.T, beta) @ self.values
                for split, f in self.features.items()
            }
            tried = self._tried({"epoch": epoch, "alpha": alpha, "beta": beta}, logits, epoch)
            yield _Fitted(tried, now, self.values, alpha, beta)

    def _tried(self, setting: Mapping[str, float], logits: Mapping[Any, Tensor], number: int) -> Tried:
        began = time.perf_counter()
        samples = self.samples
        said = {split: probabilities(samples.head, z.double()).numpy() for split, z in logits.items()}
        costs = {
            split: float(losses(samples.head, logits[split], torch.from_numpy(samples.feeds[split].labels)).mean())
            for split in ("train", "val")
        }
        history = {
            **setting,
            "epoch": number,
            "train_loss": costs["train"],
            **samples.on_val(said["val"], costs["val"]),
            "seconds": time.perf_counter() - began,
        }
        return Tried(setting, said, history)


def _write(
    samples: Samples, folder: Path, method: Adapter, chosen: _Fitted, path: Sequence[_Fitted], texts: Texts
) -> None:
    """Leave the chosen head as a run."""
    model = ModelOptions(backbone="none", gates=(), fuse=(TAP,), head="cosine", cached=len(chosen.keys))
    options = samples.fitting.options
    training = {
        "solver": ADAPTERS[method],
        "method": method,
        "candidates": [TAP],
        "prompts": {name: list(said) for name, said in texts.prompts.items()},
        **chosen.tried.setting,
        **{key: getattr(options, key) for key in ("seed", "fraction", "loss")},
        **({} if options.shots is None else {"shots": options.shots}),
        "precision": "float32",
    }

    def fill(classifier: Classifier) -> None:
        head: Any = classifier.backbone.head[-1]
        head.classes.copy_(texts.classes)
        head.keys.copy_(chosen.keys)
        head.values.copy_(chosen.values)
        for name, value in (("scale", texts.scale), ("alpha", chosen.alpha), ("beta", chosen.beta)):
            getattr(head, name).fill_(value)

    tried = [fitted.tried for fitted in path]
    write_run(samples, folder, model, training, chosen.tried, tried, fill)
