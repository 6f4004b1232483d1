"""A node that sees the data of a study and not its folder; and that sees no image that the driver does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster import connected
from pipeline.config.schema import load_config
from pipeline.errors import DataError
from pipeline.progress import silent
from pipeline.stages import studies
from pipeline.stages.predictions import OfRun, predict_into
from pipeline.stages.study_plan import load_study
from tests.cli.conftest import ROOT, copy_of

from .conftest import Nodes
from .test_study import tables, work

__all__ = ["work"]
HIDDEN = ("studies", "scans")
BOTH = "resources.ray.cpus=2"  # which only the blind node has


@pytest.fixture
def blind(nodes: Nodes, work: Path) -> Iterator[Nodes]:
    """The only node with two processors has empty folders of its own where the driver has `HIDDEN`."""
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not give a process mounts of its own (unshare -m)")
    for name in HIDDEN:
        Path(name).mkdir()
    mounts = " && ".join(f"mount -t tmpfs none {work / name}" for name in HIDDEN)
    ray = f"{Path(sys.executable).with_name('ray')} start --address {nodes.address} --block"
    command = f"{mounts} && exec {ray} --num-cpus 2 --object-store-memory 80000000"
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with connected(nodes.address) as cluster:
        while not any(node["Resources"].get("CPU") == 2 for node in cluster.nodes()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
    yield nodes
    process.terminate()
    process.communicate(timeout=60)


def test_a_run_travels_from_a_node_that_does_not_see_the_folder_and_an_image_is_missed_by_name(
    blind: Nodes, alone: Path, work: Path
) -> None:
    plan = load_study(Path("study.yaml"), [BOTH])
    copy_of(alone / "studies", Path("studies"))
    run = next(run.folder for run in plan.runs if plan.reads_store(run.name))
    shutil.rmtree(run)
    report = studies.study(plan, silent, ray=blind.client_address)
    assert (report["done"], report["failed"]) == (3, {})
    assert [node["runs"] for node in report["nodes"]] == [1]
    assert tables(work) == tables(alone)
    made = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert made == {str(path.relative_to(alone / run)) for path in (alone / run).rglob("*")}

    Path("scans/a.png").write_bytes(Path("data/demo/images").glob("*.png").__next__().read_bytes())
    model = OfRun(load_config(Path("tiny.yaml"), [f"run={run.rename('seen')}", BOTH]))
    with pytest.raises(DataError) as error:  # and not set aside
        predict_into(Path("p.csv"), model, ["scans"], silent, ray=blind.address)
    assert "scans/a.png: the node" in str(error.value)
    assert "cannot read this file, and this machine can" in str(error.value)
