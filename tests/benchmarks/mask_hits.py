"""How well the masks of a store hit the lesions of its images, with no classifier in between.

    python -m tests.benchmarks.mask_hits configs/studies/breastmnist_masks.yaml lite_medsam [--split test] [--json]

For each image with a lesion the best IoU of one of its masks with the lesion, in what shows of the mask, and the share
of images in which it is above .5; `pipeline explain` says the same of a run. 95 % intervals over groups. The
radiologists' own masks as a tap (variant `radiologist`) say what the stored map itself costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from pipeline.explain import overlays
from pipeline.model.overlay import Overlay
from pipeline.model.uses import Seen
from pipeline.stages.arguments import model_options
from pipeline.stages.inputs import load_dataset
from pipeline.stages.study_plan import load_study


def measure(study: Path, variant: str, split: str | None, resamples: int = 2000) -> dict[str, Any]:
    """Best IoU and recall at .5 of a variant's masks, over images of a split that have a lesion; None for all."""
    plan = load_study(study)
    config = next(plan.configs[run.name] for run in plan.runs if run.cell["variant"] == variant)
    dataset = load_dataset(config)
    with cache.open_store(config.store.path) as store:
        options = model_options(config)
        assert options.overlay is not None, f"{variant}: it paints no masks"
        shapes = {name: (tap.channels, tap.height, tap.width) for name, tap in store.taps.items()}
        overlay = Overlay(options.overlay, shapes, options.image_px)
        row_of = {name: row for row, name in enumerate(store.ids)}
        best, groups, painted = [], [], []
        for index, sample in enumerate(dataset.samples):
            lesion = dataset.mask(index)
            if split not in (None, sample.split) or lesion is None or not lesion.any() or sample.id not in row_of:
                continue
            row = row_of[sample.id]
            stored = store.read([row], taps=options.overlay.taps)
            extents = torch.from_numpy(store.extents[row : row + 1].copy())
            seen = Seen({tap: torch.from_numpy(values) for tap, values in stored.items()}, extents)
            ranks = overlay.ranks(seen, lesion.shape)[0].cpu().numpy()
            best.append(overlays.best_iou(ranks, lesion))
            groups.append(sample.group)
            painted.append(len(np.unique(ranks[ranks > 0])))
    found = overlays.summarise(np.array(best), groups, resamples=resamples, seed=0)
    return found | {"masks_an_image": {"median": float(np.median(painted)), "none": painted.count(0)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("variant")
    parser.add_argument("--split", choices=("train", "val", "test"), help="all by default")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.study, arguments.variant, arguments.split)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{found['images']} images with a lesion, of {found['groups']} groups")
    for name in ("best_iou", "recall"):
        print(f"{name:<10} {found[name]['value']:.3f} [{found[name]['low']:.3f}, {found[name]['high']:.3f}]")
    print(
        f"masks      {found['masks_an_image']['median']:g} (median), none in {found['masks_an_image']['none']} images"
    )


if __name__ == "__main__":
    main()
