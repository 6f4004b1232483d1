"""The stages of DVC depend on every room whose source makes their numbers, found by following imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DEMO, PAPER, MEDSAM = "dvc.yaml", "configs/paper/dvc.yaml", "configs/breastmnist_medsam/dvc.yaml"
FOCUS = "configs/medfocusclip/dvc.yaml"
STARTS = {  # the modules that a stage's command calls, by file and stage; layouts of data are chosen by configuration
    (DEMO, "prepare"): ("data/layouts/demo", "encoders/sam/demo"),
    (DEMO, "extract"): ("extract/extract", "encoders/sam/encoder", "data/layouts/demo"),
    (DEMO, "train"): ("train/train", "data/layouts/demo"),
    (DEMO, "evaluate"): ("evaluate/evaluate", "data/layouts/demo"),
    (DEMO, "explain"): ("explain/explain", "data/layouts/demo"),
    (DEMO, "report"): ("report/report", "report/evidence", "report/reproduce", "data/layouts/demo"),
    (PAPER, "extract"): ("extract/extract", "encoders/sam/encoder", "data/layouts/medmnist", "data/layouts/table"),
    (PAPER, "study"): (
        "train/train", "evaluate/evaluate", "study/files", "study/table", "data/layouts/medmnist", "data/layouts/table",
    ),
    (MEDSAM, "prepare"): ("data/layouts/medmnist", "encoders/tiny_vit/recipe"),
    (MEDSAM, "extract"): ("extract/extract", "encoders/tiny_vit/encoder", "data/layouts/medmnist"),
    (MEDSAM, "probe"): ("evaluate/probe", "data/layouts/medmnist"),
    (MEDSAM, "train"): ("train/train", "data/layouts/medmnist"),
    (MEDSAM, "evaluate"): ("evaluate/evaluate", "data/layouts/medmnist"),
    (MEDSAM, "explain"): ("explain/explain", "data/layouts/medmnist"),
    (MEDSAM, "report"): ("report/report", "report/evidence", "report/reproduce", "data/layouts/medmnist"),
    (FOCUS, "prepare"): ("data/layouts/demo", "data/layouts/demo_captions", "encoders/clip/demo"),
    (FOCUS, "extract"): ("extract/extract", "encoders/sam/encoder", "data/layouts/demo"),
    (FOCUS, "train"): ("train/train", "data/layouts/demo"),
    (FOCUS, "evaluate"): ("evaluate/evaluate", "data/layouts/demo"),
    (FOCUS, "explain"): ("explain/explain", "data/layouts/demo"),
    (FOCUS, "report"): ("report/report", "report/evidence", "report/reproduce", "data/layouts/demo"),
}  # fmt: skip
SAME_RESULT = {
    "errors": "words",
    "progress": "words",
    "records": "how files are written, not what they say",
    "download": "the digest of what it fetches is known",
    "encoders/weight_files": "the digests of what is fetched",
    "train/feeding/in_memory": "where numbers lie",
    "url": "where bytes lie",
    "overlap": "when things happen; their order is kept",
    "train/parallel": "several devices, which these stages do not use",
    "extract/batch_size": "how many images at once",
    "data/dicom": "there is none among these images",
}
ELSEWHERE = {  # what a stage takes no numbers from, although something that it reads imports the file
    (DEMO, "report"): ("model/classifier",),  # it describes models and runs none
    (MEDSAM, "report"): ("model/classifier",),
    (FOCUS, "report"): ("model/classifier",),
}


def defining(module: str, name: str) -> str:
    """The file, below `pipeline` and without suffix, that `from module import name` reads."""
    base = Path(*module.split("."))
    if (ROOT / base).with_suffix(".py").is_file():
        return base.relative_to("pipeline").as_posix()
    if (ROOT / base / f"{name}.py").is_file():
        return (base / name).relative_to("pipeline").as_posix()
    if (ROOT / base / name / "__init__.py").is_file():
        return f"{(base / name).relative_to('pipeline').as_posix()}/"
    for node in ast.walk(ast.parse((ROOT / base / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return defining(node.module, name)
    pytest.fail(f"{module} has no {name}")


def imports(file: str) -> set[str]:
    """Files below `pipeline` that a file takes something from, a package's names traced to where they are defined."""
    tree = ast.parse((ROOT / "pipeline" / f"{file}.py").read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    unused = {id(node) for guard in typing for node in ast.walk(guard)}
    found: set[str] = set()
    packages: dict[str, str] = {}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "pipeline"
            and id(node) not in unused
        ):
            for alias in node.names:
                at = defining(node.module, alias.name)
                if at.endswith("/"):
                    packages[alias.asname or alias.name] = f"pipeline.{at[:-1].replace('/', '.')}"
                else:
                    found.add(at)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
            found.add(defining(packages[node.value.id], node.attr))
    return found


def reached(stage: tuple[str, str]) -> set[str]:
    """Every file that makes numbers of a stage."""
    todo, seen = [*STARTS[stage]], set[str]()
    while todo:
        file = todo.pop()
        if file not in seen and file not in SAME_RESULT and file not in ELSEWHERE.get(stage, ()):
            seen.add(file)
            todo += imports(file)
    return seen


def stages(file: str) -> dict[str, dict]:
    with (ROOT / file).open() as stream:
        return YAML(typ="safe").load(stream)["stages"]


def test_every_stage_is_known() -> None:
    assert {(file, name) for file in (DEMO, PAPER, MEDSAM, FOCUS) for name in stages(file)} == STARTS.keys()


@pytest.mark.parametrize("stage", STARTS, ids="/".join)
def test_a_stage_depends_on_the_rooms_that_make_its_numbers(stage: tuple[str, str]) -> None:
    source = [dep for dep in stages(stage[0])[stage[1]]["deps"] if dep.startswith("pipeline/")]
    assert source == sorted(source)
    needed = {file.split("/")[0] if "/" in file else f"{file}.py" for file in reached(stage)}
    assert {f"pipeline/{name}" for name in needed} == set(source)


def test_compiled_files_are_no_dependency() -> None:
    assert {"__pycache__", "*.pyc"} <= set((ROOT / ".dvcignore").read_text().split())


def test_what_is_left_out_is_there() -> None:
    for file in (*SAME_RESULT, *(name for names in ELSEWHERE.values() for name in names)):
        assert (ROOT / f"pipeline/{file}.py").is_file()


def test_the_second_methods_job_has_the_demos_images_and_its_miniature_sam() -> None:
    first, second = (YAML(typ="safe").load(ROOT / f"configs/{name}.yaml") for name in ("default", "medfocusclip"))
    assert second["data"] == first["data"]
    for key in ("name", "checkpoint", "training"):
        assert second["encoder"][key] == first["encoder"][key]
    made = {out if isinstance(out, str) else next(iter(out)) for out in stages(DEMO)["prepare"]["outs"]}
    assert made <= {dep for stage in stages(FOCUS).values() for dep in stage["deps"]}
