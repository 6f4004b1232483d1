"""One pass of a classifier over a feed, and the precision that it computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.model.classifier import Classifier
from pipeline.model.tasks import Head, losses, probabilities
from pipeline.model.uses import Seen
from pipeline.train import gate_spread
from pipeline.train.feeding.feed import Batch, Feed
from pipeline.train.parallel import Team


@dataclass(frozen=True)
class Scores:
    """What a classifier said about the samples of a feed, in their order.

    Attributes:
        probabilities: (n, K) float64.
        losses: (n,) float64, unweighted and unsmoothed.
        gate_spreads: By gate, `TAP_STAGE`, how much it varies over an image (see `pipeline.train.gate_spread`).
    """

    probabilities: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    gate_spreads: dict[str, float]


@torch.no_grad()
def infer(
    classifier: Classifier,
    head: Head,
    feed: Feed,
    *,
    batch_size: int = 64,
    precision: str = "float32",
    team: Team | None = None,
) -> Scores:
    """Score every sample of a feed, without augmentation; each process of a team gets all the scores."""
    classifier.eval()
    team = team or Team()
    mine = torch.arange(len(feed))
    mine = mine[team.share(mine)]
    said, cost = [], []
    with gate_spread.watched(classifier) as spreads:
        for batch in feed.batches(torch.split(mine, batch_size)):
            logits = outputs(classifier, batch, precision)
            said.append(probabilities(head, logits.cpu().double()).numpy())
            cost.append(losses(head, logits, batch.labels).double().cpu().numpy())
    everyone = team.gather((said, cost, spreads))
    return Scores(
        np.concatenate([part for said, _, _ in everyone for part in said]),
        np.concatenate([part for _, cost, _ in everyone for part in cost]),
        gate_spread.mean_of([spreads for _, _, spreads in everyone]),
    )


def outputs(classifier: Classifier, batch: Batch, precision: str) -> Tensor:
    """Give the classifier's outputs (B, outputs) for a batch without augmentation."""
    images = batch.images
    if images is not None:
        images = classifier.see(images, Seen(batch.features, batch.extents))
    with autocast(precision, batch.labels.device):
        logits: Tensor = classifier(images, batch.features, batch.extents)
    return logits


def amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Choose the dtype of mixed precision on a device; None for plain float32."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return None if precision == "float32" else getattr(torch, precision)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in mixed precision within the block, where `amp_dtype` says so."""
    dtype = amp_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
