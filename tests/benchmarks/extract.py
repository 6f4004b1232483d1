"""What stage one costs beside its encoder, how soon it starts, and what a million images take.

`python -m tests.benchmarks.extract [--json] [--rounds N] [--images N] [--million N] [--device cuda]`. Weights are
seeded; speed does not depend on their values. Ratios are medians over rounds in which the two sides take turns, so
that what else the machine does falls on both. On a GPU the share of time in which it was busy is measured, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see pipeline/__main__.py

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor, nn

from pipeline.data import Dataset, Image, Mask, Sample, pixel_digest, read_image, reading_rules
from pipeline.encoders import ARCHITECTURES, Encoder, Prepared, build_encoder
from pipeline.extract.batch_size import BatchSize
from pipeline.extract.extract import extract
from pipeline.process import keep_freed_memory
from pipeline.stages.inputs import load_dataset, reading
from tests.encoders.seeded import image_like, seeded_state

ROOT = Path(__file__).parents[2]
DEMO_IMAGES = 256
RERUN_IMAGES = 10_000
READING = reading_rules()


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Variants:
    """PNG files as many different images: file `i % len(files)` with its first pixel changed.

    Attributes:
        files: Their paths.
    """

    files: tuple[Path, ...]

    def read(self, index: int) -> Image:
        turn, number = divmod(index, len(self.files))
        image = read_image(self.files[number])
        if turn:
            image = image.copy()
            image[0, 0] = turn % 256
        return image

    def stamp(self, index: int) -> str | None:
        return None

    def mask(self, index: int) -> Mask | None:
        return None

    def dataset(self, count: int) -> Dataset:
        samples = tuple(Sample(f"{i:06d}", i % 2, "train", f"{i:06d}") for i in range(count))
        return Dataset("variants", samples, ("even", "odd"), "binary", self)


def x_rays() -> tuple[Path, ...]:
    """The chest X-rays of the tests, 1024 x 1024 px."""
    root = Path(os.environ.get("PIPELINE_TEST_DATA", ROOT.parent / "shared" / "data"))
    files = tuple(sorted(root.glob("nih_cxr/*/*.png")))
    if not files:
        message = f"no X-rays below {root}: set PIPELINE_TEST_DATA to a folder that holds nih_cxr"
        raise SystemExit(message)
    return files


def small_images(folder: Path, count: int, side: int) -> tuple[Path, ...]:
    """PNG files of textured squares, no two alike."""
    picture = image_like(side, side + count % 256)
    files = []
    for i in range(count):
        pixels = picture[:, :side].copy()
        pixels[0, :8] = np.frombuffer(np.int64(i).tobytes(), np.uint8)[:, None]
        files.append(folder / f"{i:06d}.png")
        Pillow.fromarray(pixels).save(files[-1], compress_level=1)
    return tuple(files)


def seeded_encoder(folder: Path, name: str, device: str = "cpu", precision: Any = "float32") -> Encoder:
    """An encoder whose taps are early and neck, pooled by 4."""
    path = folder / f"{name}.pth"
    if not path.exists():
        torch.save(seeded_state(ARCHITECTURES[name]), path)
    return build_encoder(name, checkpoint=path, taps=["early", "neck"], pool=4, precision=precision, device=device)


@torch.no_grad()
def bare(encoder: Encoder, images: Sequence[Prepared], batch: int) -> float:
    """Seconds of the encoder alone over images that lie prepared in memory, its results brought to the host."""
    stacked = [
        (torch.stack([image.pixels for image in few]), torch.tensor([image.size for image in few]))
        for few in (images[start : start + batch] for start in range(0, len(images), batch))
    ]

    def run() -> None:
        for pixels, sizes in stacked:
            for feature in encoder.encode(pixels, sizes).values():
                feature.cpu()

    return seconds(run)


def overhead(folder: Path, encoder: Encoder, files: tuple[Path, ...], rounds: int) -> dict[str, float]:
    """Time of the whole of stage one over that of the bare encoder, same images, same batches.

    Args:
        folder: For the stores.
        encoder: Whose.
        files: The images.
        rounds: Of both; the median ratio of pairs counts.
    """
    dataset = Variants(files).dataset(len(files))
    images = [encoder.prepare(read_image(file)) for file in files]
    batch = min(BatchSize(encoder, None, folder / "none").images, len(files))
    bare(encoder, images[:batch], batch)
    ratios, alone, whole = [], [], []
    for turn in range(rounds):
        store = folder / f"{encoder.fingerprint()['encoder']}-{turn}.zarr"

        def stage_one(store: Path = store) -> None:
            extract(dataset, encoder, store, reading=READING, batch_size=batch)

        alone.append(bare(encoder, images, batch))
        whole.append(seconds(stage_one))
        ratios.append(whole[-1] / alone[-1])
    return {
        "overhead": statistics.median(ratios),
        "bare_seconds": statistics.median(alone),
        "extract_seconds": statistics.median(whole),
    }


class Null(nn.Module):
    """Answers for an encoder and computes nothing: each feature is one grey level of its image."""

    reads = "image"
    device = torch.device("cpu")

    def __init__(self, side: int, taps: dict[str, tuple[int, int, int]], fingerprint: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.input_px = side
        self.taps = taps
        self.identity = fingerprint

    def fingerprint(self) -> dict[str, Any]:
        return self.identity

    def prepare(self, image: Image) -> Prepared:
        return Prepared(torch.tensor(image).permute(2, 0, 1), (self.input_px, self.input_px))

    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        grey = pixels[: len(sizes), 0, 0, 0].to(dtype)[:, None, None, None]
        return {tap: grey.expand(-1, *shape) for tap, shape in self.taps.items()}


RERUN = """\
data: {{layout: folder, path: images}}
encoder: {{name: sam_demo, checkpoint: {checkpoint}, taps: [early, neck], pool: 4}}
store: {{path: features.zarr}}
model: {{backbone: resnet18, image_px: 64, gates: []}}
train: {{epochs: 1, batch_size: 8, lr: 1e-3}}
run: run
"""


def rerun(folder: Path, encoder: Encoder, rounds: int) -> float:
    """Seconds of `pipeline extract` in a new process on a complete, unchanged store of 10,000 image files."""
    from pipeline.config.schema import load_config

    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
    side = 16
    for number, file in enumerate(small_images(folder, RERUN_IMAGES, side)):
        file.rename(folder / "images" / "ab"[number % 2] / file.name)
    config = folder / "rerun.yaml"
    config.write_text(RERUN.format(checkpoint=folder / "sam_demo.pth"))
    before = Path.cwd()
    os.chdir(folder)  # paths in a configuration are relative to where the command runs
    try:
        loaded = load_config(config)
        rules = reading_rules(reading(loaded))
        standing_in = cast(Encoder, Null(side, dict(encoder.taps), encoder.fingerprint()))
        extract(load_dataset(loaded), standing_in, loaded.store.path, reading=rules, batch_size=256)
    finally:
        os.chdir(before)
    command = [sys.executable, "-m", "pipeline", "extract", "-c", "rerun.yaml", "--json"]
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=child(), check=True, capture_output=True, text=True)
        spent.append(time.perf_counter() - start)
        assert json.loads(done.stdout)["reused"] == RERUN_IMAGES
    return statistics.median(spent)


def child() -> dict[str, str]:
    """The environment of a process that finds this project from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Made:
    """Images of 16 x 16 px made from their number, that change when their number does."""

    side: int = 16

    def read(self, index: int) -> Image:
        image = np.zeros((self.side, self.side, 3), np.uint8)
        image.reshape(-1)[:8] = np.frombuffer(np.int64(index).tobytes(), np.uint8)
        return image

    def stamp(self, index: int) -> str | None:
        return f"image {index}"

    def mask(self, index: int) -> Mask | None:
        return None


