"""The overlay as the explanation: what each mask changes in what the classifier says, and whether one is the lesion.

A mask is left out by not painting it: the image shows in its place, and nothing else changes. With the last one the
image becomes the plain one. What the map does not know is left as it is: a mask below another shows only where it is on
top. Both scores are of what shows: of the masks of an image the best IoU with its lesion, and the share of images in
which that is above .5. All of this is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache import Store
from pipeline.data import Image
from pipeline.data.dataset import Mask
from pipeline.explain.localise import averages
from pipeline.explain.pictures import Bar
from pipeline.mask_tap import scores_of
from pipeline.model.classifier import Classifier
from pipeline.model.overlay import Overlay
from pipeline.model.tasks import Head, probabilities
from pipeline.model.uses import Seen
from pipeline.overlap import ahead
from pipeline.progress import Progress, silent
from pipeline.train.feeding.feed import Batch, Feed
from pipeline.train.forward import outputs

MOST = 32  # masks of an image that are left out one by one, the largest: each is an image to classify
HIT = 0.5  # IoU above which a lesion counts as found
_AT_ONCE = 32
_DRAWN = 8  # masks in a picture

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class LeftOut:
    """One mask of an image, and what is said without it.

    Attributes:
        rank: Its rank by area.
        share: Of the image that shows it.
        predicted_iou: What the segmentation model thought of it; NaN where that is not stored.
        stability: Likewise.
        probabilities: (K,) without it.
    """

    rank: int
    share: float
    predicted_iou: float
    stability: float
    probabilities: Floats


@dataclass(frozen=True)
class Taken:
    """What is said of an image as it is painted, and without each of its masks.

    Attributes:
        ranks: (S, S), which mask shows where; 0 for none.
        probabilities: (K,) of the painted image.
        plain: (K,) of the image without any mask.
        masks: Those that were left out, the largest first.
        more: Masks that show and were not left out.
    """

    ranks: npt.NDArray[np.int64]
    probabilities: Floats
    plain: Floats
    masks: tuple[LeftOut, ...]
    more: int


@torch.no_grad()
def take_apart(
    classifier: Classifier,
    head: Head,
    feed: Feed,
    position: int,
    store: Store,
    *,
    precision: str = "float32",
) -> Taken:
    """Classify one image as it is painted, plain, and without each of its masks, many at a time.

    Args:
        classifier: With an overlay.
        head: What its outputs mean.
        feed: The samples.
        position: Of the image among them.
        store: Where the scores of its masks are.
        precision: As in training.
    """
    overlay = classifier.overlay
    assert overlay is not None
    batch = next(feed.batches([torch.tensor([position])]))
    assert batch.images is not None
    tap, size = overlay.options.tap, (batch.images.shape[-2], batch.images.shape[-1])
    seen = Seen(batch.features, batch.extents)
    ranks = overlay.ranks(seen, size)[0]
    areas = torch.bincount(ranks.flatten(), minlength=2)[1:]
    shown = (areas.nonzero().flatten() + 1).tolist()
    kept, maps = batch.features[tap], [batch.features[tap], torch.zeros_like(batch.features[tap])]
    maps += [kept * (kept != rank) for rank in shown[:MOST]]
    said = []
    for some in torch.split(torch.cat(maps), _AT_ONCE):
        repeated = _repeated(batch, len(some), {tap: some})
        assert repeated.images is not None
        masked = Seen(repeated.features, repeated.extents)
        painted = overlay.paint(repeated.images, masked, kept.expand(len(some), -1, -1, -1))
        logits = outputs(classifier, _painted(repeated, painted, tap), precision)
        said.append(probabilities(head, logits.cpu().double()).numpy())
    full, plain, *without = np.concatenate(said)
    scores = _scores(store, int(feed.rows[position]), scores_of(tap))
    masks = [
        LeftOut(rank, float(areas[rank - 1]) / ranks.numel(), float(scores[0, rank - 1]), float(scores[1, rank - 1]), p)
        for rank, p in zip(shown, without, strict=False)
    ]
    return Taken(ranks.cpu().numpy(), full, plain, tuple(masks), len(shown) - len(masks))


@torch.no_grad()
def paint(overlay: Overlay, feed: Feed, position: int, image: Image) -> Image:
    """Paint the masks of a sample over its image (H, W, 3), at any size and in its own shape, for a person to see."""
    features, extents = feed.stored(torch.tensor([position]), overlay.options.taps)
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(feed.device)
    painted = overlay.on_images(pixels, Seen(features, extents))[0].cpu().numpy()
    return np.ascontiguousarray(painted.transpose(1, 2, 0))


def spell(taken: Taken, class_names: Sequence[str]) -> dict[str, Any]:
    """What was taken apart, as JSON values.

    Returns:
        `said`, the likeliest class; `probabilities` by class, and `plain`, those of the image without any mask;
        `masks`, each with `rank`, `share` of the image, `predicted_iou` and `stability` (None where not stored),
        `without`, the probabilities by class, and `change`, how much less likely `said` is then; and `more`, masks that
        were not looked at.
    """
    said = int(taken.probabilities.argmax())

    def by_class(p: Floats) -> dict[str, float]:
        return dict(zip(class_names, map(float, p), strict=True))

    masks = [
        {
            "rank": mask.rank,
            "share": mask.share,
            "predicted_iou": None if np.isnan(mask.predicted_iou) else mask.predicted_iou,
            "stability": None if np.isnan(mask.stability) else mask.stability,
            "change": float(taken.probabilities[said] - mask.probabilities[said]),
            "without": by_class(mask.probabilities),
        }
        for mask in taken.masks
    ]
    return {
        "said": class_names[said],
        "probabilities": by_class(taken.probabilities),
        "plain": by_class(taken.plain),
        "masks": masks,
        "more": taken.more,
    }


def bars(taken: Taken, spelled: Mapping[str, Any]) -> list[Bar]:
    """The masks whose absence changes most, for a picture."""
    order = sorted(spelled["masks"], key=lambda mask: -abs(mask["change"]))[:_DRAWN]
    return [
        Bar(
            f"{mask['share']:.1%} of the image"
            + ("" if mask["predicted_iou"] is None else f", predicted IoU {mask['predicted_iou']:.2f}"),
            mask["change"],
            _middle(taken.ranks == mask["rank"]),
            mask["rank"],
        )
        for mask in order
    ]


def _middle(shown: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """A place in what shows of a mask (H, W), near its middle: (x, y) as parts of the sides."""
    y, x = np.nonzero(shown)
    nearest = ((y - y.mean()) ** 2 + (x - x.mean()) ** 2).argmin()
    return (float(x[nearest]) + 0.5) / shown.shape[1], (float(y[nearest]) + 0.5) / shown.shape[0]


def _repeated(batch: Batch, count: int, instead: dict[str, Tensor]) -> Batch:
    """A batch of one image as many times, with some of its features replaced."""
    assert batch.images is not None
    return Batch(
        batch.positions.expand(count),
        batch.images.expand(count, -1, -1, -1),
        {name: one.expand(count, -1, -1, -1) for name, one in batch.features.items()} | instead,
        None if batch.extents is None else batch.extents.expand(count, -1),
        batch.labels.expand(count, *batch.labels.shape[1:]),
    )


def _painted(batch: Batch, images: Tensor, tap: str) -> Batch:
    """A batch whose images have been painted already: no mask is left to paint."""
    return replace(batch, images=images, features={**batch.features, tap: torch.zeros_like(batch.features[tap])})


def _scores(store: Store, row: int, tap: str) -> Floats:
    """Predicted IoU and stability of the masks of a row: (2, 255)."""
    if tap not in store.taps:
        return np.full((2, 255), np.nan)
    scores: Floats = store.read([row], taps=(tap,))[tap][0, :, :, 0]
    return scores


@torch.no_grad()
def best_overlaps(
    overlay: Overlay,
    feed: Feed,
    kept: Sequence[int],
    lesion: Callable[[int], Mask | None],
    *,
    workers: int = 2,
    progress: Progress = silent,
) -> Floats:
    """Find the best IoU of a painted mask with each image's lesion, on the lesion's own pixels.

    Args:
        overlay: What paints.
        feed: The samples.
        kept: Positions of the m images whose lesion is known.
        lesion: Gives that of a position.
        workers: Threads that read lesions.
        progress: Called after each image.

    Returns:
        (m,) in [0, 1]; 0 where no mask is painted.
    """
    best = np.zeros(len(kept))
    with ThreadPoolExecutor(workers, "mask") as pool:
        for number, (position, mask) in enumerate(zip(kept, ahead(lesion, kept, pool, depth=4 * workers), strict=True)):
            assert mask is not None
            features, extents = feed.stored(torch.tensor([position]), overlay.options.taps)
            height, width = mask.shape
            best[number] = best_iou(overlay.ranks(Seen(features, extents), (height, width))[0].cpu().numpy(), mask)
            progress("masks", number + 1, len(kept))
    return best


def best_iou(ranks: npt.NDArray[np.integer[Any]], lesion: Mask) -> float:
    """The best intersection over union of a rank's pixels (H, W) with a lesion's; 0 where there is no rank."""
    areas = np.bincount(ranks.ravel(), minlength=2)
    inside = np.bincount(ranks[lesion], minlength=len(areas))
    return float((inside / np.maximum(areas + lesion.sum() - inside, 1))[1:].max())


def summarise(best: Floats, groups: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """Average the best overlaps (m,) over images, with 95 % intervals by drawing groups.

    Returns:
        `images`, `groups`; `best_iou` and `recall`, the share above `at`, each with `value`, `low` and `high`.
    """
    table = np.stack([best, (best > HIT).astype(np.float64)], axis=1)
    ends = averages(table, groups, resamples=resamples, seed=seed)
    return {"images": len(best), "groups": len(set(groups)), "at": HIT, "best_iou": ends[0], "recall": ends[1]}
