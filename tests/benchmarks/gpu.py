"""Everything that wants a GPU, in one command: `python -m tests.benchmarks.gpu --minutes 8 --out gpu.json`.

Steps go in order of importance, each in a process of its own with its own time limit, and the JSON is written after
each. A step that fails or takes too long leaves what it said last, and the next one begins. Nothing is downloaded:
weights are seeded, images and features made. `--device cpu --small` tries the command itself out in seconds; its
figures say nothing about a GPU, and the JSON says so.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see pipeline/__main__.py

import torch

from pipeline.encoders import ARCHITECTURES, build_encoder, write_untrained_encoder
from pipeline.encoders.sam.encoder import compiles
from pipeline.extract import batch_size
from pipeline.extract.batch_size import BatchSize
from pipeline.extract.extract import extract
from pipeline.process import keep_freed_memory
from pipeline.records import write_json
from tests.benchmarks import encoder, train
from tests.benchmarks import extract as stage_one
from tests.encoders.seeded import image_like, relative_error

ROOT = Path(__file__).parents[2]
LAST_LINES = 15  # of a failure
FIVE = ("patch", "early", "middle", "late", "neck")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a step is run with.

    Attributes:
        device: `cuda` or `cpu`.
        small: Whether to try the step out rather than to measure.
        folder: For its files, removed afterwards.
    """

    device: str
    small: bool
    folder: Path


@dataclass(frozen=True)
class Step:
    """One thing to find out.

    Attributes:
        run: Does it.
        seconds: At most.
    """

    run: Callable[[Setting], Figures]
    seconds: float


def machine(setting: Setting) -> Figures:
    """What this machine is, and how fast it multiplies matrices."""
    known: Figures = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    if setting.device == "cuda":
        device = torch.cuda.get_device_properties(0)
        known |= {"gpu": device.name, "gpu_gib": device.total_memory / 2**30, "cuda": torch.version.cuda}
        known |= {"compiles_blocks": compiles(torch.device("cuda"))}  # without: far from the rates below
        known |= {"capability": list(torch.cuda.get_device_capability(0)), "bf16": torch.cuda.is_bf16_supported()}
    side = 256 if setting.small else None
    rates = {name: encoder.matmul_rate(dtype, setting.device, side) for name, dtype in encoder.PRECISIONS.items()}
    return {**known, "matmul_tflops": {name: rate / 1e12 for name, rate in rates.items()}}


def gpu_tests(setting: Setting) -> Figures:
    """The tests that are skipped where there is no GPU."""
    report = setting.folder / "tests.xml"
    files = [file for file in sorted(ROOT.glob("tests/**/test_*.py")) if "@pytest.mark.gpu" in file.read_text()]
    options = ["-m", "gpu", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if not report.exists():
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    cases = ET.parse(report).getroot().findall(".//testcase")
    ended = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    bad = [*ended["failure"], *ended["error"]]
    failures = {case.get("name", ""): last_lines("".join(part.text or "" for part in case)) for case in bad}
    figures = {
        "passed": len(cases) - sum(map(len, ended.values())),
        "failed": len(bad),
        "skipped": len(ended["skipped"]),
    }
    return {**figures, "failures": failures}


def against_official(model: str, precisions: tuple[str, ...]) -> Callable[[Setting], Figures]:
    """A step: an encoder beside the official code, which is float32, and the machine's matrix products."""

    def run(setting: Setting) -> Figures:
        name, batch, rounds, side = ("sam_demo", 1, 1, 256) if setting.small else (model, 8, 3, None)
        px = ARCHITECTURES[name].input_px
        while True:
            try:
                return encoder.summary(encoder.measure(name, px, batch, rounds, setting.device, side, precisions))
            except RuntimeError as error:  # of the official code, which takes gigabytes an image
                if not batch_size.out_of_memory(error) or batch == 1:
                    raise
            batch //= 2

    return run


def against_a_cpu(name: str) -> Callable[[Setting], Figures]:
    """A step: an encoder with drawn weights, how fast it is and how far its features are from those of a CPU."""

    def run(setting: Setting) -> Figures:
        weights, px, batch = setting.folder / "weights", 64 if setting.small else None, 1 if setting.small else 16
        write_untrained_encoder(name, weights)
        build = partial(build_encoder, name, checkpoint=weights, taps=FIVE, input_px=px, pool=None)
        reference = build()
        image = reference.prepare(image_like(300, 400))
        pixels, sizes = image.pixels[None], torch.tensor([image.size])
        expected = reference.encode(pixels, sizes)
        figures: Figures = {"model": name, "input_px": reference.input_px, "batch": batch}
        many = pixels.expand(batch, -1, -1, -1).to(setting.device), sizes.expand(batch, -1)
        for precision in encoder.PRECISIONS:
            encode = partial(build(precision=precision, device=setting.device).encode, *many)
            errors = [relative_error(found[:1].cpu(), expected[tap]) for tap, found in encode().items()]
            best = min(encoder.seconds(encode, setting.device) for _ in range(3))
            figures[precision] = {"images_per_second": batch / best, "error": max(errors)}
        return figures

    return run


def batch_search(setting: Setting) -> Figures:
    """The search for the size of batches, up to 32 images: each size is compiled anew."""
    name, precision = ("sam_demo", "float32") if setting.small else ("sam_vit_b", "bfloat16")
    frozen = stage_one.seeded_encoder(setting.folder, name, setting.device, precision)
    sizes = BatchSize(frozen, None, setting.folder / "search.json")
    sizes._limit = 8 if setting.small else 32
    tried: dict[str, float] = {}

    def timed(images: int) -> float:
        spent = sizes._measure(images)
        tried[str(images)] = images / spent
        return spent

    before = sizes.images
    sizes.search(10**9, timed)
    return {"model": name, "unsearched": before, "chosen": sizes.images, "images_per_second": tried}


def out_of_memory(setting: Setting) -> Figures:
    """Extract in batches that are too large for the memory that this process may take, until they fit."""
    torch.compiler.set_stance("force_eager")  # each size would be compiled anew
    frozen = stage_one.seeded_encoder(setting.folder, "sam_demo", setting.device)
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 256 * 2**20) / total)
    count, batch = (6, 4) if setting.small else (512, 256)
    dataset = stage_one.Variants(stage_one.small_images(setting.folder, 4, 256)).dataset(count)
    store = setting.folder / "memory.zarr"
    report = extract(dataset, frozen, store, reading=stage_one.READING, batch_size=batch)
    took = BatchSize(frozen, batch, store.with_name("memory.zarr.batch.json")).images
    return {"rows": report.rows, "batch_asked_for": batch, "batch_that_fits": took}