def resident_mb() -> float:
    """Memory of this process now, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def simulate(folder: str, count: int) -> None:
    """Stage one over made images and a null encoder, in this process; prints what it took as JSON."""
    samples = tuple(Sample(name, i % 2, "train", name) for i, name in ((i, f"{i:07d}") for i in range(count)))
    dataset = Dataset("made", samples, ("even", "odd"), "binary", Made())
    encoder = cast(Encoder, Null(16, {"neck": (8, 1, 1)}, {"encoder": "null"}))
    seen: dict[str, list[float]] = {}

    def watch(task: str, done: int, total: int, **info: float | str) -> None:
        if done in (total, total // 5) or done % 4096 == 0:
            seen.setdefault(task, []).append(resident_mb())

    torch.set_num_threads(1)
    before = resident_mb()
    start = time.perf_counter()
    report = extract(
        dataset, encoder, Path(folder) / "made.zarr", reading=READING, shard_mib=1, batch_size=64, progress=watch
    )
    encoding = seen.get("encode", [before])
    figures = {
        "seconds": time.perf_counter() - start,
        "encoded": report.encoded,
        "before_mb": before,
        "peak_mb": max([before, *(mb for values in seen.values() for mb in values)]),
        "grown_mb": encoding[-1] - encoding[len(encoding) // 5],
        **{f"{part.replace(' ', '_')}_seconds": spent for part, spent in report.seconds.items()},
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def million(folder: Path, count: int) -> dict[str, Any]:
    """A first run over `count` images and a second one that finds nothing changed, each in a new process."""
    code = f"from tests.benchmarks.extract import simulate; simulate({str(folder)!r}, {count})"
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    return {"first": runs[0], "again": runs[1]}


def decoding(files: Sequence[Path]) -> dict[str, float]:
    """How much faster two threads read, digest and resize X-rays than one, by format.

    More than 1.7 on two idle cores says that the work is done without the interpreter's lock.
    """
    gain = {}
    with tempfile.TemporaryDirectory() as folder:
        jpegs = [Path(folder) / f"{file.stem}.jpg" for file in files]
        for png, jpeg in zip(files, jpegs, strict=True):
            Pillow.open(png).convert("RGB").save(jpeg, quality=92)
        for suffix, chosen in (("png", list(files)), ("jpeg", jpegs)):
            spent: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(5):
                for workers, times in spent.items():
                    with ThreadPoolExecutor(workers) as pool:
                        times.append(seconds(lambda pool=pool, chosen=chosen: list(pool.map(_decode, 2 * chosen))))
            gain[f"decode_{suffix}_ms"] = 1000 * min(spent[1]) / len(chosen) / 2
            gain[f"decode_{suffix}_threads_2_over_1"] = min(spent[1]) / min(spent[2])
    return gain


def _decode(file: Path) -> bytes:
    return pixel_digest(read_image(file))


class Timed(nn.Module):
    """An encoder whose batches are timed on the device's own clock."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.input_px, self.taps = encoder.input_px, encoder.taps
        self.fingerprint, self.prepare = encoder.fingerprint, encoder.prepare
        self.reads, self.device = encoder.reads, encoder.device
        self.batches: list[tuple[Any, Any]] = []

    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        start = self._now()
        features = self.encoder.encode(pixels, sizes, dtype)
        self.batches.append((start, self._now()))
        return features

    def _now(self) -> Any:
        """An event in the device's queue, or on a CPU the time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def busy(self) -> float:
        """Share of the time between the first batch's start and the last one's end in which a batch was running."""

        def between(start: Any, end: Any) -> float:
            return end - start if isinstance(start, float) else start.elapsed_time(end)

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return sum(between(*batch) for batch in self.batches) / between(self.batches[0][0], self.batches[-1][1])


def device_busy(
    folder: Path, files: tuple[Path, ...], count: int, name: str = "sam_vit_b", device: str = "cuda"
) -> float:
    """Share of the time between first and last batch in which the device worked, in bfloat16: ViT-B at 1024 px.

    The events bracket a batch's kernels, so gaps between kernels of one batch count as work.
    """
    timed = Timed(seeded_encoder(folder, name, device, "bfloat16"))
    workers = min(len(os.sched_getaffinity(0)), 16)
    dataset = Variants(files).dataset(count)
    warm = Variants(files).dataset(2 * BatchSize(timed.encoder, None, folder / "none").images)
    extract(warm, cast(Encoder, timed), folder / "warm.zarr", reading=READING, workers=workers)  # compiles
    timed.batches.clear()
    extract(dataset, cast(Encoder, timed), folder / "busy.zarr", reading=READING, workers=workers)
    return timed.busy()


def measure(rounds: int, images: int, count: int, device: str) -> dict[str, Any]:
    """All figures."""
    files = x_rays()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = seeded_encoder(folder, "sam_demo")
        (folder / "small").mkdir()
        on_demo = overhead(folder, demo, small_images(folder / "small", DEMO_IMAGES, 128), rounds)
        vit_b = overhead(folder, seeded_encoder(folder, "sam_vit_b"), files[:images], rounds)
        again = rerun(folder, demo, rounds)
        simulated = million(folder, count) if count else None
        found = {
            "overhead_vit_b": vit_b["overhead"],
            "overhead_demo": on_demo["overhead"],
            "rerun_10k_seconds": again,
            **({"device_busy": device_busy(folder, files, 64 * images)} if device == "cuda" else {}),
        }
    if simulated:
        found["million_startup_seconds"] = simulated["again"]["seconds"]
        found["million_peak_mb"] = simulated["first"]["peak_mb"]
        found["million_grown_mb"] = simulated["first"]["grown_mb"]
        found["million_images_per_second"] = count / simulated["first"]["seconds"]
    details = {"vit_b": vit_b, "demo": on_demo, "simulated": simulated}
    return {**found, **decoding(files[:8]), "threads": torch.get_num_threads(), "details": details}


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The figures as a person reads them."""
    yield f"| figure, {figures['threads']} threads | value |"
    yield "| --- | --- |"
    for name, value in figures.items():
        if isinstance(value, float):
            yield f"| `{name}` | {value:.3g} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.extract", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4, help="X-rays for ViT-B")
    parser.add_argument("--million", type=int, default=1_000_000, help="images of the simulation; 0 leaves it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    options = parser.parse_args(arguments)
    keep_freed_memory()  # as the command does
    figures = measure(options.rounds, options.images, options.million, options.device)
    sys.stdout.write((json.dumps(figures, indent=2) if options.json else "\n".join(table(figures))) + "\n")


if __name__ == "__main__":
    main()
