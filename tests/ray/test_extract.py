"""Stage one on a Ray cluster: the bytes of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

import cache
from pipeline.cluster import Need, connected
from pipeline.cluster.folder import own_folder
from pipeline.config.schema import load_config
from pipeline.encoders import Encoder
from pipeline.errors import ClusterError, DataError
from pipeline.extract.extract import ExtractReport, extract
from pipeline.extract.on_node import Job, Plain, files_of, weights_here
from pipeline.extract.on_ray import OnRay
from pipeline.extract.plan import Contents
from pipeline.progress import Progress, silent
from pipeline.stages import commands
from tests import warm
from tests.cli.conftest import complaint, copy_of, start_pipeline, succeed
from tests.cli.test_kill import SEVERAL_SHARDS, digests, remove
from tests.extract.fakes import as_encoder
from tests.extract.pictures import Pictures, pictures
from tests.extract.test_ranks import files

from .conftest import Nodes, what_is_left, workers
from .jobs import OnlyHere
from .paint import Paint

COUNT = 64  # in shards of 8
ONE = Need(max=1)  # a worker's start takes longer than its work


def alone(store: Path, paint: Paint, source: Pictures, **options: Any) -> dict[str, bytes]:
    """The files that one process leaves."""
    extract(
        source.dataset(), as_encoder(paint.build(None, "cpu")), store, reading={}, shard_mib=1, batch_size=2, **options
    )
    return files(store)


def on_ray(
    nodes: Nodes,
    store: Path,
    paint: Paint,
    source: Pictures,
    *,
    need: Need = ONE,
    strict: bool = False,
    batch_size: int = 2,
    progress: Progress = silent,
) -> ExtractReport:
    with connected(nodes.address) as cluster:
        on = OnRay(cluster, cast("Plain", paint), need, batch_size=batch_size, strict=strict)
        return extract(
            source.dataset(),
            cast("Encoder", paint),
            store,
            reading={},
            shard_mib=1,
            strict=strict,
            on=on,
            progress=progress,
        )


def test_a_killed_worker_a_killed_node_a_new_node_and_a_batch_that_does_not_fit_change_no_byte(
    nodes: Nodes, tmp_path: Path
) -> None:
    wanted = alone(tmp_path / "one.zarr", Paint(), pictures(COUNT))
    happened: list[str] = []

    def kill(task: str, done: int, total: int, **info: float | str) -> None:
        if task == "encode" and done >= 8 and not happened:
            happened.append("a worker is killed")
            os.kill(next(process for process, title in workers().items() if "shard" in title), signal.SIGKILL)
        elif task == "encode" and done >= 16 and len(happened) == 1:
            happened.append("a node is killed, and another one comes")
            nodes.kill(nodes.standing[0])
            nodes.standing[0] = nodes.add()

    store = tmp_path / "s.zarr"
    report = on_ray(nodes, store, Paint(0.2, limit=3), pictures(COUNT), need=Need(), batch_size=8, progress=kill)
    assert len(happened) == 2
    assert json.loads((tmp_path / "s.zarr.batch.json").read_text())["limit"] == 2
    assert files(store) == wanted
    assert report.encoded == COUNT
    assert report.set_aside == {}
    assert sum(cast("int", node["images"]) for node in report.nodes) == COUNT
    assert len(report.nodes) >= 3
    assert cache.verify(store) == ()


def test_images_that_kill_workers_and_torn_ones_are_set_aside_alone(nodes: Nodes, tmp_path: Path) -> None:
    """One kills whoever decodes it in the scan, one is torn, and one kills its encoder: a shard's first row of two."""
    source = OnlyHere(12, deadly=5)
    source.images["007.png"] = b"torn"
    report = on_ray(nodes, tmp_path / "s.zarr", Paint(deadly=10), source)
    assert report.set_aside.keys() == {"005.png", "007.png", "010.png"}
    assert report.set_aside["005.png"].startswith("005.png: its worker died twice: ")
    assert report.set_aside["007.png"] == "007.png: not an image"
    assert report.set_aside["010.png"].startswith("its worker died twice: ")
    assert report.rows == 9
    source.images["005.png"] = b"torn"
    wanted = alone(tmp_path / "one.zarr", Paint(refused=10, reason=report.set_aside["010.png"]), source)
    assert files(tmp_path / "s.zarr") == wanted


def test_a_strict_run_ends_at_a_torn_image(nodes: Nodes, tmp_path: Path) -> None:
    source = pictures(4)
    source.images["002.png"] = b"torn"
    with pytest.raises(DataError, match="not an image"):
        on_ray(nodes, tmp_path / "s.zarr", Paint(), source, strict=True)


