"""How fast masks of everything are beside SAM's own generator, after the image encoder, and whether they are the same.

Both get what LiteMedSAM's image encoder makes of generated ultrasound, its trained mask decoder, the same boxes, the
same thresholds and the same threads. The official generator takes points only; for boxes it runs with its own code for
all but the question (`tests.encoders.official_masks.FromBoxes`). Rounds alternate; each figure is the best of them.

    python -m tests.benchmarks.masks --json
    python -m tests.benchmarks.masks --sides 0.35 --rounds 2 --precision bfloat16
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.data import demo_arrays
from pipeline.encoders import build_encoder, checkpoint_path
from pipeline.encoders.masks.decoder import Decoder
from pipeline.encoders.masks.everything import Everything, box_grid
from pipeline.encoders.masks.rules import BOXES, MaskRules
from pipeline.encoders.masks.weights import decoder_state, fill
from pipeline.encoders.tiny_vit.recipe import TINY_VITS
from pipeline.weights import read_weights
from tests.encoders.official_masks import best_ious, official_masks

_SIDE_PX = 256


def measure(sides: tuple[float, ...] | None = None, rounds: int = 3, precision: str = "float32") -> dict[str, Any]:
    """Both generators on one image.

    Returns:
        `masks_over_official`, how many times the official speed ours has; `masks_equal`, the share of the official
        masks that have a counterpart of IoU .95 or more; `decoder_share`, the part of our time that the decoder takes;
        `seconds` of both; `prompts`; `masks` of both.
    """
    tiny, path = TINY_VITS["lite_medsam"], checkpoint_path("lite_medsam")
    encoder = build_encoder("lite_medsam", checkpoint=path, taps=["neck"])
    image = np.repeat(demo_arrays(1, _SIDE_PX, seed=5)[0][0, :, :, None], 3, axis=2)
    prepared = encoder.prepare(image)
    (neck,) = encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]))["neck"].permute(0, 2, 3, 1)
    prompts, masks = fill(tiny, path, decoder_state("lite_medsam", path, read_weights(path)))
    prompts.input_image_size, prompts.image_embedding_size = (_SIDE_PX, _SIDE_PX), (64, 64)
    rules = MaskRules.of({"box_sides": sides, "min_region_px": 0}, BOXES)
    clock = _Clock()
    everything = Everything(_timed(Decoder(copy.deepcopy(prompts), masks, _SIDE_PX, 64), clock), rules, _SIDE_PX)
    typed = (
        contextlib.nullcontext() if precision == "float32" else torch.autocast("cpu", dtype=getattr(torch, precision))
    )
    with torch.no_grad(), typed:
        runs: dict[str, Callable[[], Any]] = {
            "official": lambda: official_masks(prompts, masks, neck, image, rules),
            "ours": lambda: everything.masks(neck, prepared.size),
        }
        found: dict[str, Any] = {}
        best = dict.fromkeys(runs, float("inf"))
        share = 1.0
        for _ in range(rounds):
            for name, run in runs.items():
                clock.seconds, began = 0.0, time.perf_counter()
                found[name] = run()
                seconds = time.perf_counter() - began
                if seconds < best[name]:
                    best[name] = seconds
                    share = clock.seconds / seconds if name == "ours" else share
    theirs = np.stack([mask["segmentation"] for mask in found["official"]])
    ious = best_ious(found["ours"][0].numpy(), theirs)
    return {
        "masks_over_official": best["official"] / best["ours"],
        "masks_equal": float((ious >= 0.95).mean()),
        "decoder_share": share,
        "seconds": best,
        "prompts": len(box_grid(prepared.size, rules.box_sides, rules.box_step)),
        "masks": {"official": len(theirs), "ours": len(found["ours"][0])},
        "precision": precision,
        "threads": torch.get_num_threads(),
    }


class _Clock:
    seconds = 0.0


def _timed(decoder: Decoder, clock: _Clock) -> Decoder:
    """The decoder, whose every step is clocked."""

    def clocked(run: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            began = time.perf_counter()
            out = run(*arguments)
            clock.seconds += time.perf_counter() - began
            return out

        return step

    for name in ("look", "ask", "draw"):
        setattr(decoder, name, clocked(getattr(decoder, name)))
    return decoder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=float, nargs="*", help="sides of the boxes; by default those of the settings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="one line for machines")
    asked = parser.parse_args()
    found = measure(tuple(asked.sides) if asked.sides else None, asked.rounds, asked.precision)
    print(json.dumps(found, indent=None if asked.json else 2))


if __name__ == "__main__":
    main()
