"""What a person reads when a configuration is wrong."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.config.schema import load_config
from pipeline.errors import ConfigError
from tests.cli.conftest import TINY


def read(folder: Path, text: str, *overrides: str) -> str:
    path = folder / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "c.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1e-3", "--set train.lrr: unknown key (value 0.001); did you mean 'lr'?"),
        ("tran={}", "--set tran: unknown key (value {}); did you mean 'train'?"),
        ("train.epochs=ten", "--set train.epochs: got 'ten', expected a valid integer"),
        ("train.seed=-1", "--set train.seed: got -1, expected greater than or equal to 0"),
        ("data.seed=-1", "--set data.seed: got -1, expected greater than or equal to 0"),
        (f"train.seed={2**63}", f"--set train.seed: got {2**63}, expected less than {2**63}"),
        ("train.epochs=0", "--set train.epochs: got 0, expected greater than or equal to 1"),
        ("encoder.training.seed=-1", "--set encoder.training.seed: got -1, expected greater than or equal to 0"),
        ("train.lr=yes", "--set train.lr: got 'yes', expected a valid number"),
        (
            "store.dtype=float64",
            "--set store.dtype: got 'float64', expected 'float16', 'float32', 'int8' or 'bfloat16'",
        ),
        (
            "data.layout=dicom",
            "--set data.layout: 'dicom' is no layout; expected one of csv, demo, folder, medmnist, store",
        ),
        ("data.size=3", "--set data.size: unknown key (value 3); did you mean 'size_px'?"),
        ("train={epoch: 2}", "--set train: train.epoch: unknown key (value 2); did you mean 'epochs'?"),
    ],
)
def test_one_line_names_option_key_value_and_remedy(tmp_path: Path, override: str, message: str) -> None:
    assert read(tmp_path, TINY, override) == message


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    assert len(read(tmp_path, TINY, "train.lrr=1", "store.dtype=3").splitlines()) == 2


def test_a_wrong_key_of_the_file_names_the_file(tmp_path: Path) -> None:
    wrong = TINY.replace("epochs:", "epoch:")
    said = read(tmp_path, wrong, "train.lr=1e-3")
    assert said.startswith("c.yaml: train.epoch: unknown key")
    assert said.endswith("did you mean 'epochs'?")


def test_a_key_of_another_layout_says_whose_it_is(tmp_path: Path) -> None:
    said = read(tmp_path, TINY, "data.layout=folder").splitlines()
    assert said
    for line in said:
        assert "it belongs to layout demo" in line
        assert "did you mean" not in line


def test_missing_key(tmp_path: Path) -> None:
    assert read(tmp_path, TINY.replace("run: runs/demo", "")) == "c.yaml: run: missing; expected a value for this key"


@pytest.mark.parametrize("override", ["epochs", "train..lr=1", "=3"])
def test_an_override_has_a_key_and_a_value(tmp_path: Path, override: str) -> None:
    assert "expected section.key=value" in read(tmp_path, TINY, override)


def test_yaml_is_read_as_dvc_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    config = load_config(path, ["train.lr=1e-4", "data.path=yes"])
    assert config.train.lr == 1e-4
    assert config.data.path == Path("yes")


def test_code_in_yaml_is_refused(tmp_path: Path) -> None:
    assert "is not YAML of plain values" in read(tmp_path, "run: !!python/object/apply:os.getcwd []")


def test_a_file_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghij")
)
MERGES = "m0: &m0 {k: v}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 5000 values"),
        (MERGES, "more than 5000 values"),
        ("[" * 100_000, "or 30 levels of nesting"),
        ("{a: " * 50_000, "or 30 levels of nesting"),
        ("- x\n" * 50_000, "more than 5000 values"),
        ("k" * 300_000, "longer than 256 KiB"),
        ("a: " + "k" * 250_000, "expected sections|Extra inputs|unknown|no key"),
    ],
    ids=["laughs", "merges", "lists", "mappings", "long", "endless", "a long value"],
)
def test_a_file_that_wishes_ill_is_refused_within_a_second(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    assert time.process_time() - start < 1


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    for path in (tmp_path / "c.yaml", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is no plain file; write the configuration into one"):
            load_config(path)