def test_a_node_that_does_not_see_an_image_is_named_with_the_path(nodes: Nodes, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        on_ray(nodes, tmp_path / "s.zarr", Paint(), OnlyHere(12, unseen=5))
    assert str(caught.value).startswith("node ")
    assert "cannot read an image that this machine can: /mnt/scans/005.png: there is no such file" in str(caught.value)
    assert "under the path" in caught.value.__notes__[0]


def test_a_node_that_does_not_see_a_known_image_is_named_when_it_encodes(nodes: Nodes, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    source = OnlyHere(12, unseen=5)
    alone(store, Paint(), source)
    remove(store)  # its digests are remembered
    with pytest.raises(DataError, match=r"/mnt/scans/005\.png: there is no such file") as caught:
        on_ray(nodes, store, Paint(), source)
    assert any(note.startswith("node ") and note.endswith("shard 0") for note in caught.value.__notes__)


def test_a_node_that_would_make_other_features_is_named_with_both(nodes: Nodes, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"'counting', and 'adding' there.*give all nodes the same") as caught:
        on_ray(nodes, tmp_path / "s.zarr", Paint(home=os.getpid()), pictures(4))
    assert re.fullmatch(r"node .+ \(\w{6}\): encode could not begin there", caught.value.__notes__[-1])


@pytest.fixture
def work(extracted: Path, tmp_path: Path) -> Path:
    """A private folder with data and weights, and no store."""
    folder = copy_of(extracted, tmp_path / "work")
    remove(folder / "features/demo.zarr")
    return folder


KINDS: Mapping[str, tuple[str, ...]] = {
    "int8, images and masks in a single file": (
        "store.path=features/demo.h5",
        "store.dtype=int8",
        "store.image_px=64",
        "encoder.taps=[early,masks]",
        "encoder.masks.points=4",
    ),
    "known masks": ("encoder.name=mask", "encoder.taps=[mask,masks]", "encoder.input_px=256"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_store_holds_has_the_bytes_of_one_process(
    nodes: Nodes, work: Path, kind: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(work)
    config = load_config(Path("tiny.yaml"), [*KINDS[kind], "resources.ray.max=1"])
    commands.extract(config, silent)
    wanted = digests(config.store.path)
    remove(config.store.path)
    report = commands.extract(config, silent, ray=nodes.address)
    assert digests(config.store.path) == wanted
    assert report["encoded"] == 48
    assert sum(node["images"] for node in report["nodes"]) == 48


ONE_BY_ONE = ("extract", "-c", "tiny.yaml", *SEVERAL_SHARDS, "--set", "resources.batch_size=1")


def start(folder: Path, address: str) -> warm.Child:
    return start_pipeline(folder, *ONE_BY_ONE, "--set", "resources.ray.max=1", "--json", "--ray", address)


def await_shard(folder: Path, driver: warm.Child, number: int = 1) -> None:
    """Wait until so many shards are written, whole and synced."""
    while True:
        assert driver.poll() is None, driver.communicate()
        with suppress(cache.StoreError):
            if cache.info(folder / "features/demo.zarr").shards_done >= number:
                return
        time.sleep(0.01)


def made_alone(folder: Path) -> dict[str, str]:
    """Digests of the store that one process makes where there is none."""
    succeed(folder, *ONE_BY_ONE)
    wanted = digests(folder / "features/demo.zarr")
    remove(folder / "features/demo.zarr")
    return wanted


def test_a_driver_that_is_stopped_or_killed_leaves_no_worker_and_is_continued_without_ray(
    nodes: Nodes, work: Path
) -> None:
    wanted = made_alone(work)
    for number, how in enumerate([signal.SIGTERM, signal.SIGINT, signal.SIGKILL], 1):
        driver = start(work, nodes.address)
        await_shard(work, driver, number)
        driver.send_signal(how)
        out, errors = driver.communicate(timeout=30)
        assert out == ""
        if how == signal.SIGKILL:
            assert driver.returncode == -how
        else:
            assert driver.returncode == 130, errors
            assert "the same command continues" in errors
            assert "Traceback" not in errors
        assert not what_is_left()
    assert not (work / "features/demo.zarr").exists()
    report = succeed(work, *ONE_BY_ONE)
    assert 0 < report["encoded"] < 48
    assert digests(work / "features/demo.zarr") == wanted


def test_a_killed_driver_takes_its_local_cluster_with_it_and_the_next_one_tidies_up(work: Path) -> None:
    wanted = made_alone(work)
    here = set(Path("/tmp").glob("slca-ray-*"))
    driver = start(work, "local")
    await_shard(work, driver)
    driver.kill()
    driver.communicate()
    assert not what_is_left()
    (left,) = set(Path("/tmp").glob("slca-ray-*")) - here
    driver = start(work, "local")
    out, errors = driver.communicate(timeout=90)
    assert driver.returncode == 0, errors
    report = json.loads(out)
    assert report["rows"] == 48
    assert 0 < report["encoded"] < 48
    assert report["nodes"][0].keys() >= {"node", "workers", "images", "images_per_s", "busy_seconds", "waiting_seconds"}
    assert digests(work / "features/demo.zarr") == wanted
    assert not left.exists()
    assert not what_is_left()
    with own_folder():  # what Ray's processes wrote after the driver's end goes with the next one's
        pass
    assert not set(Path("/tmp").glob("slca-ray-*")) - here


def test_weights_that_a_node_lacks_come_from_the_driver_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"numbers")
    weights.with_name("config.json").write_text("{}")
    contents = Contents({"weights_sha256": "0123"}, {}, {})
    job = Job(pictures(1), Plain({}, weights), contents, files_of(weights), 1, "cpu", None, False)
    assert weights_here(job) == weights
    weights.unlink()
    found = weights_here(job)
    assert found == tmp_path / "home/weights/from_driver/0123/model.safetensors"
    assert found.read_bytes() == b"numbers"
    assert found.with_name("config.json").read_text() == "{}"
    written = found.stat().st_mtime_ns
    assert weights_here(job) == found
    assert found.stat().st_mtime_ns == written
    assert len(list(found.parent.iterdir())) == 2


def test_ray_beside_torchrun_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = complaint(work, "extract", "-c", "tiny.yaml", "--ray", "auto", status=2)
    assert "--ray and torchrun both share the work out" in said
