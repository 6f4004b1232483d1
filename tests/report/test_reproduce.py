"""The commands on the page: they give the run again, or there are none."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import load_config, to_dict
from pipeline.report.reproduce import Commands, commands
from pipeline.stages.arguments import model_options
from pipeline.stages.inputs import contents, recipe
from pipeline.train.identity import recorded_identity
from tests.cli.conftest import TINY as CONFIG
from tests.report.conftest import Case, Page
from tests.train.scenes import PLAIN

MODEL = dataclasses.asdict(PLAIN)


def test_commands_give_the_run_again(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    wanted = load_config(path, ["model.gates=[]", "train.lr=1e-5", "train.augment.scale=[0.5, 1.5]", "run=runs/a b"])
    config = to_dict(load_config(path))
    values = to_dict(wanted)
    gates = [[gate["tap"], gate["stage"]] for gate in values["model"].pop("gates")]
    settings = {
        "model": {"gates": gates, **values["model"].pop("slca"), **values["model"]},
        "augmentation": values["train"].pop("augment"),
        "train": values["train"],
        "features": None,
    }
    (spelled,) = commands({"train": []}, ["-c", "c.yaml"], config, settings, wanted.run).lines
    assert spelled.startswith("pipeline train -c c.yaml --set ")
    words = shlex.split(spelled)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert len(overrides) == 4
    assert load_config(path, overrides) == wanted


def test_a_command_has_its_own_options_and_no_other_has_them() -> None:
    settings = {"features": None, "model": MODEL, "train": {}, "augmentation": {}}
    names = {"train": [], "evaluate": ["--point", "a b"]}
    found = commands(names, ["-c", "c.yaml"], {"run": "r"}, settings, Path("r"))
    assert found.lines == ["pipeline train -c c.yaml", "pipeline evaluate -c c.yaml --point 'a b'"]


@pytest.mark.parametrize("asked", ["null", "{tap: masks}"])
@pytest.mark.parametrize("trained", ["null", "{tap: masks, palette: cutout, opacity: 0.2}"])
def test_an_overlay_is_a_setting_of_its_own(tmp_path, asked, trained) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    wanted = load_config(path, [f"model.overlay={trained}"])
    config = to_dict(load_config(path, [f"model.overlay={asked}"]))
    model = json.loads(json.dumps(dataclasses.asdict(model_options(wanted))))
    settings = {"features": None, "train": {}, "augmentation": {}, "model": model}
    (spelled,) = commands({"train": []}, [], config, settings, wanted.run).lines
    words = shlex.split(spelled)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert all(override.startswith("model.overlay") for override in overrides)
    assert load_config(path, [f"model.overlay={asked}", *overrides]) == wanted


def features_of(path: Path, *overrides: str) -> dict[str, Any]:
    """What the features of a configuration depend on, as a run has it."""
    config = load_config(path, overrides)
    return dict(contents(config, recipe(config).fingerprint("1" * 64)).fingerprint.fields)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("encoder.pool=2", "pool"),
        ("encoder.taps=[early]", "taps.neck"),
        ("encoder.precision=bfloat16", "precision"),
        ("encoder.input_px=128", "input_px"),
        ("store.dtype=float32", "dtype"),
        ("encoder.name=mask", "encoder"),
    ],
)
def test_no_commands_are_given_that_would_make_other_features(gated: Case, tmp_path, override, field) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    settings = {**recorded_identity(gated.folder), "features": features_of(path)}

    def given(*overrides: str) -> Commands:
        return commands({"train": []}, ["-c", "c.yaml"], to_dict(load_config(path, overrides)), settings, gated.folder)

    assert given().lines
    assert not given().why_none
    none = given(override)
    assert not none.lines
    assert field in none.why_none.partition("(")[2]
    page = Page(gated.page(commands=none)).text
    assert "How to do it again\nNo commands are given, for they would not give this run: the configuration" in page
    assert "How to do it again\npipeline train -c c.yaml" in Page(gated.page(commands=given())).text
    assert "How to do it again" not in Page(gated.page()).text


def test_masks_on_another_grid_are_other_features(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    overrides = ("encoder.name=mask", "encoder.taps=[mask]", "encoder.pool=1")
    features = features_of(path, *overrides)
    assert features["grid"] == 16
    settings = {"features": features, "model": MODEL, "train": {}, "augmentation": {}}
    same, finer = (to_dict(load_config(path, [*overrides, f"encoder.input_px={px}"])) for px in (256, 512))
    assert commands({"train": []}, [], same, settings, Path("runs/demo")).lines
    assert "(not the same: grid)" in commands({"train": []}, [], finer, settings, Path("runs/demo")).why_none


def test_other_weights_are_other_features(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    weights = tmp_path / "w.pth"
    overrides = (f"encoder.checkpoint={weights}",)
    settings = {"features": features_of(path, *overrides), "model": MODEL, "train": {}, "augmentation": {}}
    config = to_dict(load_config(path, overrides))
    assert commands({"train": []}, [], config, settings, Path("runs/demo")).lines  # not here, and so not asked about
    weights.write_bytes(b"other")
    assert "(not the same: weights_sha256)" in commands({"train": []}, [], config, settings, Path("runs/demo")).why_none
