"""How far moving features differs from encoding the moved image, tap by tap.

    python -m tests.benchmarks.equivariance weights/sam_demo.pth data/demo/images [--encoder sam_demo] [--json]

For the encoder F, a view V (a flip or a quarter turn) and images x: the root mean square of F(V x) - V F(x), as a share
of the standard deviation of F(x). What stage two approximates by moving gates, and stored views give exactly.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from pipeline.data import read_image
from pipeline.encoders import build_encoder
from pipeline.model.geometry import sample_gate
from pipeline.train.augment import VIEWS, DrawnViews, view_taps

TAPS = ("patch", "early", "middle", "late", "neck")
SHOWN = tuple(view for view in VIEWS if view != "identity")


def moved(features: torch.Tensor, view: str) -> torch.Tensor:
    """Move square maps (B, C, g, g) as training moves gates."""
    chosen = torch.full((len(features),), list(VIEWS).index(view))
    side = features.shape[-1]
    return sample_gate(features, DrawnViews(tuple(VIEWS), chosen).on_image(None), None, (side, side))


def measure(encoder: str, checkpoint: Path, images: list[Path], pool: int) -> dict[str, dict[str, float]]:
    frozen = build_encoder(encoder, checkpoint=checkpoint, taps=(*TAPS, *view_taps(TAPS, SHOWN)), pool=pool)
    prepared = [frozen.prepare(read_image(path)) for path in images]
    sizes = torch.tensor([item.size for item in prepared])
    if (sizes[:, 0] != sizes[:, 1]).any():
        message = "give square images: for others, the padding of a view lies elsewhere"
        raise SystemExit(message)
    features = frozen.encode(torch.stack([item.pixels for item in prepared]), sizes)
    return {
        tap: {
            view: ((features[f"{tap}@{view}"] - moved(features[tap], view)).square().mean().sqrt() / spread).item()
            for view in SHOWN
        }
        for tap in TAPS
        for spread in [features[tap].std(dim=(0, 2, 3)).square().mean().sqrt()]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, help="a folder of square images")
    parser.add_argument("--encoder", default="sam_demo")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--pool", type=int, default=1, help="side of the average pool, cells")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    images = sorted(arguments.images.rglob("*.png"))[: arguments.count]
    result = measure(arguments.encoder, arguments.checkpoint, images, arguments.pool)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{'':8}" + "".join(f"{view:>12}" for view in SHOWN))
    for tap, shares in result.items():
        print(f"{tap:8}" + "".join(f"{shares[view]:12.1%}" for view in SHOWN))


if __name__ == "__main__":
    main()
