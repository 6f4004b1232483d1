"""The command for a GPU: a step ends by itself or is ended, and the report says how, also on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from tests.benchmarks import gpu

def raises(setting):
    raise SystemExit("no X-rays here")

def hangs(setting):
    Path(sys.argv[1], "pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)

def dies(setting):
    os._exit(7)


wrong = {"raises": gpu.Step(raises, 60), "hangs": gpu.Step(hangs, 2), "dies": gpu.Step(dies, 60)}
real = {name: step for name, step in gpu.STEPS.items() if name not in ("tests", "encoder_vit_b", "sam2")}
gpu.STEPS = {**wrong, **real}
cpu = ["--device", "cpu", "--small"]
gpu.main([*cpu, "--minutes", "0.001", "--out", sys.argv[1] + "/late.json"])
sys.exit(gpu.main([*cpu, "--minutes", "4", "--out", sys.argv[1] + "/gpu.json"]))
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_what_fails_hangs_or_dies_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["measured_on_a_gpu"]
    assert "says nothing about a GPU" in report["note"]
    steps = report["steps"]
    assert steps["raises"]["status"] == "failed"
    assert "no X-rays here" in steps["raises"]["error"]
    assert steps["hangs"]["status"] == "out of time"
    assert not alive(int((tmp_path / "pid").read_text()))
    assert (steps["dies"]["status"], steps["dies"]["error"]) == ("failed", "the process ended with exit status 7")
    for name in list(steps)[3:]:
        assert steps[name]["status"] == "done", (name, steps[name])
    assert steps["machine"]["figures"]["matmul_tflops"]["bfloat16"] > 0
    assert steps["encoder_vit_h"]["figures"]["model"] == "sam_demo"  # tiny, and it says so
    assert not any(key.startswith("gpu") for key in steps["encoder_vit_h"]["figures"])
    assert 0 < steps["device_busy"]["figures"]["device_busy"] <= 1
    assert steps["batch_search"]["figures"]["chosen"] in (4, 8)
    assert steps["out_of_memory"]["figures"] == {"rows": 6, "batch_asked_for": 4, "batch_that_fits": 4}
    training = steps["training"]["figures"]
    late = json.loads((tmp_path / "late.json").read_text())["steps"]
    assert [*late] == [*steps]
    assert {step["status"] for step in late.values()} == {"not begun"}
    assert training["epoch_seconds_online"] > training["epoch_seconds_cached"] > 0
