"""How fast our TinyViT is beside its own code, in one run, with LiteMedSAM's trained weights.

Rounds alternate between the variants, and each figure is the best of them. Both are run as their users run them: theirs
with the C library's own way with freed memory, ours with freed memory kept, as every command of ours does for itself;
`kept_memory` is theirs with it, too. `bf16_speedup` is over the same float32 code, as for the ViTs;
`bf16_over_autocast` is over theirs in bfloat16, torch's autocast. On one thread seconds are those of the processor,
which other work on the machine hardly changes.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.encoders.preprocessing import normalise, prepare
from pipeline.encoders.tiny_vit.network import Convolution, Network
from pipeline.encoders.tiny_vit.recipe import TINY_VITS
from pipeline.process import keep_freed_memory
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
    theirs: dict[str, Callable[[], object]] = {
        "official": lambda: official(images),
        "autocast": lambda: _autocast(official, images),
    }
    own = {name: lambda network=network: list(network.maps(images)) for name, network in networks.items()}
    products = {name: _products(dtype) for name, dtype in PRECISIONS.items()}
    own |= {f"{kind} {name}": run for name, found in products.items() for kind, (run, _) in found.items()}
    own["official kept_memory"] = theirs["official"]
    best = dict.fromkeys([*theirs, *own], float("inf"))
    for _ in range(rounds):
        for settle, runs in ((_give_back, theirs), (keep_freed_memory, own)):
            settle()
            for name, run in runs.items():
                run()
                best[name] = min(best[name], _seconds(run))
    work = counter.get_total_flops()
    rates = {
        name: max(count / best[f"{kind} {name}"] for kind, (_, count) in found.items())
        for name, found in products.items()
    }
    return {
        "tiny_fp32_speedup": best["official"] / best["float32"],
        "tiny_bf16_speedup": best["official"] / best["bfloat16"],
        "tiny_bf16_over_autocast": best["autocast"] / best["bfloat16"],
        "tiny_fp32_error": _worst(ours["float32"], expected),
        "tiny_bf16_error": _worst(ours["bfloat16"], expected),
        "tiny_seconds": {name: best[name] for name in (*theirs, *PRECISIONS, "official kept_memory")},
        "tiny_gflop": work / 1e9,
        "tiny_product_tflops": {name: rate / 1e12 for name, rate in rates.items()},
        "tiny_matmul_share": {name: work / best[name] / rate for name, rate in rates.items()},
        "threads": torch.get_num_threads(),
    }


def _autocast(official: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return cast(Tensor, official(images))


def _products(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """What may be the fastest product of matrices: torch's own, and oneDNN's, a convolution of one cell; operations."""
    square, cells = torch.randn(1024, 1024).to(dtype), torch.randn(1, 64, 64, 256).to(dtype)
    layer = Convolution(torch.randn(256, 256, 1, 1), None).to(dtype)
    return {
        "square": (lambda: square @ square, 2 * 1024**3),
        "convolution": (lambda: cast(Tensor, layer(cells)), 2 * 64**2 * 256**2),
    }


def _worst(found: list[Tensor], expected: dict[int, Tensor]) -> float:
    """Largest relative error of any depth."""
    return max(relative_error(one, expected[depth]) for depth, one in enumerate(found))


def _seconds(run: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def _give_back() -> None:
    """Give freed memory to the system, now and from now on in the C library's own way; undoes `keep_freed_memory`."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    library.mallopt(-3, 32 * 2**20)  # the largest threshold that glibc comes to by itself
    library.mallopt(-1, 64 * 2**20)
    library.malloc_trim(0)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(), indent=2) + "\n")
