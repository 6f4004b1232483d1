"""The miniature SAM of the demo: a whole SAM in 1.1 M parameters, trained on the spot to segment lesions.

Its features are frozen afterwards like those of any SAM, so the demo shows the real idea without a download. The image
encoder learns first, under a mask head that is thrown away; prompt encoder and mask decoder then learn on what it sees.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

from pipeline.encoders import preprocessing
from pipeline.encoders.masks.decoder import Decoder
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.masks.rules import MaskRules
from pipeline.encoders.sam import vit as sam_vit
from pipeline.encoders.sam.prompted import draw_points, train_prompted
from pipeline.encoders.sam.recipe import architecture_named
from pipeline.encoders.sam.whole import decode, with_decoder, write_sam
from pipeline.encoders.untrained import count, draw
from pipeline.progress import Progress, silent

Images = npt.NDArray[np.uint8]
Masks = npt.NDArray[np.bool_]

_BATCH = 16
_PEAK_LR = 2e-3
_LOOKED_AT = 32  # of the held-out images by everything mode, which takes a tenth of a second for one
_FOUND = 0.5  # IoU from which a lesion counts as found
_PROMPTED_STEPS = 1.4  # for each step of the image encoder, at two thirds of its time
_SEEN = 3  # images for each step of the image encoder that prompts are about: each costs the encoder a look


@dataclass(frozen=True)
class DemoReport:
    """How the training of the miniature SAM went.

    Attributes:
        dice: Mean over held-out images of 2 |A and B| / (|A| + |B|), at full size, for the true lesion and what a point
            on it gives.
        recall: Share of held-out images in which everything mode finds the lesion: some mask, as it is stored by
            default, has an IoU of .5 with it or more.
        seconds: Wall time of the training.
        parameters: Of the whole model.
        steps: Optimiser steps of the image encoder.
    """

    dice: float
    recall: float
    seconds: float
    parameters: int
    steps: int


def train_demo_encoder(
    images: Images,
    objects: Masks,
    held_out_images: Images,
    held_out_objects: Masks,
    path: Path,
    *,
    seed: int = 0,
    steps: int = 100,
    progress: Progress = silent,
) -> DemoReport:
    """Train `sam_demo`: its image encoder to segment lesions, then the rest to answer prompts; and write it.

    The same arrays, seed and number of threads give the same file, byte for byte, on a CPU.

    Args:
        images: uint8 (n, S, S), grey.
        objects: bool (n, 1 + k, S, S), true where the lesion is, then where other objects are; those may be empty.
        held_out_images: Other images, to measure on.
        held_out_objects: Their objects.
        path: Checkpoint to write (`.pth`), in the official key layout; replaced at once or not at all.
        seed: Of the first weights and of the order of images.
        steps: Optimiser steps of the image encoder, each of 16 images; prompts take 1.4 times as many.
        progress: Called after each step.
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    architecture = architecture_named("sam_demo")
    encoder = architecture.build()
    draw(encoder, generator)
    _train_encoder(encoder, images, objects[:, 0], steps, generator, progress)
    sam = with_decoder(encoder.requires_grad_(False), architecture, generator)
    seen = slice(_SEEN * steps)
    train_prompted(
        sam,
        _necks(sam, images[seen]),
        torch.from_numpy(objects[seen]),
        steps=round(_PROMPTED_STEPS * steps),
        generator=generator,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    write_sam(sam, path)
    held_out = (_necks(sam.eval(), held_out_images), torch.from_numpy(held_out_objects[:, 0]))
    dice = dice_from_a_point(sam, *held_out, seed)
    recall = recall_of_everything(sam, *(each[:_LOOKED_AT] for each in held_out))
    return DemoReport(dice, recall, seconds, count(sam), steps)


def _train_encoder(
    encoder: ImageEncoderViT, images: Images, masks: Masks, steps: int, generator: torch.Generator, progress: Progress
) -> None:
    """Train the image encoder in place to segment lesions, under a head that is thrown away."""
    head = _new_mask_head(encoder.neck[0].out_channels, generator)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=_PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _PEAK_LR, total_steps=steps, pct_start=0.15)
    for step, batch in enumerate(_batches(len(images), steps, generator), start=1):
        logits = head(_neck(encoder, images[batch])).squeeze(1)
        loss = _loss(logits, torch.from_numpy(masks[batch]).float())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        progress("train sam_demo", step, steps, loss=loss.item())


