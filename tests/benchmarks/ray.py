"""What extraction on Ray costs beside `torchrun`, and how much one driver takes in.

`python -m tests.benchmarks.ray [--json] [--rounds N] [--images N] [--gib X] [--million N]`. All of it runs on this
machine, so workers and driver share its processors: what a driver with processors of its own takes in is told by the
time of the processor that it needs. Weights are seeded; speed does not depend on their values. The two sides of a ratio
take turns, and its median over rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see pipeline/__main__.py

from pipeline.cluster import Need, connected
from pipeline.data import Dataset, Sample
from pipeline.encoders import Encoder
from pipeline.extract.extract import extract
from pipeline.extract.on_node import Plain
from pipeline.extract.on_ray import OnRay
from pipeline.process import keep_freed_memory
from tests.benchmarks.extract import READING, ROOT, Made, Null, child, seeded_encoder, small_images

WORKERS = 2
CONFIG = """\
data: {{layout: folder, path: images}}
encoder: {{name: sam_demo, checkpoint: {checkpoint}, taps: [early, neck], pool: 4}}
store: {{path: features.zarr, shard_mib: 1}}
model: {{backbone: resnet18, image_px: 64, gates: []}}
train: {{epochs: 1, batch_size: 8, lr: 1e-3}}
resources: {{workers: 1, batch_size: 8, ray: {{cpus: 1, max: {workers}}}}}
run: run
"""


@dataclass(frozen=True)
class NullPlain:
    """Answers for an encoder that computes nothing (see `Null`), here and on every worker.

    Attributes:
        shape: Of its one tap.
    """

    shape: tuple[int, int, int]
    reads = "image"
    weights = None
    device = "cpu"

    @property
    def taps(self) -> Mapping[str, tuple[int, int, int]]:
        return {"neck": self.shape}

    def fingerprint(self) -> dict[str, Any]:
        return {"encoder": "null"}

    def build(self, weights: Path | None, device: str) -> Encoder:
        return cast(Encoder, Null(16, dict(self.taps), self.fingerprint()))


def shard_files(store: Path) -> list[Path]:
    """The shards of a store's neck."""
    return list((store / "neck").glob("c.*"))


def shards_per_second(store: Path) -> float:
    """How fast shards were written, by the times of their files: without the start, and by no command's own clock."""
    times = sorted(file.stat().st_mtime for file in shard_files(store))
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def overhead(folder: Path, images: int, rounds: int) -> dict[str, float]:
    """Time of a shard on Ray over that under `torchrun`, and the seconds from the start of each to its first shard."""
    seeded_encoder(folder, "sam_demo")
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
    (folder / "made").mkdir()
    for number, file in enumerate(small_images(folder / "made", images, 128)):
        file.rename(folder / "images" / "ab"[number % 2] / file.name)
    (folder / "run.yaml").write_text(CONFIG.format(checkpoint=folder / "sam_demo.pth", workers=WORKERS))
    pipeline = ["-m", "pipeline", "extract", "-c", "run.yaml", "--json"]
    ways = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS), *pipeline],
        "ray": [sys.executable, *pipeline, "--ray"],
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    starts: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            for old in folder.glob("features*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            began = time.time()
            environment = {**child(), "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
            store = folder / "features.zarr"
            speeds[name].append(shards_per_second(store))
            starts[name].append(min(f.stat().st_mtime for f in shard_files(store)) - began)
    ratios = [a / b for a, b in zip(speeds["torchrun"], speeds["ray"], strict=True)]
    return {
        "ray_overhead": statistics.median(ratios),
        **{f"{name}_shards_per_second": statistics.median(found) for name, found in speeds.items()},
        **{f"{name}_first_shard_seconds": statistics.median(found) for name, found in starts.items()},
    }


def drive(folder: str, count: int, shape: tuple[int, int, int], shard_mib: int) -> None:
    """Stage one over made images with a null encoder on a cluster of its own; prints what it took as JSON."""
    samples = tuple(Sample(name, i % 2, "train", name) for i, name in ((i, f"{i:07d}") for i in range(count)))
    dataset = Dataset("made", samples, ("even", "odd"), "binary", Made())
    plain = NullPlain(shape)
    store = Path(folder) / "made.zarr"
    with connected() as cluster:
        on = OnRay(cluster, cast(Plain, plain), Need(0.0, 1.0, 1, WORKERS), batch_size=64)
        marks: list[tuple[float, float]] = []

        def watch(task: str, done: int, total: int, **info: float | str) -> None:
            if task == "encode":
                marks.append((time.perf_counter(), time.process_time()))

        start = time.perf_counter()
        report = extract(
            dataset,
            cast(Encoder, plain),
            store,
            reading=READING,
            shard_mib=shard_mib,
            on=on,
            progress=watch,
        )
        spent = time.perf_counter() - start
    files = shard_files(store)
    first, last = marks[1], marks[-1]  # from the first shard that came
    figures = {
        "seconds": spent,
        "rows": report.rows,
        "shards": len(files),
        "gib": sum(file.stat().st_size for file in files) / 2**30,
        "shards_per_second": shards_per_second(store),
        "processor_seconds": last[1] - first[1],
        "wall_seconds": last[0] - first[0],
        "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "parts": dict(report.seconds),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def driven(folder: Path, count: int, shape: tuple[int, int, int], shard_mib: int) -> dict[str, Any]:
    """`drive` in a process of its own."""
    code = f"from tests.benchmarks.ray import drive; drive({str(folder)!r}, {count}, {shape}, {shard_mib})"
    environment = {**child(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    shutil.rmtree(folder / "made.zarr")
    return found


def taking_in(folder: Path, gib: float) -> dict[str, Any]:
    """How much one driver takes in: rows of 2 MiB in shards of 64 MiB, as of SAM's neck without a pool."""
    rows = max(96, round(gib * 2**30 / (256 * 64 * 64 * 2)))
    found = driven(folder, rows, (256, 64, 64), 64)
    share = (found["shards"] - 1) / found["shards"]  # that came after the first
    return {
        "driver_shards_per_second": found["shards_per_second"],
        "driver_gib_per_second": found["gib"] / found["shards"] * found["shards_per_second"],
        "driver_gib_per_processor_second": found["gib"] * share / found["processor_seconds"],
        "details_driver": found,
    }


def measure(rounds: int, images: int, gib: float, million: int) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if images:
            figures |= overhead(folder, images, rounds)
        if gib:
            figures |= taking_in(folder, gib)
        if million:
            found = driven(folder, million, (8, 1, 1), 1)
            figures |= {"rows_1m_seconds": found["seconds"], "driver_mb": found["driver_mb"], "details_rows": found}
    return figures


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """The figures as a person reads them."""
    yield f"| figure, {WORKERS} workers on {len(os.sched_getaffinity(0))} processors | value |"
    yield "| --- | --- |"
    for name, value in figures.items():
        if isinstance(value, float):
            yield f"| `{name}` | {value:.3g} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ray", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=6000, help="for the comparison with torchrun; 0 leaves it out")
    parser.add_argument("--gib", type=float, default=4.0, help="that the driver takes in; 0 leaves it out")
    parser.add_argument("--million", type=int, default=1_000_000, help="null rows; 0 leaves them out")
    options = parser.parse_args(arguments)
    keep_freed_memory()  # as the command does
    figures = measure(options.rounds, options.images, options.gib, options.million)
    sys.stdout.write((json.dumps(figures, indent=2) if options.json else "\n".join(table(figures))) + "\n")


if __name__ == "__main__":
    main()
