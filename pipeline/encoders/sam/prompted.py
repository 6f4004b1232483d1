"""How the miniature SAM learns to answer prompts: as SAM did, on what its image encoder, already trained, has seen.

The encoder looks at each image once and rests; prompt encoder and mask decoder then take steps that cost a third of
the encoder's. So the features of stage one are those of the encoder's own training, whatever is tried here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline.encoders.sam.whole import decode
from pipeline.progress import Progress, silent

_IMAGES, _PEAK_LR = 16, 2e-3
_JITTER, _MOST_JITTER_PX = 0.1, 20.0  # of a box's corners, as SAM's: a share of its side, and at most that many px


@dataclass(frozen=True)
class Prompts:
    """What is asked, and what the answer is: P points, then Q boxes.

    Attributes:
        points: (P, 1, 2), x and y in pixels of the input.
        boxes: (Q, 4), x and y of two corners.
        truth: float32 (P + Q, S, S), 1 on the object; nothing where a point lies on no object.
    """

    points: Tensor
    boxes: Tensor
    truth: Tensor


def train_prompted(
    sam: Sam, necks: Tensor, objects: Tensor, *, steps: int, generator: torch.Generator, progress: Progress = silent
) -> None:
    """Train the prompt encoder and the mask decoder in place.

    Of each image, a step asks for the lesion by a point, for two objects by a point, for one by a box, and what a
    point in the tissue finds. All four masks and their predicted IoU come of each; see `losses`.

    Args:
        sam: The model; its image encoder is left alone.
        necks: (n, C, h, w), what the image encoder makes of the images.
        objects: bool (n, 1 + k, S, S), the lesion and other objects, some of them empty.
        steps: Optimiser steps.
        generator: Draws images, objects, points and boxes.
        progress: Called after each step.
    """
    parameters = [*sam.prompt_encoder.parameters(), *sam.mask_decoder.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=_PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _PEAK_LR, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        images = torch.randint(len(necks), (_IMAGES,), generator=generator)
        prompts = draw_prompts(objects[images], sam.image_encoder.img_size, generator)
        of_masks, of_predicted = losses(*answer(sam, necks[images], prompts), prompts.truth)
        loss = of_masks + of_predicted
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        progress("train sam_demo to answer prompts", step, steps, loss=loss.item())


def answer(sam: Sam, necks: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """All four masks of each prompt, as logits (P + Q, 4, 4h, 4w), and their predicted IoU (P + Q, 4).

    Args:
        sam: The model.
        necks: (n, C, h, w); each block of n prompts is about these images.
        prompts: P and Q are multiples of n.
    """
    found = []
    if len(prompts.points):
        repeated = necks.repeat(len(prompts.points) // len(necks), 1, 1, 1)
        on_object = torch.ones(len(prompts.points), 1, dtype=torch.int)
        found.append(decode(sam, repeated, points=(prompts.points, on_object)))
    if len(prompts.boxes):
        repeated = necks.repeat(len(prompts.boxes) // len(necks), 1, 1, 1)
        found.append(decode(sam, repeated, boxes=prompts.boxes))
    masks, predicted = zip(*found, strict=True)
    return torch.cat(masks), torch.cat(predicted)


def draw_prompts(objects: Tensor, input_px: int, generator: torch.Generator) -> Prompts:
    """Prompts of one step, a block per kind: see `train_prompted`.

    Args:
        objects: bool (n, 1 + k, S, S).
        input_px: Side of the encoder's input.
        generator: Draws objects and points.
    """
    tissue = ~objects.any(1)
    by_point = [objects[:, 0], _any_object(objects, generator), _any_object(objects, generator)]
    by_box = _any_object(objects, generator)
    points = [draw_points(at, input_px, generator) for at in (*by_point, tissue)]
    truth = torch.cat([*by_point, torch.zeros_like(tissue), by_box])
    return Prompts(torch.cat(points), _boxes(by_box, input_px, generator), truth.float())


def draw_points(masks: Tensor, input_px: int, generator: torch.Generator) -> Tensor:
    """A random point of each mask, bool (n, S, S): (n, 1, 2), x and y in pixels of the input."""
    side = masks.shape[2]
    at = torch.multinomial(masks.flatten(1).float(), 1, generator=generator)
    return (torch.stack([at % side, at // side], dim=2) + 0.5) * (input_px / side) - 0.5


def losses(logits: Tensor, predicted_iou: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the masks and of their predicted IoU, each a mean over prompts.

    The single mask has a loss of its own, and of the three only the best counts, so that they may mean different
    things. A mask's loss is binary cross-entropy plus one minus the soft Dice. Where there is no object, no mask is
    asked for, and its IoU is 0: everything mode tells a find from none by that number alone.

    Args:
        logits: (P, 4, g, g).
        predicted_iou: (P, 4).
        truth: float32 (P, S, S), S a multiple of g.
    """
    target = F.adaptive_avg_pool2d(truth, (logits.shape[2], logits.shape[3]))[:, None]
    probability = logits.sigmoid()
    overlap, area = (probability * target).sum((2, 3)), probability.sum((2, 3)) + target.sum((2, 3))
    entropy = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").mean((2, 3))
    each = entropy + 1 - (2 * overlap + 1) / (area + 1)
    is_object = truth.flatten(1).any(1).float()
    of_masks = (is_object * (each[:, 0] + each[:, 1:].amin(1))).mean()
    found, there = logits > 0, target > 0.5
    iou = (found & there).sum((2, 3)) / (found | there).sum((2, 3)).clamp(min=1)
    return of_masks, F.mse_loss(predicted_iou, iou)


def _any_object(objects: Tensor, generator: torch.Generator) -> Tensor:
    """One of each image's objects that are not empty: bool (n, 1 + k, S, S) to (n, S, S)."""
    which = torch.multinomial(objects.flatten(2).any(2).float(), 1, generator=generator)[:, 0]
    return objects[torch.arange(len(objects)), which]


def _boxes(masks: Tensor, input_px: int, generator: torch.Generator) -> Tensor:
    """Boxes (n, 4) around masks (n, S, S), not empty, in pixels of the input, their corners a little off."""
    side = masks.shape[2]
    extents = []
    for along in (masks.any(1), masks.any(2)):  # columns, then rows
        first, last = along.float().argmax(1), side - along.flip(1).float().argmax(1)
        extents.append(torch.stack([first, last], dim=1))
    corners = torch.stack(extents, dim=2).flatten(1) * (input_px / side)  # x y x y
    sides = (corners[:, 2:] - corners[:, :2]).repeat(1, 2)
    noise = torch.randn(corners.shape, generator=generator) * _JITTER * sides
    return (corners + noise.clamp(-_MOST_JITTER_PX, _MOST_JITTER_PX)).clamp(0, input_px - 1)
