"""Data behind URLs are those on disk: ids, pixels, masks; what gives access shows nowhere; trouble is told apart."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import _registry
from PIL import Image

from pipeline import url as places
from pipeline.config.schema import Config, CsvData, FolderData, MedMnistData, StoreData
from pipeline.data import Dataset, generate_demo, load_csv, load_demo, load_folder, load_medmnist, read_image
from pipeline.data.layouts.files import Files
from pipeline.data.scan import scan
from pipeline.errors import DataError, UnreachableError
from pipeline.url import AnyPath, Url, any_path, without_access

from .serving import QUERY, USER, Server, serving_folder
from .test_medmnist import arrays, save

NAMES = ("benign (1)", "benign #2", "50% of?it", "köln", "a b+c")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving_folder(tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_PAUSES_SECONDS", (0.0, 0.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, images with masks beside them, names of all kinds, and what is no image."""
    root = tmp_path / "images"
    dice = np.random.default_rng(0)
    for kind in ("benign", "malignant"):
        (root / kind / "deep").mkdir(parents=True)
        for i, name in enumerate(NAMES):
            where = root / kind / ("deep" if i == 1 else "")
            Image.fromarray(dice.integers(0, 256, (5, 7, 3), np.uint8)).save(where / f"{kind} {name}.png")
            Image.fromarray(dice.integers(0, 2, (5, 7), np.uint8) * 255).save(where / f"{kind} {name}_mask.png")
    (root / "benign" / ".hidden.png").write_bytes(b"hidden")
    (root / "benign" / "notes.txt").write_text("no image")
    (root / "read.me").write_text("no image")
    return root


