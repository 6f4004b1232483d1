"""The whole configuration reads back as itself, and says which values nobody gave."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.config.reference import find
from pipeline.config.resolved import as_yaml, defaults_of
from pipeline.config.schema import load_config, to_dict
from pipeline.errors import ConfigError
from tests.cli.conftest import run_pipeline, succeed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_printed_is_the_same_configuration(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(as_yaml(config))
    assert to_dict(load_config(tmp_path / "again.yaml")) == to_dict(config)


def test_defaults_are_marked_and_nothing_else_is() -> None:
    config = load_config(ROOT / "configs/default.yaml", ["train.patience=0", "data.difficulty={shape: 0.1}"])
    lines = as_yaml(config).splitlines()
    assert "  patience: 0" in lines  # given, though it is the default
    assert "    shape: 0.1" in lines
    assert "    speckle: 0.33 # default" in lines
    assert "  device: auto # default" in lines
    assert "  input_px: null # default" in lines
    assert sum(line.endswith("# default") for line in lines) == len(defaults_of(config))
    assert {"train.gamma", "resources.device", "model.slca.norm"} <= set(defaults_of(config))
    assert "train.lr" not in defaults_of(config)


def test_the_command_prints_it_and_takes_overrides(tmp_path: Path) -> None:
    report = succeed(tmp_path, "config", "-c", ROOT / "configs/default.yaml", "--set", "train.lr=0.25")
    assert report["config"]["train"]["lr"] == 0.25
    assert "train.lr" not in report["defaults"]
    assert "train.gamma" in report["defaults"]


def test_a_key_is_explained_without_a_configuration(tmp_path: Path) -> None:
    done: subprocess.CompletedProcess[str] = run_pipeline(tmp_path, "config", "--explain", "group_pattern")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert said.startswith("data.group_pattern (layout: folder) text or null; default `null` Regular expression")
    (key,) = succeed(tmp_path, "config", "--explain", "train.lr")["keys"]
    assert (key["key"], key["kind"], key["does"]) == ("train.lr", "number > 0", "Peak learning rate.")


def test_a_section_brings_its_keys_and_a_wrong_name_the_nearest() -> None:
    assert [key.dotted for key in find("encoder")][:2] == ["encoder", "encoder.name"]
    assert len(find("seed")) >= 4
    with pytest.raises(ConfigError, match=r"did you mean train\.lr"):
        find("train.lrr")
    with pytest.raises(ConfigError, match=r"did you mean train\.lr, train\.warmup_epochs"):
        find("learning_rate")
