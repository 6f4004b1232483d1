"""How many images an overlay finds no mask for: they are taken as they are, and counted."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.model.classifier import Classifier
from pipeline.model.uses import Seen
from pipeline.train.feeding.feed import Feed

_AT_ONCE = 128


@torch.no_grad()
def count_masks(classifier: Classifier, feed: Feed) -> dict[str, Any]:
    """Count what is painted over the images of a feed; no image is read for that.

    Returns:
        JSON values: `images`; `without_masks`, how many are taken as they are; and `masks`, how many show on an image
        in the mean. Nothing for a classifier without an overlay, or without a sample.
    """
    overlay, side = classifier.overlay, classifier.options.image_px
    if overlay is None or not len(feed):
        return {}
    counts = []
    for positions in torch.split(torch.arange(len(feed)), _AT_ONCE):
        features, extents = feed.stored(positions, overlay.options.taps)
        for ranks in overlay.ranks(Seen(features, extents), (side, side)).cpu():
            counts.append(int((torch.bincount(ranks.flatten(), minlength=2)[1:] > 0).sum()))
    return {"images": len(counts), "without_masks": counts.count(0), "masks": sum(counts) / len(counts)}