def device_busy(setting: Setting) -> Figures:
    """How much of an extraction the device works."""
    side, images, name = (256, 4, "sam_demo") if setting.small else (1024, 32, "sam_vit_b")
    files = stage_one.small_images(setting.folder, images, side)
    count = 12 if setting.small else 512
    return {"model": name, "device_busy": stage_one.device_busy(setting.folder, files, count, name, setting.device)}


def training(setting: Setting) -> Figures:
    """An epoch on stored features against one with the encoder in the loop."""
    device, count = torch.device(setting.device), 512
    if setting.small:
        train.SIDE_PX, train.BATCH, count = 32, 8, 24  # this process is the step's own
        figures = train.measure(device, 1, count, None, "sam_demo", ("resnet18",))
    else:
        figures = train.measure(device, 2, count, None)
    cached = count / float(figures["images_per_second_resnet18"])  # type: ignore[arg-type]
    encode = count * float(figures["seconds_to_encode_an_image"])  # type: ignore[arg-type]
    return {**figures, "images": count, "epoch_seconds_cached": cached, "epoch_seconds_online": cached + encode}


STEPS = {  # the most important first
    "machine": Step(machine, 60),
    "tests": Step(gpu_tests, 150),
    "encoder_vit_h": Step(against_official("sam_vit_h", ("bfloat16",)), 180),
    "encoder_vit_b": Step(against_official("sam_vit_b", ("float32", "bfloat16")), 120),
    "lite_medsam": Step(against_a_cpu("lite_medsam"), 60),
    "sam2": Step(against_a_cpu("sam2.1_hiera_tiny"), 60),
    "out_of_memory": Step(out_of_memory, 40),
    "device_busy": Step(device_busy, 90),
    "training": Step(training, 150),
    "batch_search": Step(batch_search, 180),
}


def attempt(step: Step, device: str, small: bool, limit: float) -> Figures:
    """Run a step in a process of its own; whatever becomes of it, say so and end what it started."""
    context = multiprocessing.get_context("fork")  # what is imported need not be again; CUDA is not touched here
    receiver, sender = context.Pipe(duplex=False)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        child = context.Process(target=_run, args=(step, Setting(device, small, Path(folder)), sender))
        child.start()
        sender.close()
        try:
            said: Figures = receiver.recv() if receiver.poll(limit) else {"status": "out of time"}
        except EOFError:
            child.join()
            said = {"status": "failed", "error": f"the process ended with exit status {child.exitcode}"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid or 0, signal.SIGKILL)
            child.join()
    return {**said, "seconds": round(time.perf_counter() - began, 1), "limit_seconds": round(limit, 1)}


def _run(step: Step, setting: Setting, sender: Connection) -> None:
    """The body of a step's process."""
    os.setsid()  # so that its own children end with it
    try:
        sender.send({"status": "done", "figures": step.run(setting)})
    except BaseException:
        sender.send({"status": "failed", "error": last_lines(traceback.format_exc())})


def last_lines(text: str) -> str:
    """The end of a traceback."""
    return "\n".join(text.strip().splitlines()[-LAST_LINES:])


def measure(device: str, small: bool, seconds: float, out: Path, names: Sequence[str]) -> Figures:
    """Run the steps, and write the report after each."""
    began = time.monotonic()
    is_gpu = device == "cuda"
    report: Figures = {
        "device": device,
        "measured_on_a_gpu": is_gpu,
        "note": "" if is_gpu and not small else "made to try the command out: says nothing about a GPU",
        "minutes": seconds / 60,
        "steps": {name: {"status": "not begun"} for name in names},
    }
    write_json(out, report)
    for name in names:
        left = seconds - (time.monotonic() - began)
        if left < 1:
            break
        _say(f"{name} ...")
        report["steps"][name] = said = attempt(STEPS[name], device, small, min(STEPS[name].seconds, left))
        write_json(out, report)
        _say(f"{name}: {said['status']} after {said['seconds']} s\n{said.get('error', '')}".rstrip())
    return report


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 if every step was done."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the report")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="try the command out at tiny sizes")
    parser.add_argument(
        "--only", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="STEP", help=", ".join(STEPS)
    )
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.small:
        parser.error("a CPU takes hours for these sizes: add --small")
    keep_freed_memory()  # as the command does
    report = measure(options.device, options.small, 60 * options.minutes, options.out, options.only)
    return 0 if all(step["status"] == "done" for step in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