def listed(folder: Path) -> str:
    """Put a list of a folder's files there, as the message says; its name."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (folder / "files.txt").write_text("".join(f"./{name}\r\n" for name in names if name != "files.txt"))
    return "images/files.txt"


@pytest.fixture(params=["memory", "http", "zip"])
def behind(request: pytest.FixtureRequest, folder: Path, server: Server, tmp_path: Path) -> Iterator[str]:
    """The URL of the same folder at each kind of place."""
    if request.param == "http":
        yield f"{server.url}/{listed(folder)}"
    elif request.param == "zip":
        shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, "images")
        yield f"zip://images::{server.url}/zipped.zip"
    else:
        memory = fsspec.filesystem("memory")
        memory.put(f"{folder}/", "/bucket/images/", recursive=True)
        yield "memory://bucket/images"
        memory.rm("/bucket", recursive=True)


def alike(there: Dataset, here: Dataset) -> None:
    assert there == here  # name, samples, classes, task
    assert dict(there.ignored) == dict(here.ignored)
    for i in range(len(here)):
        np.testing.assert_array_equal(there.read(i), here.read(i))
        mask = here.mask(i)
        if mask is None:
            assert there.mask(i) is None
        else:
            np.testing.assert_array_equal(there.mask(i), mask)


def load(root: AnyPath) -> Dataset:
    return load_folder(root, masks="{stem}_mask*", draw="balanced", skip=("*deep*",))


def test_a_folder_behind_a_url_is_the_folder_on_disk(folder: Path, behind: str) -> None:
    there = load(any_path(behind))
    assert len(there) == 8
    assert all(there.source.masks)  # type: ignore[attr-defined]
    there.ignored.pop(".txt")  # type: ignore[attr-defined]
    here = load(folder)
    here.ignored.pop(".txt")  # type: ignore[attr-defined]
    alike(there, here)
    alike(pickle.loads(pickle.dumps(there)), here)


def test_each_image_is_read_once_and_again_only_when_its_version_changes(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    place = any_path(f"{server.url}/{listed(folder)}")
    server.requests.clear()
    first = scan(load(place), tmp_path / "seen.npz")
    read = [path for path, _ in server.requests if "_mask" not in path and path.endswith(".png")]
    assert len(read) == len(set(read)) == 8
    server.requests.clear()
    again = scan(load(place), tmp_path / "seen.npz")
    assert [path for path, _ in server.requests] == ["/images/files.txt"]
    np.testing.assert_array_equal(again.digests, first.digests)
    np.testing.assert_array_equal(again.digests, scan(load(folder), tmp_path / "other.npz").digests)
    changed = next(folder.glob("malignant/*1).png"))
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(changed)
    server.requests.clear()
    scan(load(place), tmp_path / "seen.npz")
    assert len(server.requests) == 2


def test_without_a_version_nothing_is_remembered(folder: Path, server: Server, tmp_path: Path) -> None:
    server.versions = False
    place = any_path(f"{server.url}/{listed(folder)}")
    scan(load(place), tmp_path / "seen.npz")
    server.requests.clear()
    scan(load(place), tmp_path / "seen.npz")
    assert len(server.requests) == 1 + 8


def test_the_memory_of_a_listed_place_goes_by_what_the_listing_says(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for kind in ("a", "b"):
        for i in range(4):
            with memory.open(f"/listed/{kind}/{i}.png", "wb") as file:
                Image.fromarray(np.full((2, 2), i, np.uint8)).save(file, "PNG")
    place = any_path("memory://listed")
    load_one = load_folder(place, draw="balanced")
    first = [load_one.stamp(i) for i in range(8)]
    assert None not in first
    assert [load_folder(place, draw="balanced").stamp(i) for i in range(8)] == first
    with memory.open("/listed/b/3.png", "wb") as file:
        Image.fromarray(np.full((3, 3), 9, np.uint8)).save(file, "PNG")
    changed = load_folder(place, draw="balanced")
    assert [changed.stamp(i) == before for i, before in enumerate(first)] == [True] * 7 + [False]
    memory.rm("/listed", recursive=True)


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def rows_of(folder: Path, before: str = "") -> list[dict[str, str]]:
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("* *.png") if "_mask" not in p.name)
    masks = [name.replace(".png", "_mask.png") for name in names]
    splits = ("train", "train", "train", "val", "test")
    return [
        {"image": before + name, "kind": name.split("/")[0], "mask": before + mask, "set": splits[i % 5]}
        for i, (name, mask) in enumerate(zip(names, masks, strict=True))
    ]


COLUMNS = {"path_column": "image", "label_column": "kind", "mask_column": "mask", "split_column": "set"}


@pytest.mark.parametrize("before", ["", "./"])
def test_a_table_and_its_images_behind_urls_are_those_on_disk(folder: Path, behind: str, before: str) -> None:
    table = write_table(folder / "table.csv", rows_of(folder, before))
    here = load_csv(table, root=folder, **COLUMNS)  # type: ignore[arg-type]
    place = any_path(behind)
    root = place.parent if behind.endswith(".txt") else place
    there = load_csv(table, root=root, **COLUMNS)  # type: ignore[arg-type]
    alike(there, here)
    if behind.startswith("http"):
        alike(load_csv(root / "table.csv", **COLUMNS), here)  # type: ignore[arg-type]


def test_a_copy_of_the_demo_behind_a_url_is_the_demo_and_one_of_other_parameters_is_refused(
    tmp_path: Path, server: Server
) -> None:
    generate_demo(tmp_path / "demo", count=6, size_px=32, seed=3)
    place = any_path(f"{server.url}/demo")
    assert not generate_demo(place, count=6, size_px=32, seed=3)
    alike(load_demo(place), load_demo(tmp_path / "demo"))
    with pytest.raises(DataError, match=r"/demo: there is no demo of these parameters; make it in a folder here"):
        generate_demo(place, count=6, size_px=32, seed=4)
    with pytest.raises(DataError, match=r"/dome/demo.csv: .*check the URL"):
        load_demo(any_path(f"{server.url}/dome"))


def test_a_table_may_hold_urls(folder: Path, server: Server) -> None:
    for name in (*folder.rglob("*#*"), *folder.rglob("*%*")):
        name.unlink()  # in a URL they would have to be quoted
    root = f"{server.url}/images"
    here = load_csv(write_table(folder / "table.csv", rows_of(folder)), **COLUMNS)  # type: ignore[arg-type]
    full = write_table(folder / "full.csv", rows_of(folder, f"{root}/"))
    there = load_csv(full, root=any_path(root), **COLUMNS)  # type: ignore[arg-type]
    assert there.samples == here.samples
    np.testing.assert_array_equal(there.read(3), here.read(3))
    np.testing.assert_array_equal(there.mask(3), here.mask(3))
    alone = load_csv(full, **COLUMNS)  # type: ignore[arg-type]
    assert [s.id for s in alone.samples] == [f"{root}/{s.id}" for s in here.samples]
    np.testing.assert_array_equal(alone.read(3), here.read(3))
    assert alone.stamp(3) is not None


def test_ids_of_signed_urls_leave_the_signature_out(folder: Path, server: Server) -> None:
    server.guarded = True
    signed = [{**row, "image": server.with_access(f"images/{row['image']}")} for row in rows_of(folder)]
    signed = [row for row in signed if "#" not in row["image"] and "of?it" not in row["image"]]
    columns = {**COLUMNS, "mask_column": None}
    made = load_csv(write_table(folder / "table.csv", signed), **columns)  # type: ignore[arg-type]
    assert not [s.id for s in made.samples if "secret" in s.id]
    assert made.read(0).shape == (5, 7, 3)
    assert "secret" not in str(made.stamp(0))


def test_files_that_a_listing_lacks_are_named_at_once(folder: Path, server: Server) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/lacking/", recursive=True)
    rows = rows_of(folder)
    table = write_table(folder / "table.csv", [*rows, {**rows[0], "image": "benign/gone.png"}])
    with pytest.raises(DataError, match=r"1 of 22 files are not below memory://lacking: 'benign/gone.png'"):
        load_csv(table, root=any_path("memory://lacking"), **COLUMNS)  # type: ignore[arg-type]
    memory.rm("/lacking", recursive=True)


def test_an_archive_is_read_in_parts_of_which_only_those_travel_that_are_needed(tmp_path: Path, server: Server) -> None:
    content = arrays((200, 200, 3))
    path = save(tmp_path / "own.npz", content, compressed=False)
    masks = save(
        tmp_path / "masks.npz", {f"{s}_masks": content[f"{s}_images"][..., 0] > 99 for s in ("train", "val", "test")}
    )
    there = load_medmnist(any_path(f"{server.url}/own.npz"), masks=any_path(f"{server.url}/masks.npz"))
    assert all(asked for _, asked in server.requests)
    assert there.stamp(0) == there.stamp(0) != there.stamp(1)
    alike(there, load_medmnist(path, masks=masks))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(there)).read(12), there.read(12))


def test_an_archive_at_a_server_that_sends_whole_files_is_refused(tmp_path: Path, server: Server) -> None:
    save(tmp_path / "own.npz", arrays((200, 200, 3)), compressed=False)
    server.ranges = False
    with pytest.raises(DataError, match=r"own.npz: the server sends whole files only.*: fetch it, name that"):
        load_medmnist(any_path(f"{server.url}/own.npz"))


def test_what_gives_access_is_used_and_shows_nowhere(folder: Path, server: Server) -> None:
    server.guarded = True
    listed(folder)
    place = any_path(server.with_access("images/files.txt"))
    made = load_folder(place, draw="balanced")
    assert made.read(0).shape == (5, 7, 3)
    assert isinstance(made.source, Files)
    shown = [str(place), repr(place), str(made), repr(made.source.root), str(made.stamp(0)), str(made.source.root)]
    for wrong in (server.with_access("images/none.txt"), f"{server.with_access('images/files.txt')}x"):
        with pytest.raises((DataError, UnreachableError)) as caught:
            load_folder(any_path(wrong))
        shown.append(str(caught.value))
        assert caught.value.__suppress_context__
    server.failures = 9
    with pytest.raises(UnreachableError) as unreached:
        made.read(1)
    shown.append(str(unreached.value))
    assert not [text for text in shown if "secret" in text or "sig=" in text]
    text = f"get {server.with_access('x')} --set data.group_pattern=^p?(1+)"
    assert without_access(text) == f"get {server.url}/x --set data.group_pattern=^p?(1+)"
    assert without_access("""data.path=https://u:it's"@p@host/x a@b""") == "data.path=https://host/x a@b"


