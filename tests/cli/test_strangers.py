"""What a stranger may put into a store, a run, a checkpoint or a folder is not obeyed by the terminal, and no crash."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cache
from pipeline.cli import _run
from tests.cache.making import begin, rows, write
from tests.cli.conftest import ROOT, copy_of

EVIL = "\x1b[2J\x1b]0;owned\x07 [bold]x[/bold] [/] \u202eabc\x9b31m"
OBEYED = set(map(chr, [*range(32), *range(127, 160)])) - {"\n"} | {"\u202e"}

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line in this process: exit status, and all that it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        capfd.readouterr()
        status = _run()
        printed = capfd.readouterr()
        return status, printed.out + printed.err

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A store with escapes wherever a stranger may put text."""
    wanted = rows(range(5))
    labels = cache.Labels((EVIL, "b"), (0, 1, 0, 1, 0), ("train", "train", "val", "test", "test"))
    story = {"data_set": EVIL, "nested": {EVIL: f"{EVIL}\r\nerror: fake"}}
    with begin(tmp_path / "hostile.zarr", wanted, provenance=story, labels=labels) as writer:
        for plan in writer.pending:
            write(writer, plan, wanted, set_aside={i: EVIL for i in plan.rows if i == 4})
        writer.commit().close()
    return tmp_path / "hostile.zarr"


@pytest.mark.parametrize("command", [("info",), ("inspect",), ("verify",), ("diff", "hostile.zarr")])
def test_nothing_that_is_printed_of_a_store_is_obeyed(command: tuple[str, ...], run: Run, hostile: Path) -> None:
    (hostile / EVIL.replace("/", "")).write_text("x")
    name, *others = command
    status, printed = run("store", name, hostile, *others)
    assert not set(printed) & OBEYED, repr(printed)
    assert status == (3 if name == "verify" else 0)
    if name != "diff":
        assert "\\x1b[2J\\x1b]0;owned\\x07 [bold]x[" in printed  # as it is: no markup either


def test_neither_is_what_the_command_line_or_a_configuration_says(run: Run, tmp_path: Path) -> None:
    for arguments in ((EVIL,), ("store", EVIL), ("store", "info", EVIL), ("train", "-c", EVIL), ("train", f"--{EVIL}")):
        status, printed = run(*arguments)
        assert status in (1, 2)
        assert not set(printed) & OBEYED, repr(printed)
    (tmp_path / "evil.yaml").write_text('"\\e[2J": 1\ntrain: "\\e[2J"\n')
    status, printed = run("train", "-c", "evil.yaml")
    assert (status, set(printed) & OBEYED) == (2, set())


def test_one_function_prints_lines() -> None:
    found = [
        path.name
        for path in (ROOT / "pipeline/cli").glob("*.py")
        if re.search(r"click\.s?echo|print\(f", path.read_text())
    ]
    assert found == ["terminal.py"]


def test_half_a_character_is_no_provenance(tmp_path: Path) -> None:
    with pytest.raises(cache.FormatError, match=r"provenance is not the JSON of a store .*surrogates not allowed"):
        begin(tmp_path / "store.zarr", rows([1]), provenance={"citation": "\ud800"})


