"""How fast our TinyViT is beside its own code, in one run, with LiteMedSAM's trained weights.

Rounds alternate between the variants, and each figure is the best of them. `fp32_speedup` has the official code as its
users run it; `kept_memory` beside it has it with freed memory kept for its next tensors, as our command does for
itself: its large maps are then not mapped anew each time. Ours in bands has no such maps.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli.memory import keep_freed_memory
from pipeline.encoders.preprocessing import normalise, prepare
from pipeline.encoders.tiny_vit.network import Network
from pipeline.encoders.tiny_vit.recipe import TINY_VITS
from tests.encoders.seeded import image_like, relative_error
from tests.encoders.tiny_vits import hooked, official_tiny_vit, trained_state

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DEPTHS = {1: 128, 2: 64, 3: 64, 4: 64}  # cells along a side after each layer


@torch.no_grad()
def measure(rounds: int = 5) -> dict[str, Any]:
    """Speed and errors of one image on a CPU; `rate` is that of a product of the same type, operations a second."""
    tiny, state = TINY_VITS["lite_medsam"], trained_state()
    official = official_tiny_vit(tiny, state)
    networks = {name: Network(tiny, state, dtype) for name, dtype in PRECISIONS.items()}
    prepared = prepare(image_like(192, 256), tiny.input_px, "lite_medsam")
    images = normalise(prepared.pixels[None], torch.tensor([prepared.size]), "lite_medsam")
    with hooked(official, _DEPTHS) as expected, FlopCounterMode(display=False) as counter:
        official(images)
    ours = {name: list(network.maps(images)) for name, network in networks.items()}
    runs: dict[str, Callable[[], object]] = {"official": lambda: official(images)}
    runs |= {name: lambda network=network: list(network.maps(images)) for name, network in networks.items()}
    runs |= {f"product {name}": _product(dtype) for name, dtype in PRECISIONS.items()}
    best = dict.fromkeys(runs, float("inf"))
    _give_back()
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], _seconds(run))
    keep_freed_memory()
    official(images)
    kept = min(_seconds(runs["official"]) for _ in range(rounds))
    work = counter.get_total_flops()
    return {
        "tiny_fp32_speedup": best["official"] / best["float32"],
        "tiny_bf16_speedup": best["official"] / best["bfloat16"],
        "tiny_fp32_error": _worst(ours["float32"], expected),
        "tiny_bf16_error": _worst(ours["bfloat16"], expected),
        "tiny_seconds": {name: best[name] for name in ("official", *PRECISIONS)} | {"official kept_memory": kept},
        "tiny_gflop": work / 1e9,
        "tiny_matmul_share": {name: work / best[name] / (2 * 1024**3 / best[f"product {name}"]) for name in PRECISIONS},
        "threads": torch.get_num_threads(),
    }


def _product(dtype: torch.dtype) -> Callable[[], Tensor]:
    square = torch.randn(1024, 1024).to(dtype)
    return lambda: square @ square


def _worst(found: list[Tensor], expected: dict[int, Tensor]) -> float:
    """Largest relative error of any depth."""
    return max(relative_error(one, expected[depth]) for depth, one in enumerate(found))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _give_back() -> None:
    """The C library's own way with large blocks, which `keep_freed_memory` may have changed in this process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 32 * 2**20)  # the largest threshold that glibc comes to by itself
        mallopt(-1, 64 * 2**20)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(), indent=2) + "\n")
