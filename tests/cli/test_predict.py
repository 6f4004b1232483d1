"""`pipeline predict` over folders, lists and tables: the rows of a handful, resumed after a kill, named by URL."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from pathlib import Path

import fsspec
import pyarrow.parquet
import pytest

from pipeline.data import images_named
from pipeline.errors import DataError
from pipeline.records import read_csv
from tests.cache.serving import Server

from .conftest import complaint, copy_of, run_pipeline, start_pipeline, succeed


@pytest.fixture(scope="module")
def scans(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run is, and three parts of images, one of them torn."""
    folder = copy_of(trained, tmp_path_factory.mktemp("scans"))
    images = sorted((folder / "data/demo/images").glob("*.png"))
    for number in range(150):
        target = folder / f"scans/{number % 3}/{number:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images[number % len(images)], target)
    (folder / "scans/1/070.png").unlink()
    (folder / "scans/1/070.png").write_bytes(b"torn")
    (folder / "scans/.hidden.png").write_bytes(b"")
    (folder / "scans/notes.md").write_text("no image")
    return folder


def test_a_table_has_the_rows_of_a_handful_and_a_killed_command_continues(scans: Path) -> None:
    few = succeed(scans, "predict", "-c", "tiny.yaml", "scans", status=3)
    process = start_pipeline(scans, "predict", "-c", "tiny.yaml", "scans", "--out", "p.parquet")
    while not list(scans.glob("p.parquet.partial/0*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (scans / "p.parquet").exists()
    there = len(list(scans.glob("p.parquet.partial/0*.json")))
    report = succeed(scans, "predict", "-c", "tiny.yaml", "scans", "--out", "p.parquet", status=3)
    assert (report["images"], report["kept"]) == (150, 64 * there)
    assert report["predictions"] == few["predictions"]
    assert list(report["set_aside"]) == list(few["set_aside"]) == ["scans/1/070.png"]
    assert sum(report["predicted"].values()) == 149
    rows = pyarrow.parquet.read_table(scans / "p.parquet").to_pylist()
    assert [row["image"] for row in rows] == [row["image"] for row in few["predictions"]]
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows)
    for row, said in zip(rows, few["predictions"], strict=True):
        assert {f"p_{name}": value for name, value in said["probabilities"].items()}.items() <= row.items()
    assert read_csv(scans / "p_set_aside.csv")[0]["image"] == "scans/1/070.png"

    (scans / "some.txt").write_text("scans/0/003.png\n\nscans/1/001.png\n")
    report = succeed(scans, "predict", "-c", "tiny.yaml", "some.txt", "--out", "p.csv")
    by_image = {row["image"]: row for row in rows}
    for row in read_csv(scans / "p.csv"):
        said = {key: float(value) for key, value in row.items() if key.startswith("p_")}
        other = {key: value for key, value in by_image[row["image"]].items() if key.startswith("p_")}
        assert said == pytest.approx(other, abs=1e-6)  # in another batch, the last bits are others
    again = complaint(scans, "predict", "-c", "tiny.yaml", "some.txt", "--out", "p.csv", status=1)
    assert "'p.csv' is there already: name another file, or make it again with --replace" in again
    page = run_pipeline(scans, "predict", "-c", "tiny.yaml", "some.txt", "--out", "p.csv", "--replace")
    assert "written to p.csv" in page.stdout


@pytest.mark.parametrize("option", [("-c", "other.yaml"), ("--set", "train.lr=1")])
def test_a_model_that_was_handed_on_takes_no_configuration(tmp_path: Path, option: tuple[str, str]) -> None:
    said = complaint(tmp_path, "predict", "--model", "model", *option, "scan.png", status=2)
    assert f"{option[0]} goes without --model: an exported model has its own configuration" in said


def test_what_is_no_image_is_said() -> None:
    Path("empty").mkdir()
    for argument in ("empty", "none.txt", "nowhere://bucket/scans"):
        with pytest.raises(DataError, match=rf"^{argument}: (there is no image|the list cannot be read|.*not known)"):
            images_named([argument])
    assert images_named(["./there/or/not.png"]) == ["there/or/not.png"]


def test_a_folder_behind_a_url_is_listed_and_hides_what_gives_access(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b.png", "a.PNG", ".c.png", "d.csv", "e/f.jpg"):
        memory.pipe(f"/scans/{name}", b"")
    assert list(map(str, images_named(["memory://scans"]))) == [
        f"memory://scans/{name}" for name in ("a.PNG", "b.png", "e/f.jpg")
    ]
    (tmp_path / "list.txt").write_text("https://me:secret@host/x.png?sig=secret\ny.png\n/z.png")
    found = images_named([f"{tmp_path}/list.txt"])
    assert list(map(str, found)) == ["https://host/x.png", f"{tmp_path}/y.png", "/z.png"]


def test_images_behind_urls_have_the_rows_of_files(scans: Path) -> None:
    here = succeed(scans, "predict", "-c", "tiny.yaml", "scans/1/001.png", "scans/1/004.png")
    with Server(scans) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        url = server.url
        there = succeed(scans, "predict", "-c", "tiny.yaml", f"{url}/scans/1/001.png", f"{url}/scans/1/004.png")
        missing = complaint(scans, "predict", "-c", "tiny.yaml", f"{url}/scans/none.png", status=1)
        server.shutdown()
    assert [row["probabilities"] for row in there["predictions"]] == [
        row["probabilities"] for row in here["predictions"]
    ]
    assert f"{url}/scans/none.png: there is no such file" in missing