ZEROS = torch.zeros(2)
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A private copy of the trained folder."""
    return copy_of(trained, tmp_path / "work")


@pytest.mark.parametrize("content", [DEEP, "{", "[1]", "\udcff"], ids=["deep", "cut", "a list", "no UTF-8"])
@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("model.json", ("train", "evaluate", "predict", "report", "export", "runs")),
        ("metrics.json", ("report", "export", "runs", "compare")),
        ("settings.json", ("train", "runs")),
        ("history.json", ("train", "runs")),
        ("explain.json", ("report",)),
    ],
)
def test_a_damaged_json_of_a_run_is_named(
    name: str, content: str, commands: tuple[str, ...], run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    where = work / "runs/demo" / ("explain/explain.json" if name == "explain.json" else name)
    where.parent.mkdir(exist_ok=True)
    where.write_bytes(
        (content if name != "history.json" or content != "[1]" else "{}").encode(errors="surrogateescape")
    )
    image = next((work / "data/demo/images").glob("*.png"))
    arguments = {
        "predict": ("-c", "tiny.yaml", image),
        "export": ("-c", "tiny.yaml", "runs/demo", "out"),
        "compare": ("runs/demo", "runs/demo"),
        "runs": ("runs",),
    }
    for command in commands:
        status, printed = run(command, *arguments.get(command, ("-c", "tiny.yaml")))
        assert status in (0, 1), printed  # a table of runs shows the others
        assert status == 0 or name in printed, printed


@pytest.mark.parametrize(
    ("name", "command", "cell"),
    [("predictions.csv", "compare", -2), ("predictions.csv", "report", -2), ("samples.csv", "report", 0)],
)
@pytest.mark.parametrize("damage", ["cut", "a word", "no header", "zeros", "no UTF-8"])
def test_a_damaged_table_of_a_run_is_named(
    name: str, command: str, cell: int, damage: str, run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    file = work / "runs/demo" / name
    head, first, *others = file.read_bytes().splitlines(keepends=True)
    cells = first.split(b",")
    cells[cell] = b"dev"
    changed = {
        "cut": [head, first[:-20], *others],
        "a word": [head, b",".join(cells), *others],
        "no header": [first, *others],
        "zeros": [head, first, b"\0" * 100],
        "no UTF-8": [head, b"\xff" + first, *others],
    }[damage]
    file.write_bytes(b"".join(changed))
    arguments = {"compare": ("runs/demo", "runs/demo"), "report": ("-c", "tiny.yaml")}
    status, printed = run(command, *arguments[command])
    assert (status, name in printed) == (1, True), printed


def test_other_weights_than_those_that_a_model_names_are_refused(
    run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    assert run("export", "-c", "tiny.yaml", "runs/demo", "out")[0] == 0
    image = next((work / "data/demo/images").glob("*.png"))
    arguments = ("predict", "--model", "out", "--checkpoint", "weights/sam_demo.pth", image)
    assert run(*arguments)[0] == 0
    content = bytearray((work / "out/model.safetensors").read_bytes())
    content[-1] ^= 1
    (work / "out/model.safetensors").write_bytes(content)
    status, printed = run(*arguments)
    assert status == 1
    assert "they are other weights than those it names by their SHA-256" in printed


@pytest.mark.parametrize("state", [{1: ZEROS}, {(1, 2): ZEROS, "x": ZEROS}, {"state_dict": {3: ZEROS}}])
def test_a_checkpoint_whose_keys_are_no_text_is_no_checkpoint(
    state: dict[object, object], run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    torch.save(state, work / "odd.pth")
    shutil.rmtree(work / "features")
    status, printed = run("extract", "-c", "tiny.yaml", "--set", "encoder.checkpoint=odd.pth")
    assert status == 1
    assert "odd.pth' holds something other than a mapping of names to tensors" in printed
    overrides = ("--set", "model.weights=odd.pth", "--set", "run=runs/odd", "--set", "model.gates=[]")
    status, printed = run("train", "-c", "tiny.yaml", *overrides)
    assert (status, "odd.pth' holds something other" in printed) == (1, True), printed


@pytest.mark.parametrize("last", [{1: 2}, {"loop": 3}, {"loop": {}, "history": "[", "best": "{"}, [1], 7])
def test_a_checkpoint_of_a_run_that_is_none_is_named(
    last: object, run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    (work / "runs/demo/model.json").unlink()
    torch.save(last, work / "runs/demo/last.pt")
    status, printed = run("train", "-c", "tiny.yaml")
    assert (status, "last.pt" in printed) == (1, True), printed


def test_a_folder_that_links_to_itself(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    config = tmp_path / "c.yaml"
    config.write_text(
        "data: {layout: folder, path: images, split: {draw: balanced}}\n"
        "encoder: {name: sam_demo, checkpoint: w.pth, training: {steps: 0}}\nstore: {path: s.zarr}\n"
        "model: {backbone: resnet18, gates: []}\ntrain: {}\nrun: r\n"
    )
    assert run("prepare", "-c", config)[0] == 0
    for link, target in (("a/loop", tmp_path / "images"), ("loop", ".")):
        (tmp_path / "images" / link).symlink_to(target)
        status, printed = run("prepare", "-c", config)
        assert (status, "loop' links to a folder that it lies in" in printed) == (1, True), printed
        (tmp_path / "images" / link).unlink()
    (tmp_path / "images/loop").symlink_to("loop")
    status, printed = run("prepare", "-c", config)
    assert status == 0
    for path in ("self.zarr", "self.h5", "images.self"):
        (tmp_path / path).symlink_to(path)
    for arguments in (
        *(("store", name, path) for name in ("info", "verify", "inspect") for path in ("self.zarr", "self.h5")),
        ("prepare", "-c", config, "--set", "data.path=images.self"),
        ("extract", "-c", config, "--set", "store.path=self.zarr"),
        ("train", "-c", config, "--set", "run=images.self"),
        ("store", "convert", "self.zarr", "other.h5"),
        ("store", "push", "self.zarr", "there"),
        ("runs", "images.self"),
    ):
        status, printed = run(*arguments)
        assert status in (1, 2), (arguments, printed)
