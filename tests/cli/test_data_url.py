"""The real command on data behind URLs: the bytes of the store of the files on disk, and no secret left anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner

from pipeline import url
from pipeline.cli import cli
from pipeline.data import scan
from pipeline.errors import UnreachableError
from tests.data.serving import Server, serving_folder

from .conftest import TINY, complaint, run_pipeline, succeed
from .test_kill import SEVERAL_SHARDS

DEMO = "data: {layout: demo, path: data/demo, count: 48, size_px: 64, seed: 0}"
COLUMNS = "path_column: image, label_column: shape, split_column: split, group_column: patient, mask_column: mask"
SECRETS = ("top-secret", "also-secret")


def write(folder: Path, name: str, data: str, store: str) -> str:
    """A configuration of this data section and store; its name."""
    text = TINY.replace(DEMO, f"data: {{{data}}}").replace("features/demo.zarr", f"features/{store}")
    assert f"{{{data}}}" in text
    (folder / name).write_text(text.replace("runs/demo", f"runs/{Path(store).stem}"))
    return name


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def server(work: Path) -> Iterator[Server]:
    """The images of the demo as a table, as a folder of classes with a list, and as an archive."""
    root = work / "data"
    lines = (root / "demo" / "demo.csv").read_text().splitlines()[1:]
    for image, shape, *_ in (line.split(",") for line in lines):
        target = root / "classes" / shape / Path(image).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "demo" / image, target)
    names = sorted(path.relative_to(root / "classes").as_posix() for path in root.rglob("classes/*/*.png"))
    (root / "classes" / "files.txt").write_text("\n".join(names))
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28), np.uint8)
    parts = {"train": images[:12], "val": images[12:18], "test": images[18:]}
    labels = {f"{split}_labels": np.arange(len(part), dtype=np.uint8)[:, None] % 2 for split, part in parts.items()}
    np.savez_compressed(root / "own.npz", **labels, **{f"{split}_images": part for split, part in parts.items()})
    with serving_folder(root) as server:
        server.guarded = True
        yield server


def test_a_table_behind_a_url_gives_the_same_store_and_leaves_no_secret(work: Path, server: Server) -> None:
    here = write(work, "here.yaml", f"layout: csv, path: data/demo/demo.csv, {COLUMNS}", "here.zarr")
    table = server.with_access("demo/demo.csv")
    there = write(work, "there.yaml", f"layout: csv, path: '{table}', {COLUMNS}", "there.zarr")
    assert succeed(work, "extract", "-c", here)["rows"] == succeed(work, "extract", "-c", there)["encoded"] == 48
    assert files(work / "features" / "here.zarr") == files(work / "features" / "there.zarr")
    again = succeed(work, "extract", "-c", there)
    assert (again["encoded"], again["reused"]) == (0, 48)
    said = ""
    for command in ("train", "evaluate", "report", "config"):
        json_too = () if command == "config" else ("--json",)
        done = run_pipeline(work, command, "-c", there, "--set", "train.epochs=1", *json_too)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    other = ("--set", f"data.images={server.with_access('demo')}")
    said += run_pipeline(work, "report", "-c", there, *other).stdout
    image = server.with_access("nowhere/demo.csv")
    said += complaint(work, "extract", "-c", there, "--set", f"data.path='{image}'", status=1)
    assert "there is no such file; check the URL" in said
    kept = {name: data for name, data in files(work).items() if name != there}
    assert not [name for name, data in kept.items() if any(secret.encode() in data for secret in SECRETS)]
    assert not [secret for secret in SECRETS if secret in said]


def test_a_folder_and_an_archive_behind_urls_give_the_same_stores(work: Path, server: Server) -> None:
    server.guarded = False
    for layout, here, there in (
        ("folder", "data/classes", f"{server.url}/classes/files.txt"),
        ("medmnist, name: own", "data/own.npz", f"{server.url}/own.npz"),
    ):
        name = layout.split(",")[0]
        draw = ", split: {draw: balanced}" if name == "folder" else ""
        configs = [
            write(work, f"{name}{i}.yaml", f"layout: {layout}, path: '{path}'{draw}", f"{name}{i}.zarr")
            for i, path in enumerate((here, there))
        ]
        rows = [succeed(work, "extract", "-c", config)["rows"] for config in configs]
        assert rows[0] == rows[1] > 0
        assert files(work / "features" / f"{name}0.zarr") == files(work / "features" / f"{name}1.zarr")
    prepared = succeed(work, "prepare", "-c", "folder1.yaml")["data"]
    assert prepared["path"] == f"{server.url}/classes/files.txt"
    assert prepared["train"] + prepared["val"] + prepared["test"] == 48


def test_a_place_that_can_be_listed_gives_the_same_store(
    work: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    memory = fsspec.filesystem("memory")  # of this process, so the command runs in it
    memory.put(f"{work}/data/classes/", "/there/classes/", recursive=True)
    for store, path in (("here", "data/classes"), ("there", "memory://there/classes")):
        data = f"layout: folder, path: '{path}', split: {{draw: balanced}}"
        write(work, f"{store}.yaml", data, f"{store}.zarr")
        done = CliRunner().invoke(cli, ["extract", "-c", f"{store}.yaml", "--json"], standalone_mode=False)
        assert json.loads(done.stdout)["rows"] == 48
    memory.rm("/there", recursive=True)
    assert files(work / "features" / "here.zarr") == files(work / "features" / "there.zarr")


def test_a_server_that_is_down_stops_the_run_and_the_same_command_goes_on(
    work: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.guarded = False
    monkeypatch.chdir(work)
    monkeypatch.setattr(url, "_PAUSES_SECONDS", (0.0, 0.0))
    there = write(work, "there.yaml", f"layout: csv, path: '{server.url}/demo/demo.csv', {COLUMNS}", "there.zarr")
    server.failures = 10_000
    done = CliRunner().invoke(cli, ["extract", "-c", there], standalone_mode=False)
    assert isinstance(done.exception, UnreachableError)
    assert "run the same command again, which continues" in str(done.exception)
    assert not (work / "features" / "there.zarr").exists()
    server.failures = 2  # of the four times that a server is asked
    monkeypatch.setattr(scan, "KEEP_BYTES", 0)  # every image is fetched again to be encoded
    server.down_after = len(server.requests) + 1 + 48 + 24  # table, scan, half of the images
    done = CliRunner().invoke(cli, ["extract", "-c", there, *SEVERAL_SHARDS], standalone_mode=False)
    assert isinstance(done.exception, UnreachableError)
    server.down_after = None
    report = succeed(work, "extract", "-c", there, *SEVERAL_SHARDS)
    assert report["rows"] == 48
    assert 0 < report["reused"] < 48
