"""What a person reads when a study is wrong, and which runs a right one spells out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from pipeline.config.schema import load_config
from pipeline.errors import ConfigError
from pipeline.stages.study_plan import load_study
from pipeline.stages.study_workers import check_inputs
from tests.cli.conftest import ROOT, TINY

STUDY = """\
base: tiny.yaml
folder: studies/s
baseline: plain
set: {train.epochs: 3}
variants:
  plain: {model.gates: []}
  gated: {model.slca: {mix: multiply}}
grid:
  size:
    small: {model.image_px: 32, train.lr: 1e-2}
    large: {model.image_px: 64}
  train.fraction: [0.5, 1]
  train.seed: [0, 1]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


def load(text, *overrides):
    Path("s.yaml").write_text(text)
    return load_study(Path("s.yaml"), overrides)


def refusal(text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_every_variant_meets_every_point_of_the_grid_seed_by_seed(folder):
    study = load(STUDY)
    assert len(study.runs) == 2 * 2 * 2 * 2
    assert [run.seed for run in study.runs] == [0] * 8 + [1] * 8
    first = study.runs[0]
    assert first.cell == {"variant": "plain", "backbone": "resnet18", "size": "small", "fraction": 0.5}
    assert first.point == {"size": "small", "train.fraction": 0.5}
    assert first.name.startswith("plain-small-fraction0.5-seed0-")
    assert first.folder == Path("studies/s/runs") / first.name
    config = study.configs[first.name]
    assert (config.model.gates, config.model.image_px, config.train.lr) == ((), 32, 1e-2)
    assert (config.train.fraction, config.train.seed, config.train.epochs) == (0.5, 0, 3)
    assert config.run == first.folder
    last = study.configs[study.runs[-1].name]
    assert (last.model.slca.mix, last.model.image_px, last.train.lr) == ("multiply", 64, 1e-3)
    assert len(last.model.gates) == 2


def test_runs_of_a_cell_differ_in_the_seed_beside_another_axis_of_that_name(folder):
    text = STUDY.replace("gated: {model.slca: {mix: multiply}}", "other: {model.gates: [], train.weight_decay: 0.1}")
    study = load(text.replace("train.fraction: [0.5, 1]", "data.seed: [4, 5]"))
    assert {tuple(run.cell) for run in study.runs} == {("variant", "backbone", "size", "data.seed", "fraction")}
    assert {run.seed for run in study.runs} == {0, 1}


def test_shots_stand_beside_the_fraction_where_any_run_has_them(folder):
    grid = "size: {one: {train.shots: 1}, four: {train.shots: 4}, half: {train.fraction: 0.5}}"
    study = load(STUDY.replace("train.fraction: [0.5, 1]", grid).replace("  size:\n", "  side:\n"))
    assert {(run.cell["size"], run.cell["fraction"], run.cell["shots"]) for run in study.runs} == {
        ("one", 1.0, 1), ("four", 1.0, 4), ("half", 0.5, "all"),
    }  # fmt: skip
    named = load(STUDY.replace("train.fraction: [0.5, 1]", "train.shots: [1, 2, 4]")).runs
    assert named[0].name.startswith("plain-small-shots1-seed0-")
    assert [list(run.cell) for run in named[:1]] == [["variant", "backbone", "size", "fraction", "shots"]]
    assert {run.cell["shots"] for run in named} == {1, 2, 4}


def test_shots_and_a_fraction_are_refused_together(folder):
    both = STUDY.replace("set: {train.epochs: 3}", "set: {train.shots: 4}")
    assert refusal(both).startswith(
        "s.yaml: variant 'plain', size 'small', fraction 0.5, seed 0: train: shots is 4 and fraction is 0.5; leave one"
    )


def test_overrides_come_after_set_and_reach_every_run(folder):
    study = load(STUDY, "train.epochs=7", "resources.device=cpu")
    assert {config.train.epochs for config in study.configs.values()} == {7}
    assert {config.resources.device for config in study.configs.values()} == {"cpu"}


def test_the_folder_of_a_run_changes_with_what_its_result_rests_on_and_nothing_else(folder):
    name = load(STUDY).runs[0].name
    reordered = STUDY.replace("model.image_px: 32, train.lr: 1e-2", "train.lr: 0.01, model.image_px: 32").replace(
        "set: {train.epochs: 3}", "set: {train.epochs: 3, train.weight_decay: 1e-4}"
    )  # the default, spelled out
    assert load(reordered).runs[0].name == name
    assert load(STUDY, "resources.device=cpu", "run=elsewhere").runs[0].name == name
    assert load(STUDY.replace("[0.5, 1]", "[0.5, 1.0]")).runs[0].name == name
    assert load(STUDY, "train.epochs=4").runs[0].name != name


def test_taps_that_are_the_encoders_own_may_be_left_out_or_not(folder):
    five = "{encoder.taps: [patch, early, middle, late, neck]}"
    study = load(STUDY.replace("{model.slca: {mix: multiply}}", five))
    left_out = load(STUDY.replace("{model.slca: {mix: multiply}}", "{}"))
    assert [run.name for run in study.runs] == [run.name for run in left_out.runs]
    fewer = load(
        STUDY.replace("{model.slca: {mix: multiply}}", "{encoder.taps: [early, neck], store.path: other.zarr}")
    )
    assert {run.name for run in fewer.runs if run.cell["variant"] == "gated"}.isdisjoint(r.name for r in study.runs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: plain", "baseline: plan", "s.yaml: baseline: got 'plan', expected one of plain, gated"),
        ("baseline: plain", "", "s.yaml: baseline: missing; expected a value for this key"),
        ("folder:", "fodler:", "s.yaml: fodler: unknown key (value 'studies/s'); did you mean 'folder'?"),
        (
            "train.epochs: 3",
            "train.epoch: 3",
            "s.yaml: variant 'plain', size 'small', fraction 0.5, seed 0: train.epoch: unknown key (value 3); "
            "did you mean 'epochs'?",
        ),
        ("[0, 1]", "[0, one]", "got 'one', expected a valid integer"),
        ("[0.5, 1]", "[0.5, 1.5]", "fraction 1.5, seed 0: train.fraction: got 1.5, expected less than or equal to 1"),
        ("[0, 1]", "[0, 0]", "s.yaml: grid.train.seed: got ['0', '0']; expected at least one value, each once"),
        ("[0, 1]", "[]", "s.yaml: grid.train.seed: got []; expected at least one value, each once"),
        (
            "{model.gates: []}",
            "{train.seed: 3}",
            "s.yaml: variants.plain.train.seed: grid.train.seed sets it too; leave it to one of them",
        ),
        (
            "small: {model.image_px: 32,",
            "small: {train.seed: 3,",
            "is set by grid.size too; leave it to one of them",
        ),
        ("{model.gates: []}", "{run: here}", "s.yaml: variants.plain.run: cannot be chosen here, for the study names"),
        ("train.epochs: 3", "train.epochs.x: 3", "s.yaml: set.train.epochs.x: 'epochs' is a value, not a section"),
        ("tiny.yaml", "tony.yaml", "tony.yaml: cannot be read"),
        ("variants:", "scores: [auk]\nvariants:", "s.yaml: scores.0: got 'auk', expected 'auc', 'ap', 'acc'"),
        (
            "{model.slca: {mix: multiply}}",
            "{}\n  other: {encoder.pool: 2}",
            "differ in data, encoder or store and both name store.path 'features/demo.zarr': give each its own",
        ),
        (
            "{model.slca: {mix: multiply}}",
            "{}\n  other: {encoder.training.steps: 5, store.path: features/other.zarr}",
            "`prepare` make different weights and both name encoder.checkpoint 'weights/sam_demo.pth': give each its",
        ),
        (
            "{model.slca: {mix: multiply}}",
            "&clip {model.gates: [], model.backbone: 'clip:demo', model.weights: weights/clip.safetensors}\n"
            "  more: {<<: *clip, model.clip.training.steps: 640}",
            "make different weights and both name model.weights 'weights/clip.safetensors': give each its own",
        ),
        ("gated: {model.slca: {mix: multiply}}", '"plain ": {model.gates: []}', "s.yaml: two runs are plain-small-"),
    ],
)
def test_one_line_says_what_is_wrong_and_where(folder, old, new, message):
    assert old in STUDY
    said = refusal(STUDY.replace(old, new))
    assert message in said
    assert "Traceback" not in said