def test_a_server_that_fails_for_a_moment_is_asked_again_and_one_that_is_gone_ends_the_run(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    made = load_folder(any_path(f"{server.url}/{listed(folder)}"), draw="balanced")
    server.failures = 2
    assert made.read(0).shape == (5, 7, 3)
    server.failures = 1000
    with pytest.raises(
        UnreachableError, match=r"ClientResponseError: 503.*run the same command again, which continues"
    ):
        scan(made, tmp_path / "seen.npz")
    server.failures = 0
    assert scan(made, tmp_path / "seen.npz").readable.all()


def test_an_image_that_is_gone_is_set_aside_and_a_lost_permission_ends_the_run(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    made = load_folder(any_path(f"{server.url}/{listed(folder)}"), draw="balanced")
    gone, empty = (folder / made.samples[i].id for i in (2, 3))
    gone.unlink()
    empty.write_bytes(b"")
    aside = scan(made, tmp_path / "seen.npz").set_aside
    assert aside[made.samples[2].id].endswith("there is no such file; check the URL")
    assert "the file is empty" in aside[made.samples[3].id]
    assert len(aside) == 2
    server.guarded = True
    with pytest.raises(UnreachableError, match=r"does not let you read this; give what it knows you by .* continues"):
        scan(made, tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/images", r"s3://bucket/images: reading s3:// needs the package 's3fs': pip install s3fs"),
        ("gs://bucket/images", r"gs://bucket/images: reading gs:// needs the package 'gcsfs': pip install gcsfs"),
        (
            "hf://datasets/a/b",
            r"hf://datasets/a/b: reading hf:// needs the package 'huggingface_hub': pip install hugg",
        ),
        ("nowhere://bucket", r"nowhere://bucket: Protocol not known: nowhere; use s3://"),
        ("memory://not/there", r"memory://not/there: there is no file below this URL; check it"),
        ("https://[host/files.txt", r"https://\[host/files.txt: Invalid IPv6 URL; use s3://"),
        (
            "https://host:p/files.txt",
            r"https://host:p/files.txt: Port could not be cast to integer value as .p.; use s3://",
        ),
        ("http://127.0.0.1:1/images", r"plain http cannot say which files are in a folder\. Put a list"),
    ],
)
def test_what_cannot_be_had_is_told_at_once(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, protocol in (("s3fs", "s3"), ("gcsfs", "gs"), ("huggingface_hub", "hf")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(_registry, protocol, raising=False)  # what was imported before
    with pytest.raises(DataError, match=said):
        load_folder(any_path(url))


def test_offline_is_said(server: Server) -> None:
    server.server_close()
    with pytest.raises(UnreachableError, match=r"Cannot connect to host 127\.0\.0\.1"):
        read_image(any_path(f"{server.url}/a.png"))


@pytest.mark.parametrize(
    ("names", "wrong"),
    [("../a.png", "'../a.png'"), ("/etc/x.png", "'/etc/x.png'"), ("http://h/x.png", "'http"), ("", "None")],
)
def test_a_list_names_files_of_its_own_folder(tmp_path: Path, server: Server, names: str, wrong: str) -> None:
    (tmp_path / "files.txt").write_text(names)
    with pytest.raises(
        DataError, match=f"expected names of files below its own folder, a line each, and found {wrong}"
    ):
        load_folder(any_path(f"{server.url}/files.txt"))


@pytest.mark.parametrize(
    ("text", "shown", "parent", "name"),
    [
        ("s3://bucket/a/b.csv", "s3://bucket/a/b.csv", "s3://bucket/a", "b.csv"),
        ("https://u:p@host/a/b.csv?x=1#f", "https://host/a/b.csv", "https://host/a", "b.csv"),
        ("https://u:it's@p@host/a/b.csv", "https://host/a/b.csv", "https://host/a", "b.csv"),
        ("https://host/", "https://host", "https://host", "host"),
        ("hf://datasets/org/set@main/t.csv", "hf://datasets/org/set@main/t.csv", "hf://datasets/org/set@main", "t.csv"),
        ("zip://a/b::https://u@host/x.zip?s=1", "zip://a/b::https://host/x.zip", "zip://a::https://host/x.zip", "b"),
    ],
)
def test_a_url_knows_its_name_and_folder(text: str, shown: str, parent: str, name: str) -> None:
    place = any_path(text)
    assert isinstance(place, Url)
    assert (str(place), str(place.parent), place.name) == (shown, parent, name)
    assert str(place / "d/e.png") == f"{shown}/d/e.png"
    assert (place / "d" / "e.png").parent == place / "d"
    assert (place / "e.tar.gz").suffix == ".gz"


def test_a_local_url_is_a_path(tmp_path: Path) -> None:
    assert any_path(f"file://{tmp_path}/a") == tmp_path / "a"
    assert any_path("data/images") == Path("data/images")


def test_the_configuration_takes_urls_for_data_and_writes_them_without_access() -> None:
    given = {"layout": "folder", "path": "https://me:top-secret@host/files.txt?sig=also-secret"}
    section = FolderData.model_validate_json(json.dumps(given))
    assert section.path == Url(given["path"])
    assert section.model_dump()["path"] == section.path
    assert json.loads(section.model_dump_json())["path"] == "https://host/files.txt"
    table = {"layout": "csv", "path": {"train": "s3://b/t.csv", "test": "t.csv"}, "path_column": "image"}
    split = CsvData.model_validate_json(json.dumps(table))
    assert split.path == {"train": Url("s3://b/t.csv"), "test": Path("t.csv")}
    assert split.model_dump()["path"] == split.path
    assert split.model_dump(mode="json")["path"] == {"train": "s3://b/t.csv", "test": "t.csv"}
    archive = MedMnistData.model_validate_json('{"layout": "medmnist", "name": "x", "path": "gs://b/x.npz"}')
    assert archive.path == Url("gs://b/x.npz")
    assert "secret" not in f"{USER.partition(':')[0]}{section!r}{QUERY.partition('=')[0]}"


@pytest.mark.parametrize("kind", [StoreData, Config])
def test_what_is_made_and_a_store_lie_on_this_machine(kind: type, tmp_path: Path) -> None:
    from pipeline.config.check import validate
    from pipeline.errors import ConfigError

    values = {"layout": "store", "path": "s3://b/store.zarr"} if kind is StoreData else {"run": "s3://b/run"}
    with pytest.raises(
        ConfigError, match=r"(path|run): got 's3://b/.*', expected a path of this machine, and this is a URL"
    ):
        validate(kind, values, "x.yaml")


def test_more_threads_wait_for_a_server_than_cores_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config.schema import load_config
    from pipeline.stages.inputs import workers

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    config = load_config(Path(__file__).parents[2] / "configs" / "default.yaml")
    assert workers(config) == 2
    data = FolderData.model_validate_json('{"layout": "folder", "path": "s3://bucket/images"}')
    there = config.model_copy(update={"data": data})
    assert workers(there) == 16
    assert workers(there.model_copy(update={"resources": config.resources.model_copy(update={"workers": 3})})) == 3


@pytest.mark.parametrize("given", ["[1]", "{}", '{"trian": "a.csv"}', '{"train": 3}', "null"])
def test_tables_that_are_none_are_told_in_one_line(given: str) -> None:
    from pipeline.config.check import validate
    from pipeline.errors import ConfigError

    values = {"layout": "csv", "path": json.loads(given), "path_column": "image"}
    with pytest.raises(ConfigError) as caught:
        validate(CsvData, values, "x.yaml")
    said = str(caught.value)
    assert said.startswith("x.yaml: path: got ")
    assert said.endswith(", expected a path or a URL, or a mapping with one for train, val and test each")
    assert "\n" not in said


@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_table_reaches_no_file_of_this_machine_outside_its_folder(folder: Path, column: str) -> None:
    rows = rows_of(folder)
    rows[2] = {**rows[2], column: f"file://{folder}/{rows[2][column]}"}
    with pytest.raises(DataError, match=r"1 paths leave .*: 'file://.*use paths relative to it"):
        load_csv(write_table(folder / "table.csv", rows), **COLUMNS)  # type: ignore[arg-type]
