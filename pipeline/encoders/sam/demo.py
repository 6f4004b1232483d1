"""The miniature SAM of the demo: the same architecture in 0.8 M parameters, trained on the spot to segment lesions.

Its features are frozen afterwards like those of any SAM, so the demo shows the real idea without a download. The
mask head exists for the training alone; the checkpoint holds the image encoder in the official key layout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from pipeline.encoders import preprocessing
from pipeline.encoders.sam import vit as sam_vit
from pipeline.encoders.sam.recipe import architecture_named
from pipeline.encoders.untrained import count, draw, write_whole
from pipeline.progress import Progress, silent

Images = npt.NDArray[np.uint8]
Masks = npt.NDArray[np.bool_]

_BATCH = 16
_PEAK_LR = 2e-3


@dataclass(frozen=True)
class DemoReport:
    """How the training of the miniature SAM went.

    Attributes:
        dice: Mean over held-out images of 2 |A and B| / (|A| + |B|) for predicted and true lesion, at full size.
        seconds: Wall time of the training.
        parameters: Of the encoder, without the mask head.
        steps: Optimiser steps.
    """

    dice: float
    seconds: float
    parameters: int
    steps: int


def train_demo_encoder(
    images: Images,
    masks: Masks,
    held_out_images: Images,
    held_out_masks: Masks,
    path: Path,
    *,
    seed: int = 0,
    steps: int = 100,
    progress: Progress = silent,
) -> DemoReport:
    """Train `sam_demo` to segment lesions, and write its image encoder as a checkpoint.

    The same arrays, seed and number of threads give the same file, byte for byte, on a CPU.

    Args:
        images: uint8 (n, S, S), grey.
        masks: bool (n, S, S), true where the lesion is.
        held_out_images: Other images, to measure the Dice on.
        held_out_masks: Their masks.
        path: Checkpoint to write (`.pth`), in the official key layout; replaced at once or not at all.
        seed: Of the first weights and of the order of images.
        steps: Optimiser steps, each of 16 images.
        progress: Called after each step.
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    encoder = architecture_named("sam_demo").build()
    draw(encoder, generator)
    head = _new_mask_head(encoder.neck[0].out_channels, generator)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=_PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _PEAK_LR, total_steps=steps, pct_start=0.15)
    for step, batch in enumerate(_batches(len(images), steps, generator), start=1):
        loss = _loss(_predict(encoder, head, images[batch]), torch.from_numpy(masks[batch]).float())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        progress("train sam_demo", step, steps, loss=loss.item())
    dice = _dice(encoder, head, held_out_images, held_out_masks)
    write_whole(path, partial(torch.save, encoder.state_dict()))
    return DemoReport(dice, time.perf_counter() - started, count(encoder), steps)


def _batches(count: int, steps: int, generator: torch.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of each step's images; every image is seen once before any is seen again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < _BATCH:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:_BATCH].numpy()
        order = order[_BATCH:]


def _predict(encoder: ImageEncoderViT, head: nn.Module, images: Images) -> Tensor:
    """Logits (n, 64, 64) of the lesion, through the preprocessing that frozen features will go through."""
    prepared = [preprocessing.prepare(np.repeat(image[:, :, None], 3, axis=2), encoder.img_size) for image in images]
    pixels = torch.stack([one.pixels for one in prepared])
    sizes = torch.tensor([one.size for one in prepared])
    *_, neck = sam_vit.feature_maps(encoder, preprocessing.normalise(pixels, sizes))
    logits: Tensor = head(neck.permute(0, 3, 1, 2))
    return logits.squeeze(1)


def _loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus one minus the soft Dice, against masks averaged to the logits' size."""
    target = F.adaptive_avg_pool2d(masks, (logits.shape[1], logits.shape[2]))
    probability = logits.sigmoid()
    overlap = (probability * target).sum((1, 2))
    dice = (2 * overlap + 1) / (probability.sum((1, 2)) + target.sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + (1 - dice).mean()


@torch.inference_mode()
def _dice(encoder: ImageEncoderViT, head: nn.Module, images: Images, masks: Masks) -> float:
    """Mean Dice of thresholded predictions at the masks' own size; two empty masks agree fully."""
    values = []
    for start in range(0, len(images), _BATCH):
        truth = torch.from_numpy(masks[start : start + _BATCH])
        logits = _predict(encoder, head, images[start : start + _BATCH])
        found = F.interpolate(logits[:, None], truth.shape[1:], mode="bilinear")[:, 0] > 0
        both, total = (found & truth).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2))
        values.append(torch.where(total > 0, 2 * both / total, 1.0))
    return torch.cat(values).mean().item()


def _new_mask_head(channels: int, generator: torch.Generator) -> nn.Module:
    """Two upsamplings by two from the neck's grid to the predicted mask, as in SAM's decoder."""
    with torch.device("meta"):
        head = nn.Sequential(
            nn.ConvTranspose2d(channels, 32, 2, 2), nn.GELU(), nn.ConvTranspose2d(32, 16, 2, 2), nn.GELU(),
            nn.Conv2d(16, 1, 1),
        )  # fmt: skip
    return draw(head, generator)
