"""How fast SAM's encoder is beside the official code, in one run: `python -m tests.benchmarks.encoder [--json]`.

Weights are seeded, in the official layout; speed does not depend on their values. Each figure is the best of the
rounds, which alternate between the variants, so that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoders import ARCHITECTURES, Architecture, Encoder, build_encoder, layers
from pipeline.encoders.preprocessing import normalise
from pipeline.process import keep_freed_memory
from tests.benchmarks import tiny_vit
from tests.encoders.seeded import hooked, image_like, official_encoder, relative_error, seeded_state

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def operations(architecture: Architecture, input_px: int) -> int:
    """Floating-point operations of an image's matrix products and convolutions, without the padding of windows."""
    tokens, width = (input_px // architecture.patch_px) ** 2, architecture.width
    keys = [tokens if i in architecture.global_blocks else architecture.window**2 for i in range(architecture.blocks)]
    attention = sum(4 * tokens * k * width for k in keys)
    layers = architecture.blocks * 2 * tokens * 12 * width**2
    patch = 2 * tokens * 3 * architecture.patch_px**2 * width
    neck = 2 * tokens * architecture.neck * (width + 9 * architecture.neck)
    return patch + layers + attention + neck


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call, the device's queue included."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_rate(dtype: torch.dtype, device: str, side: int | None = None) -> float:
    """Operations a second of the largest products that this machine does best: a square one, or an encoder's layer."""
    side, grid = (side, side // 16) if side else (8192 if device == "cuda" else 2048, 64)
    square = torch.randn(side, side, device=device, dtype=dtype)
    layer = nn.Linear(1280, 5120, device=device, dtype=dtype)
    tokens = torch.randn(1, grid, grid, 1280, device=device, dtype=dtype)
    products: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: square @ square, 2 * side**3),
        (lambda: layers.linear(layer, tokens), 2 * grid**2 * 1280 * 5120),
    ]
    with torch.no_grad():
        return max(count / min(seconds(run, device) for _ in range(10)) for run, count in products)


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """Collect the largest memory in use above that at the start, MiB: on the device, or resident on Linux."""
    peak: list[float] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    statm, stop, samples = Path("/proc/self/statm"), threading.Event(), [0]
    if not statm.exists():
        yield peak
        return

    def watch() -> None:
        while not stop.wait(0.01):
            samples.append(int(statm.read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what an earlier run freed must not hide what this one takes
    before = int(statm.read_text().split()[1])
    watcher.start()
    yield peak
    stop.set()
    watcher.join()
    peak.append(max(0, max(samples) - before) * 4096 / 2**20)


def build(
    architecture: Architecture, state: dict[str, Tensor], input_px: int, device: str, precisions: Iterable[str]
) -> dict[str, Encoder]:
    """Our encoder in each precision, all five taps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(state, path)
        return {
            precision: build_encoder(
                architecture.name,
                checkpoint=path,
                taps=list(architecture.named_depths),
                input_px=input_px,
                precision=precision,
                device=device,
            )
            for precision in precisions
        }


def errors(
    architecture: Architecture, official: nn.Module, images: Tensor, ours: dict[str, dict[str, Tensor]]
) -> dict[str, float]:
    """Largest relative error of any tap, by precision."""
    now = torch.backends.cudnn
    with hooked(official) as expected, now.flags(now.enabled, allow_tf32=False):
        official(images)
    depths = architecture.named_depths.items()
    return {
        precision: max(relative_error(maps[tap], expected[architecture.describe(depth)]) for tap, depth in depths)
        for precision, maps in ours.items()
    }


@torch.no_grad()
def measure(
    model: str,
    input_px: int,
    batch: int,
    rounds: int,
    device: str,
    matmul_side: int | None = None,
    precisions: Iterable[str] = tuple(PRECISIONS),
) -> dict[str, Any]:
    """All figures of one model on one device."""
    architecture = ARCHITECTURES[model]
    state = seeded_state(architecture)
    official = official_encoder(architecture, state, input_px).to(device)
    encoders = build(architecture, state, input_px, device, precisions)
    prepared = next(iter(encoders.values())).prepare(image_like(input_px * 3 // 4, input_px))
    pixels = prepared.pixels.expand(batch, -1, -1, -1).to(device)
    sizes = torch.tensor([prepared.size] * batch)
    images = normalise(pixels, sizes)
    runs: dict[str, Callable[[], object]] = {"official": lambda: official(images)}
    for precision, encoder in encoders.items():
        runs[precision] = lambda encoder=encoder: encoder.encode(pixels, sizes)
    ours = {precision: encoder.encode(pixels, sizes) for precision, encoder in encoders.items()}  # compiles, too
    error = errors(architecture, official, images, ours)
    best, memory = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, 0.0)
    for _ in range(rounds):
        for name, run in runs.items():
            with peak_memory(device) as peak:
                best[name] = min(best[name], seconds(run, device))
            memory[name] = max([memory[name], *peak])
    rates = {name: matmul_rate(dtype, device, matmul_side) for name, dtype in PRECISIONS.items()}
    rates["official"] = rates["float32"]
    work = batch * operations(architecture, input_px)
    return {
        "model": model, "input_px": input_px, "batch": batch, "device": device, "threads": torch.get_num_threads(),
        "tflop_per_image": work / batch / 1e12,
        "matmul_tflops": {name: rates[name] / 1e12 for name in PRECISIONS},
        "variants": {
            name: {
                "images_per_second": batch / best[name], "tflops": work / best[name] / 1e12,
                "matmul_share": work / best[name] / rates[name], "memory_mib": memory[name],
                "speedup": best["official"] / best[name],
            }
            for name in runs
        },
        "fp32_error": error.get("float32"), "bf16_error": error.get("bfloat16"),
    }  # fmt: skip


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, with those that are compared between machines on top."""
    variants = figures["variants"]
    if figures["device"] == "cuda":
        best = {
            "gpu_speedup": variants["bfloat16"]["speedup"],
            "gpu_matmul_share": variants["bfloat16"]["matmul_share"],
        }
    else:
        best = {
            f"cpu_{short}_speedup": variants[precision]["speedup"]
            for short, precision in (("fp32", "float32"), ("bf16", "bfloat16"))
            if precision in variants
        }
    return {**best, **figures}


def table(figures: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    lines = [
        f"{figures['model']} at {figures['input_px']} px on {figures['device']}, batch {figures['batch']}, "
        f"{figures['threads']} threads, {figures['tflop_per_image']:.2f} TFLOP an image",
        f"{'':10} {'images/s':>9} {'TFLOP/s':>8} {'of matmul':>10} {'MiB':>7} {'official':>9}",
    ]
    for name, row in figures["variants"].items():
        lines.append(
            f"{name:10} {row['images_per_second']:9.3f} {row['tflops']:8.3f} {row['matmul_share']:10.0%} "
            f"{row['memory_mib']:7.0f} {row['speedup']:8.2f}x"
        )
    lines.append(f"largest relative error of a tap: {figures['fp32_error']:.1e}, bfloat16 {figures['bf16_error']:.1e}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.encoder", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", default="sam_vit_b", choices=list(ARCHITECTURES))
    parser.add_argument("--input-px", type=int, help="side of the input; the model's own by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, help="images a call: 1 on a CPU, 8 on a GPU by default")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    tiny = tiny_vit.measure(options.rounds) if options.json and options.device == "cpu" else {}
    keep_freed_memory()  # as the command does
    figures = tiny | summary(
        measure(
            options.model,
            options.input_px or ARCHITECTURES[options.model].input_px,
            options.batch or (8 if options.device == "cuda" else 1),
            options.rounds,
            options.device,
        )
    )
    sys.stdout.write((json.dumps(figures, indent=2) if options.json else table(figures)) + "\n")


if __name__ == "__main__":
    main()
