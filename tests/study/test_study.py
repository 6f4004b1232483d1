"""Studies through the real command: made once, continued after a kill, shared between processes; runs compared."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.cli import cli
from pipeline.config.schema import load_config
from pipeline.errors import ConfigError, RunError
from pipeline.evaluate.compare import other_settings
from pipeline.progress import silent
from pipeline.stages import commands, studies
from pipeline.stages.study_plan import load_study
from pipeline.study.runs import Planned, one_by_one, result_of, work_through
from pipeline.train import trained_model
from tests.cli.conftest import TINY, copy_of, run_pipeline, start_pipeline, succeed

STUDY = """\
base: tiny.yaml
folder: studies/tiny
baseline: plain
set: {train.epochs: 2, model.image_px: 32}
variants:
  plain: {model.gates: []}
  mask:
    encoder.name: mask
    encoder.taps: [mask]
    encoder.pool: 1
    store.path: features/mask.zarr
    model.gates: [{tap: mask, stage: stage1}]
    model.slca: {reduction: 1}
grid:
  train.fraction: [0.5, 1]
  train.seed: [0, 1]
"""
OF_ONE_SEED = STUDY.replace("[0, 1]", "[0]")


@pytest.fixture(scope="module")
def studied(prepared, tmp_path_factory):
    """A folder in which the study was made in one go, and the report of that; tests do not write into it."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("studied"))
    (folder / "study.yaml").write_text(STUDY)
    return folder, succeed(folder, "study", "-c", "study.yaml", "--prepare")


@pytest.fixture
def fresh(studied, tmp_path):
    """The same folder before the study, for a single seed."""
    folder, _ = studied
    copy = tmp_path / "fresh"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("studies"))
    (copy / "study.yaml").write_text(OF_ONE_SEED)
    return copy