def test_a_study_that_is_not_there_lists_those_that_are(folder):
    Path("configs/studies").mkdir(parents=True)
    Path("configs/studies/a.yaml").write_text(STUDY)
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read .* such as configs/studies/a\.yaml"):
        load_study(Path("no.yaml"))


SHIPPED = sorted([*ROOT.glob("configs/studies/*.yaml"), *ROOT.glob("configs/paper/*[!c].yaml")])  # not dvc.yaml


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_study_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    assert study.folder.parts[0] == "studies"
    assert study.folder.name == path.stem
    for run in study.runs:
        assert study.configs[run.name].run.is_relative_to(study.folder)


def test_the_studies_and_experiments_that_are_promised_are_there():
    names = {f"{path.parent.name}/{path.stem}" for path in SHIPPED}
    assert names >= {"paper/breastmnist", "paper/retinamnist", "paper/isic2017", "studies/demo_gates"}
    assert names >= {"studies/baseline_breastmnist_28", "studies/baseline_retinamnist_28", "studies/demo_small"}
    assert names >= {"studies/demo_masks", "studies/breastmnist_masks", "paper/medfocusclip_breast_ultrasound"}
    for path in ROOT.glob("configs/*.yaml"):
        load_config(path)


def test_the_papers_table_has_its_classifiers_fractions_and_ablations(monkeypatch):
    monkeypatch.chdir(ROOT)
    for data in ("breastmnist", "retinamnist", "isic2017"):
        study = load_study(Path(f"configs/paper/{data}.yaml"))
        backbones = {config.model.backbone for config in study.configs.values()}
        assert backbones == {"resnet152", "timm:legacy_senet154", "swin_v2_b"}
        assert {run.cell["fraction"] for run in study.runs} == {0.1, 0.25, 0.5, 0.75, 1.0}
        assert {run.seed for run in study.runs} == {0, 1, 2}
        variants = {run.cell["variant"] for run in study.runs}
        alone = {"patch", "early", "middle", "late", "neck"}
        assert variants == {"plain", "slca", "se", "own", "random_sam", *alone}
        stores = {config.store.path for config in study.configs.values() if config.reads_store}
        stages = YAML(typ="safe").load(ROOT / "configs/paper/dvc.yaml")["stages"]
        made = {next(iter(out)).replace("${item.data}", data) for out in stages["extract"]["outs"]}
        assert {str(store) for store in stores} == made


def test_a_score_that_the_task_does_not_have_is_refused_before_any_run(folder):
    plan = load(
        STUDY.replace("model.slca: {mix: multiply}", "model.gates: [], train.batch_size: 4") + "scores: [kappa, auc]\n"
    )
    check_inputs(plan, SimpleNamespace(dataset=lambda config: SimpleNamespace(task="ordinal")))
    with pytest.raises(ConfigError, match=r"'kappa' is that of grades in order .* 'multiclass': leave it out"):
        check_inputs(plan, SimpleNamespace(dataset=lambda config: SimpleNamespace(task="multiclass")))
