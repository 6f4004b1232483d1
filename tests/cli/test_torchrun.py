"""Stage one under the real `torchrun`: the bytes of one process, also when one of the processes is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .conftest import environment, succeed
from .test_kill import SEVERAL_SHARDS, await_plan, digests, remove


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline"]
    return subprocess.Popen(
        [*command, "extract", "-c", "tiny.yaml", *SEVERAL_SHARDS, "--json"],
        cwd=folder,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def rank_of(process: int) -> str:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((v.decode().removeprefix("RANK=") for v in variables if v.startswith(b"RANK=")), "")


def test_a_killed_process_costs_its_shard_and_the_same_command_goes_on(work: Path) -> None:
    store = work / "features/demo.zarr"
    succeed(work, "extract", "-c", "tiny.yaml", *SEVERAL_SHARDS)
    wanted = digests(store)
    remove(store)

    launcher = start(work)
    await_plan(work, launcher)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (victim,) = (int(child) for child in children if rank_of(int(child)) == "1")
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert time.monotonic() - began < 30
    assert "SIGKILL" in errors
    assert not store.exists()

    launcher = start(work)
    said, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert said.count('"encoded"') == 2
    assert digests(store) == wanted
