"""What an epoch on cached features or masks costs: beside the plain classifier, and beside the encoder in the loop.

    python -m tests.benchmarks.train [--json] [--device cuda] [--rounds 3] [--only resnet50]

Images, features and masks are random, as the cost does not depend on them; shapes are those of ViT-B at 1024 px (on a
GPU: ViT-H), pooled by 4, and masks of 256 px. Plain, gated and painted epochs take turns, and the fastest step of each
is compared, since a shared machine only ever adds time. On one thread of a CPU (`OMP_NUM_THREADS=1`) a step's time is
the processor's, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from pipeline.data import Dataset, Sample, pixel_digest
from pipeline.encoders import ARCHITECTURES, build_encoder
from pipeline.mask_tap import MASKS, dtype_of, shapes_of
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.overlay import OverlayOptions
from pipeline.process import keep_freed_memory
from pipeline.train.augment import Augmentation
from pipeline.train.feeding.feed import Feed
from pipeline.train.loop import Loop
from pipeline.train.optimise import TrainOptions
from tests.encoders.seeded import seeded_state

SIDE_PX = 224
BATCH = 32
MOVES = Augmentation(flip_horizontal=0.5, rotation_degrees=15, scale=(0.9, 1.1), brightness=0.1, contrast=0.1)


@dataclass(frozen=True)
class Noise:
    """Random images."""

    images: np.ndarray

    def read(self, index):
        return self.images[index]

    def stamp(self, index):
        return None

    def mask(self, index):
        return None


def make_dataset(count: int) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (count, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    samples = tuple(Sample(id=f"{i}", label=i % 2, split="train", group=f"{i}") for i in range(count))
    return Dataset("noise", samples, ("a", "b"), "binary", Noise(images))


def make_store(path: Path, dataset: Dataset, encoder: str) -> cache.Store:
    architecture = ARCHITECTURES[encoder]
    channels = {tap: architecture.channels_at(depth) for tap, depth in architecture.named_depths.items()}
    taps = {tap: cache.TapSpec(width, 16, 16, "float16") for tap, width in channels.items()}
    taps[MASKS] = cache.TapSpec(*shapes_of(MASKS, 256)[MASKS], dtype_of(MASKS, "float16"))
    rows = [cache.Row(s.id, pixel_digest(dataset.read(i))) for i, s in enumerate(dataset.samples)]
    random = np.random.default_rng(1)
    with cache.create_store(path, fingerprint=cache.Fingerprint({"noise": 1}), taps=taps, rows=rows) as writer:
        for plan in writer.pending:
            count = len(plan.rows)
            features = {
                tap: random.standard_normal((count, s.channels, s.height, s.width), np.float32).astype("float16")
                for tap, s in taps.items()
                if tap != MASKS
            }
            blocks = random.integers(0, 17, (count, 1, 16, 16), np.uint8)  # as many masks, of 16 x 16 cells and more
            features[MASKS] = blocks.repeat(16, axis=2).repeat(16, axis=3)
            writer.write(plan, features, np.ones((count, 2), np.float32))
        return writer.commit()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"gates": ()},
    "gated": {},
    "painted": {"gates": (), "overlay": OverlayOptions()},
}


def make_loop(backbone: str, dataset: Dataset, store: cache.Store, kind: str, device: torch.device) -> Loop:
    model = ModelOptions(backbone=backbone, image_px=SIDE_PX, **KINDS[kind])
    feed = Feed(dataset, "train", store if model.taps else None, taps=model.taps, image_px=SIDE_PX, device=device)
    taps = {tap: shape for tap, (shape, _) in feed.shapes().items()}
    classifier = Classifier(model, taps, outputs=2).to(device)
    return Loop(classifier, "softmax", feed, TrainOptions(batch_size=BATCH), MOVES, channels_last=True)


@dataclass
class Timing:
    """What the epochs of a loop took.

    Attributes:
        step_seconds: Of the fastest step.
        wait_share: Of the epochs, the part spent waiting for data.
    """

    step_seconds: float = float("inf")
    wait_share: float = 0.0


def take_turns(loops: dict[str, Loop], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Run an epoch of each loop in turn, `rounds` times after one that warms up."""
    timings = {name: Timing() for name in loops}
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for number in range(rounds + 1):
        for name, loop in loops.items():
            timing, ends = timings[name], []

            def note(task, done, total, ends=ends, **info):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                ends.append(clock())

            row = loop.run_epoch(number, note)
            if number:
                # A step is reported when the next one is done, and the last at once: that interval is none.
                timing.step_seconds = min(timing.step_seconds, *np.diff(ends[:-1]))
                timing.wait_share = max(timing.wait_share, row["wait_share"])
    return timings