def _batches(count: int, steps: int, generator: torch.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of each step's images; every image is seen once before any is seen again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < _BATCH:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:_BATCH].numpy()
        order = order[_BATCH:]


def _neck(encoder: ImageEncoderViT, images: Images) -> Tensor:
    """The encoder's last map (n, C, h, w), through the preprocessing that frozen features will go through."""
    prepared = [preprocessing.prepare(np.repeat(image[:, :, None], 3, axis=2), encoder.img_size) for image in images]
    pixels = torch.stack([one.pixels for one in prepared])
    sizes = torch.tensor([one.size for one in prepared])
    *_, neck = sam_vit.feature_maps(encoder, preprocessing.normalise(pixels, sizes))
    return neck.permute(0, 3, 1, 2)


@torch.no_grad()
def _necks(sam: Sam, images: Images) -> Tensor:
    """The same of many images, in batches."""
    starts = range(0, len(images), _BATCH)
    return torch.cat([_neck(sam.image_encoder, images[start : start + _BATCH]) for start in starts])


def _loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus one minus the soft Dice, against masks averaged to the logits' size."""
    target = F.adaptive_avg_pool2d(masks, (logits.shape[1], logits.shape[2]))
    probability = logits.sigmoid()
    overlap = (probability * target).sum((1, 2))
    dice = (2 * overlap + 1) / (probability.sum((1, 2)) + target.sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + (1 - dice).mean()


@torch.inference_mode()
def dice_from_a_point(sam: Sam, necks: Tensor, masks: Tensor, seed: int) -> float:
    """Mean Dice, at full size, of the mask that a random point of each lesion gives: of three, the most trusted one.

    Args:
        sam: The model.
        necks: (n, C, h, w), what the image encoder makes of the images.
        masks: bool (n, S, S), none of them empty.
        seed: Of the points.
    """
    side = sam.image_encoder.img_size
    points = draw_points(masks, side, torch.Generator().manual_seed(seed))
    logits, predicted = decode(sam, necks, points=(points, torch.ones(len(points), 1)))
    best = logits[torch.arange(len(logits)), 1 + predicted[:, 1:].argmax(1)]
    found = sam.postprocess_masks(best[:, None], (side, side), masks.shape[1:])[:, 0] > 0
    both, total = (found & masks).sum((1, 2)), found.sum((1, 2)) + masks.sum((1, 2))
    return float((2 * both / total).mean())


@torch.inference_mode()
def recall_of_everything(sam: Sam, necks: Tensor, masks: Tensor) -> float:
    """Share of images in which everything mode finds the lesion: see `DemoReport`.

    Args:
        sam: The model.
        necks: (n, C, h, w), what the image encoder makes of the images.
        masks: bool (n, S, S), none of them empty.
    """
    rules, side = MaskRules.of(None, architecture_named("sam_demo").masks["sam"]), sam.image_encoder.img_size
    grid = sam.prompt_encoder.image_embedding_size[0]
    everything = Everything(Decoder(sam.prompt_encoder, sam.mask_decoder, side, grid), rules, side)
    found = []
    for neck, mask in zip(necks, masks, strict=True):
        ranks, _ = everything(neck.permute(1, 2, 0), (side, side))
        truth = F.interpolate(mask[None, None].float(), ranks.shape[1:])[0] > 0
        both, areas = (torch.bincount(at.flatten(), minlength=256) for at in (ranks[truth].int(), ranks.int()))
        iou = both / (areas + truth.sum() - both)
        found.append(bool((iou[1:] >= _FOUND).any()))
    return sum(found) / len(found)


def _new_mask_head(channels: int, generator: torch.Generator) -> nn.Module:
    """Two upsamplings by two from the neck's grid to the predicted mask, as in SAM's decoder."""
    with torch.device("meta"):
        head = nn.Sequential(
            nn.ConvTranspose2d(channels, 32, 2, 2), nn.GELU(), nn.ConvTranspose2d(32, 16, 2, 2), nn.GELU(),
            nn.Conv2d(16, 1, 1),
        )  # fmt: skip
    return draw(head, generator)
