"""The miniature CLIP of the demo: two small towers in open_clip's layout, trained on the spot on images with captions.

It shows how the method works without a download; what it scores says nothing about CLIP. It has seen pictures of the
demo's very kind with its very words, which no published CLIP has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pillow
from torch import Tensor
from torch.nn import functional as F

from pipeline import clip
from pipeline.encoders.clip.encoder import write_weights
from pipeline.encoders.untrained import count
from pipeline.progress import Progress, silent

Images = npt.NDArray[np.uint8]

ARITHMETIC = 1  # raise when the same settings give other weights
_BATCH = 32
_PEAK_LR = 1e-3
_LARGEST_SCALE = 100.0  # of the temperature, as in CLIP


@dataclass(frozen=True)
class ClipDemoReport:
    """How the training of the miniature CLIP went.

    Attributes:
        zero_shot_auc: On held-out images, macro one against the rest, from the names of the classes alone.
        zero_shot_acc: The same, by the likeliest class.
        seconds: Wall time of the training.
        parameters: Of both towers.
        steps: Optimiser steps.
    """

    zero_shot_auc: float
    zero_shot_acc: float
    seconds: float
    parameters: int
    steps: int


def train_demo_clip(
    images: Images,
    captions: Sequence[str],
    held_out: Images,
    labels: npt.NDArray[np.int64],
    class_names: Sequence[str],
    path: Path,
    *,
    seed: int = 0,
    steps: int = 160,
    progress: Progress = silent,
) -> ClipDemoReport:
    """Train `clip:demo` to match images and captions, and write both towers in open_clip's layout.

    The loss is CLIP's, but that images whose captions are word for word the same are all positives of each other. The
    same arrays, seed and number of threads give the same file, byte for byte, on a CPU.

    Args:
        images: uint8 (n, S, S), grey.
        captions: Of each.
        held_out: Other images (m, S, S), to measure on.
        labels: Their classes (m,).
        class_names: By class number.
        path: File to write (`.safetensors`); replaced at once or not at all.
        seed: Of the first weights and of the order of images.
        steps: Optimiser steps, each of 32 images.
        progress: Called after each step.
    """
    started = time.perf_counter()
    wanted, tokenize = clip.architecture(clip.DEMO), clip.tokenizer(clip.DEMO)
    pixels, tokens = _pixels(images, wanted), tokenize(captions)
    number = {text: k for k, text in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([number[text] for text in captions])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = clip.build(wanted).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=_PEAK_LR, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _PEAK_LR, total_steps=steps, pct_start=0.1)
        for step, batch in enumerate(_batches(len(images), steps), start=1):
            loss = _contrast(model, pixels[batch], tokens[batch], same[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress("train clip:demo", step, steps, loss=loss.item())
    auc, accuracy = _zero_shot(model.eval(), _pixels(held_out, wanted), labels, tokenize, class_names)
    write_weights(path, model)
    return ClipDemoReport(auc, accuracy, time.perf_counter() - started, count(model), steps)


def _pixels(images: Images, wanted: clip.Architecture) -> Tensor:
    """Grey images (n, S, S) as the image tower takes them: (n, 3, side, side)."""
    size = (wanted.image_px, wanted.image_px)
    small = [np.array(Pillow.fromarray(image).resize(size, Pillow.Resampling.BICUBIC)) for image in images]
    grey = torch.from_numpy(np.stack(small)).float().div(255)[:, None].expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (wanted.mean, wanted.std))
    return (grey - mean) / std


def _batches(count: int, steps: int) -> Iterator[Tensor]:
    """Indices of each step's images; every image is seen once before any is seen again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < _BATCH:
            order = torch.cat([order, torch.randperm(count)])
        yield order[:_BATCH]
        order = order[_BATCH:]


def _contrast(model: Any, pixels: Tensor, tokens: Tensor, same: Tensor) -> Tensor:
    """The symmetric cross-entropy of images and captions; samples of equal `same` are each other's positives."""
    images, texts = F.normalize(model.encode_image(pixels), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)
    logits = model.logit_scale.exp().clamp(max=_LARGEST_SCALE) * images @ texts.T
    target = (same[:, None] == same).float()
    target = target / target.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.inference_mode()
def _zero_shot(
    model: Any, pixels: Tensor, labels: npt.NDArray[np.int64], tokenize: Any, class_names: Sequence[str]
) -> tuple[float, float]:
    """AUC and accuracy of the cosine with "This is a photo of {class}"."""
    from sklearn.metrics import roc_auc_score  # half a second, for those who train one

    prompts = [text for of_class in clip.prompts(class_names) for text in of_class]
    classes = clip.encode_classes(model, tokenize(prompts), len(class_names))
    images = torch.cat([F.normalize(model.encode_image(some), dim=-1) for some in torch.split(pixels, _BATCH)])
    said = (model.logit_scale.exp() * images @ classes.T).softmax(dim=1).double().numpy()
    said /= said.sum(axis=1, keepdims=True)
    auc = roc_auc_score(labels, said, multi_class="ovr", average="macro")
    return float(auc), float((said.argmax(axis=1) == labels).mean())