def seconds_to_encode(encoder: str, images: np.ndarray, folder: Path, device: torch.device) -> float:
    """Seconds an image takes through the frozen encoder with random weights: alone on a CPU, 16 at a time on a GPU."""
    checkpoint = folder / "random.pth"
    torch.save(seeded_state(ARCHITECTURES[encoder]), checkpoint)
    taps = ("patch", "early", "middle", "late", "neck")
    precision = "bfloat16" if device.type == "cuda" else "float32"
    frozen = build_encoder(encoder, checkpoint=checkpoint, taps=taps, pool=4, precision=precision, device=str(device))
    times = []
    for _ in range(2):  # the first one compiles
        start = time.perf_counter()
        prepared = [frozen.prepare(image) for image in images[: 16 if device.type == "cuda" else 1]]
        pixels = torch.stack([one.pixels for one in prepared])
        features = frozen.encode(pixels, torch.tensor([one.size for one in prepared]))
        features["neck"].sum().item()
        times.append((time.perf_counter() - start) / len(prepared))
    return min(times)


def measure(
    device: torch.device,
    rounds: int,
    count: int,
    only: str | None,
    encoder: str | None = None,
    backbones: tuple[str, ...] | None = None,
) -> dict[str, object]:
    encoder = encoder or ("sam_vit_h" if device.type == "cuda" else "sam_vit_b")
    larger = ("resnet152",) if device.type == "cuda" else ()
    backbones = (only,) if only else backbones or ("resnet18", "resnet50", *larger)
    dataset = make_dataset(count)
    result: dict[str, object] = {"device": str(device), "threads": torch.get_num_threads(), "encoder": encoder}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = make_store(folder / "noise.zarr", dataset, encoder)
        per_image, waits = {}, []
        for backbone in backbones:
            loops = {kind: make_loop(backbone, dataset, store, kind, device) for kind in KINDS}
            timings = take_turns(loops, rounds, device)
            per_image[backbone] = timings["gated"].step_seconds / BATCH
            result[f"gate_cost_{backbone}"] = timings["gated"].step_seconds / timings["plain"].step_seconds
            result[f"overlay_cost_{backbone}"] = timings["painted"].step_seconds / timings["plain"].step_seconds
            result[f"images_per_second_{backbone}"] = 1 / per_image[backbone]
            waits.append(timings["gated"].wait_share)
            del loops
            gc.collect()
        result["wait_share"] = max(waits)
        result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if device.type == "cuda":
            result["peak_device_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        if only:
            return result
        encode = seconds_to_encode(encoder, dataset.source.images, folder, device)
        result["seconds_to_encode_an_image"] = encode
        result["online_over_cached"] = (encode + per_image["resnet18"]) / per_image["resnet18"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind that are timed")
    parser.add_argument("--count", type=int, default=128, help="images, three batches at least")
    parser.add_argument("--only", metavar="BACKBONE", help="time this backbone, and leave out the encoder")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does
    result = measure(torch.device(arguments.device), arguments.rounds, arguments.count, arguments.only)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for key, value in result.items():
        print(f"{key:32} {value:.3f}" if isinstance(value, float) else f"{key:32} {value}")


if __name__ == "__main__":
    main()
