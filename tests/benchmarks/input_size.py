"""What a smaller input costs and changes: `python -m tests.benchmarks.input_size [--json] [--input-px 512]`.

Seconds an image of ViT-B on a CPU, in turns with 1024 px, and how far the features of X-rays lie from those at 1024 px,
both averaged to the same 16 x 16 grid. Without `--checkpoint` the weights are seeded: then the differences say that
the input size matters, and nothing about what SAM's own weights make of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.data import read_image
from pipeline.encoders import ARCHITECTURES, Encoder, build_encoder
from tests.benchmarks.extract import seconds, x_rays
from tests.encoders.seeded import relative_error, seeded_state

GRID = 16
TAPS = ("early", "middle", "late", "neck")


def encoder(checkpoint: Path, input_px: int, precision: Any) -> Encoder:
    """ViT-B whose features end on the common grid."""
    pool = input_px // 16 // GRID
    return build_encoder(
        "sam_vit_b", checkpoint=checkpoint, taps=TAPS, input_px=input_px, pool=pool, precision=precision
    )


@torch.no_grad()
def measure(checkpoint: Path, input_px: int, images: int, precision: str) -> dict[str, Any]:
    """Seconds an image at both sizes, their ratio, and the relative difference of each tap."""
    both = {side: encoder(checkpoint, side, precision) for side in (1024, input_px)}
    spent: dict[int, list[float]] = {side: [] for side in both}
    differences: dict[str, list[float]] = {tap: [] for tap in TAPS}
    for file in x_rays()[:images]:
        found = {}
        for side, vit in both.items():
            prepared = vit.prepare(read_image(file))
            pixels, sizes = prepared.pixels[None], torch.tensor([prepared.size])
            found[side] = vit.encode(pixels, sizes)
            spent[side].append(seconds(partial(vit.encode, pixels, sizes)))
        for tap in TAPS:
            differences[tap].append(relative_error(found[input_px][tap], found[1024][tap]))
    return {
        "input_px": input_px,
        "images": images,
        "threads": torch.get_num_threads(),
        "seconds_1024": statistics.median(spent[1024]),
        "seconds": statistics.median(spent[input_px]),
        "times_as_fast": statistics.median(a / b for a, b in zip(spent[1024], spent[input_px], strict=True)),
        "relative_difference": {tap: statistics.mean(values) for tap, values in differences.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.input_size", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--input-px", type=int, default=512)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpoint", type=Path, help="weights of SAM ViT-B; seeded ones by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or Path(folder) / "seeded.pth"
        if options.checkpoint is None:
            torch.save(seeded_state(ARCHITECTURES["sam_vit_b"]), path)
        figures = measure(path, options.input_px, options.images, options.precision)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{tap} {share:.2f}" for tap, share in value.items())
        sys.stdout.write(f"{name.replace('_', ' '):20} {f'{value:.3g}' if isinstance(value, float) else value}\n")


if __name__ == "__main__":
    main()