@pytest.fixture
def only_configured(tmp_path, monkeypatch):
    """A folder with nothing but the experiment that studies change."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)


def wait_for(process, there):
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def results(folder):
    """What each run came to, by its name; times are left out."""
    found = {}
    for row in csv.DictReader((folder / "studies/tiny/results.csv").read_text().splitlines()):
        del row["seconds"]
        found[Path(row["run"]).name] = row
    return found


def made_by(errors):
    """Names of the runs whose last epoch a process reported."""
    return re.findall(r"epoch 2/2  of (\S+)", errors)


def test_a_study_leaves_tables_of_all_its_runs(studied):
    folder, report = studied
    assert (report["runs"], report["done"], report["missing"], report["failed"]) == (8, 8, 0, {})
    made = results(folder)
    assert len(made) == 8
    for name, row in made.items():
        metrics = json.loads((folder / "studies/tiny/runs" / name / "metrics.json").read_text())
        assert float(row["auc"]) == metrics["auc"]
        assert trained_model.load_description(folder / row["run"]).training["fraction"] == float(row["fraction"])
        assert not (folder / row["run"] / "claim").exists()
    assert {(row["variant"], row["fraction"], row["seed"]) for row in made.values()} == {
        (v, f, s) for v in ("plain", "mask") for f in ("0.5", "1.0") for s in "01"
    }
    files = {path.name for path in (folder / "studies/tiny").iterdir()}
    assert files == {"results.csv", "table.csv", "table.md", "table.tex", "curve.csv", "curve.png", "runs"}
    rows = [row for row in report["table"] if row["variant"] == "mask"]
    assert [(row["fraction"], row["score"]) for row in rows] == [(0.5, "auc"), (0.5, "acc"), (1.0, "auc"), (1.0, "acc")]
    for row in rows:
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]


def test_done_runs_are_skipped_and_images_and_features_loaded_once(studied, fresh, monkeypatch):
    from pipeline.data import Dataset

    monkeypatch.chdir(fresh)
    decoded = []
    read = Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, index: decoded.append(index) or read(self, index))
    seen = []
    studies.study(load_study(Path("study.yaml")), lambda task, done, total, **info: seen.append((task, done, info)))
    assert sorted(decoded) == list(range(48))
    assert [done for task, done, _ in seen if task == "run"][-1] == 4
    epochs = [(done, info["of"]) for task, done, info in seen if task == "epoch"]
    assert len(epochs) == 4 * 2
    assert not [task for task, _, _ in seen if task == "train"]
    reference = results(studied[0])
    assert results(fresh) == {name: row for name, row in reference.items() if row["seed"] == "0"}

    def never(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(commands, "train", never)
    monkeypatch.setattr(commands, "evaluate", never)
    assert studies.study(load_study(Path("study.yaml")), lambda *a, **k: None)["done"] == 4


def test_a_killed_study_gives_tables_of_what_is_there_and_continues(studied, fresh, monkeypatch):
    process = start_pipeline(fresh, "study", "-c", "study.yaml")
    wait_for(process, lambda: list(fresh.glob("studies/tiny/runs/*/result.json")))
    wait_for(process, lambda: list(fresh.glob("studies/tiny/runs/*/last.pt")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {path.parent.name: path.stat().st_mtime_ns for path in fresh.glob("studies/tiny/runs/*/result.json")}
    assert 1 <= len(done) < 4

    monkeypatch.chdir(fresh)
    said = CliRunner().invoke(cli, ["study", "-c", "study.yaml", "--tables-only", "--json"], standalone_mode=False)
    assert said.return_value == 3
    report = json.loads(said.stdout)
    assert (report["done"], report["missing"]) == (len(done), 4 - len(done))
    assert results(fresh).keys() == done.keys()
    assert f"{4 - len(done)} run" in (fresh / "studies/tiny/table.md").read_text()

    finished = run_pipeline(fresh, "study", "-c", "study.yaml")
    assert finished.returncode == 0, finished.stderr
    assert not done.keys() & set(made_by(finished.stderr))
    assert {name: (fresh / "studies/tiny/runs" / name / "result.json").stat().st_mtime_ns for name in done} == done
    assert results(fresh) == {name: row for name, row in results(studied[0]).items() if row["seed"] == "0"}
    for said in ("AUC less plain", "mask", "studies/tiny"):
        assert said in finished.stdout


def test_processes_share_a_study_and_take_over_from_the_dead(studied, fresh):
    first = start_pipeline(fresh, "study", "-c", "study.yaml")
    wait_for(first, lambda: list(fresh.glob("studies/tiny/runs/*/last.pt")))  # it is at work on a run
    first.send_signal(signal.SIGSTOP)
    (claimed,) = (path.parent.name for path in fresh.glob("studies/tiny/runs/*/claim"))
    second = start_pipeline(fresh, "study", "-c", "study.yaml")
    wait_for(second, lambda: len(list(fresh.glob("studies/tiny/runs/*/result.json"))) == 3)
    time.sleep(0.5)
    assert not (fresh / "studies/tiny/runs" / claimed / "result.json").exists()  # claimed by one who takes his time
    assert second.poll() is None
    first.kill()
    first.communicate()
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert made_by(errors)[-1] == claimed
    assert "run 4/4" in errors
    assert results(fresh) == {name: row for name, row in results(studied[0]).items() if row["seed"] == "0"}


def test_a_run_that_cannot_be_made_does_not_stop_the_others(tmp_path):
    runs = [Planned(str(k), tmp_path / str(k), {"variant": "plain", "fraction": 1.0}, {}, k) for k in range(3)]

    def make(planned, progress):
        if planned.seed == 1:
            message = "the loss is not finite"
            raise RunError(message)
        return {"scores": {"auc": 0.5}}

    shown = []
    failed = work_through(runs, one_by_one(make), progress=lambda task, done, total, **info: shown.append(done))
    assert failed == {"1": "the loss is not finite"}
    assert [result_of(planned) is not None for planned in runs] == [True, False, True]
    assert shown == [0, 1, 1, 2]
    assert (
        work_through(runs, one_by_one(lambda planned, progress: {"scores": {}})) == {}
    )  # the next time it is tried again


def test_weights_can_be_left_out(studied, fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    Path("study.yaml").write_text(OF_ONE_SEED.replace("[0.5, 1]", "[0.5]") + "keep_weights: false\n")
    assert studies.study(load_study(Path("study.yaml")), lambda *a, **k: None)["done"] == 2
    assert not list(Path("studies").rglob("*.safetensors"))
    assert len(list(Path("studies").rglob("predictions.csv"))) == 2
    assert list((studied[0] / "studies").rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (("features/mask.zarr", "features/none.zarr"), Exception, "none.zarr"),
        (("{tap: mask, stage", "{tap: neck, stage"), RunError, "holds no tap 'neck', only mask: extract it"),
    ],
)
def test_what_would_fail_later_is_refused_before_the_first_run(fresh, monkeypatch, change, kind, message):
    monkeypatch.chdir(fresh)
    Path("study.yaml").write_text(OF_ONE_SEED.replace(*change))
    with pytest.raises(kind, match=message):
        studies.study(load_study(Path("study.yaml")), lambda *a, **k: None)
    assert not list(Path().glob("studies/tiny/runs/*"))


def test_runs_on_images_that_have_changed_since_do_not_count_as_done(studied, fresh, monkeypatch):
    shutil.copytree(studied[0] / "studies", fresh / "studies")
    monkeypatch.chdir(fresh)
    image = next(Path("data/demo/images").iterdir())
    pixels = np.asarray(Image.open(image)).copy()
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(image)
    plan = load_study(Path("study.yaml"))
    assert studies.study(plan, silent)["missing"] == 0  # nobody has looked at the images
    studies.prepare(plan, silent)
    with pytest.raises(RunError, match=r"2 of the finished runs .*'mask-fraction0.5-seed0-.*make them again with --re"):
        studies.study(plan, silent)
    before = {planned.name: result_of(planned) for planned in plan.runs}
    told = succeed(fresh, "study", "-c", "study.yaml", "--replace")
    assert (told["done"], told["missing"]) == (4, 0)
    for planned in plan.runs:
        again = planned.name.startswith("mask")
        assert (result_of(planned)["seconds"] != before[planned.name]["seconds"]) == again
    assert studies.study(plan, silent)["missing"] == 0


def test_runs_on_features_that_were_made_anew_since_do_not_count_as_done(studied, fresh, monkeypatch):
    shutil.copytree(studied[0] / "studies", fresh / "studies")
    monkeypatch.chdir(fresh)
    plan = load_study(Path("study.yaml"))
    assert studies.study(plan, silent)["missing"] == 0
    mask = next(Path("data/demo/masks").rglob("*.png"))
    Image.fromarray(255 - np.asarray(Image.open(mask))).save(mask)  # the images stay, and so do samples and pixels
    config = next(plan.configs[planned.name] for planned in plan.runs if plan.reads_store(planned.name))
    commands.extract(config, silent, replace=True)
    said = r"2 of the finished runs .*'mask-fraction0.5-seed0-.* than are there now \(features.masks_sha256\)"
    with pytest.raises(RunError, match=said):
        studies.study(plan, silent)
    monkeypatch.setattr(studies, "make_run", lambda plan, planned, *_, **__: {"made": planned.name})
    monkeypatch.setattr(studies, "_write", lambda plan, summary: [{}])
    studies.study(plan, silent, replace=True)
    again = {planned.name for planned in plan.runs if "made" in result_of(planned)}
    assert again == {planned.name for planned in plan.runs if planned.name.startswith("mask")}


def test_a_store_is_prepared_once_whatever_backbones_read_it(only_configured, monkeypatch):
    Path("study.yaml").write_text(OF_ONE_SEED.replace("[0.5, 1]", "[1]\n  model.backbone: [resnet18, resnet34]"))
    asked = []
    monkeypatch.setattr(commands, "prepare", lambda config, progress, encoder: asked.append(config.model.backbone))

    def extract(config, progress, ray):
        asked.append(str(config.store.path))
        return {"rows": 1, "encoded": 1, "reused": 0}

    monkeypatch.setattr(commands, "extract", extract)
    assert list(studies.prepare(load_study(Path("study.yaml")), silent)) == ["features/mask.zarr"]
    assert sorted(asked) == ["features/mask.zarr", *["resnet18"] * 2, *["resnet34"] * 2]


def test_features_of_other_settings_are_refused(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    studies.prepare(load_study(Path("study.yaml")), silent)
    Path("study.yaml").write_text(OF_ONE_SEED.replace("encoder.pool: 1", "encoder.pool: 2"))
    asks = r"mask.zarr' holds other features than .* px, over pool\) asks for 8, and the store has 16. Run `pipeline ex"
    with pytest.raises(RunError, match=asks):
        studies.study(load_study(Path("study.yaml")), silent)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("encoder.pool=2", "encoder.pool asks for 2, and the store has 4"),
        ("encoder.precision=bfloat16", "encoder.precision asks for 'bfloat16', and the store has 'float32'"),
        ("encoder.preprocessing=medsam", "encoder.preprocessing asks for 'medsam', and the store has 'sam'"),
        ("encoder.checkpoint=OTHER", "encoder.checkpoint asks for '"),
        ("store.dtype=float32", "store.dtype asks for 'float32', and the store has 'float16'"),
        ("encoder.name=sam_vit_b", "encoder.name asks for 'sam_vit_b', and the store has 'sam_demo'"),
    ],
)
def test_a_run_is_not_trained_on_features_that_it_does_not_describe(trained, tmp_path, monkeypatch, changed, said):
    monkeypatch.chdir(trained)
    other = tmp_path / "other.pth"
    other.write_bytes(Path("weights/sam_demo.pth").read_bytes() + b" ")
    changed = changed.replace("OTHER", str(other))
    with pytest.raises(RunError, match=re.escape(said)):
        commands.train(load_config(Path("tiny.yaml"), (changed, "run=runs/other")), silent)
    assert not Path("runs/other").exists()


def test_weights_that_are_not_here_are_not_asked_about(work, monkeypatch):
    monkeypatch.chdir(work)
    config = load_config(Path("tiny.yaml"), ("encoder.checkpoint=weights/stayed_away.pth", "train.epochs=1"))
    commands.extract(load_config(Path("tiny.yaml")), silent)
    assert commands.train(config, silent)["epoch"] == 1


def test_a_study_with_nothing_done_has_no_tables(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    with pytest.raises(RunError, match=r"no run of 'studies/tiny' is done: run the study without asking for the"):
        studies.study(load_study(Path("study.yaml")), lambda *a, **k: None, tables_only=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="not started by torchrun: start `pipeline study` several times"):
        studies.study(load_study(Path("study.yaml")), lambda *a, **k: None)


def test_two_runs_are_compared(studied, monkeypatch):
    folder, _ = studied
    names = sorted(name for name in results(folder) if "fraction1-seed0" in name)
    mask, plain = (f"studies/tiny/runs/{name}" for name in names)
    monkeypatch.chdir(folder)
    report = json.loads(CliRunner().invoke(cli, ["compare", plain, mask, "--json"], standalone_mode=False).stdout)
    auc = report["scores"]["auc"]
    rows = {Path(row["run"]).name: float(row["auc"]) for row in results(folder).values()}
    assert auc["difference"] == pytest.approx(rows[names[0]] - rows[names[1]])
    assert auc["low"] <= auc["difference"] <= auc["high"]
    assert 0 < report["delong"]["auc"]["p"] <= 1
    assert (report["first"], report["second"], report["n"]) == (plain, mask, 12)
    assert report["other_settings"] == []

    done = run_pipeline(folder, "compare", plain, mask, "--resamples", "100")
    assert done.returncode == 0, done.stderr
    assert "difference [95 %]" in done.stdout
    for said in ("AUC, DeLong", "AUC, round, DeLong", "sensitivity, spiked", "balanced accuracy", "12 test samples"):
        assert said in done.stdout
    assert f"{auc['first']:.3f}" in done.stdout
    assert "Apart from the gates, both runs have the same settings." in done.stdout
    assert "no evidence about the method" in " ".join(done.stdout.split())


def test_settings_besides_the_gates_are_named(studied, tmp_path):
    folder, _ = studied
    (first, *_) = (folder / run["run"] for name, run in results(folder).items() if name.startswith("mask"))
    other = copy_of(first, tmp_path / "other")
    record = json.loads((other / "model.json").read_text())
    record["provenance"]["settings"]["train"]["lr"] = 0.5
    record["provenance"]["settings"]["model"]["gates"] = record["model"]["gates"] = []
    (other / "model.json").write_text(json.dumps(record))
    lr = json.loads((first / "model.json").read_text())["provenance"]["settings"]["train"]["lr"]
    assert other_settings(first, other) == [{"setting": "train.lr", "first": lr, "second": 0.5}]
    said = CliRunner().invoke(cli, ["compare", str(first), str(other), "--resamples", "10"], standalone_mode=False)
    assert f"Apart from the gates, they differ in train.lr ({lr}, 0.5)." in " ".join(said.stdout.split())
    record["model"]["gates"] = json.loads((first / "model.json").read_text())["model"]["gates"]
    record["provenance"]["settings"]["model"]["overlay"] = {"tap": "masks", "opacity": 0.5}
    (other / "model.json").write_text(json.dumps(record))
    said = CliRunner().invoke(cli, ["compare", str(first), str(other), "--resamples", "10"], standalone_mode=False)
    assert "They differ in train.lr" in " ".join(said.stdout.split())
    assert "; the second alone has model.overlay." in " ".join(said.stdout.split())
    assert "gates" not in said.stdout


def test_runs_on_other_test_samples_are_refused(studied, tmp_path):
    folder, _ = studied
    first, second = (folder / row["run"] for row in list(results(folder).values())[:2])
    other = copy_of(second, tmp_path / "other")
    lines = (other / "predictions.csv").read_text().splitlines()
    (other / "predictions.csv").write_text("\n".join(lines[:-1]) + "\n")
    said = CliRunner().invoke(cli, ["compare", str(first), str(other)], standalone_mode=False)
    assert isinstance(said.exception, RunError)
    assert "scored on other samples (1 samples are in one of them only): evaluate both on" in str(said.exception)


def test_the_config_of_a_run_still_trains_a_part(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    config = load_config(Path("tiny.yaml"), ["train.fraction=0.5", "model.gates=[]", "train.epochs=1"])
    report = commands.train(config, lambda *a, **k: None)
    assert report["data"][0].startswith("train: 14 samples")
