"""Fixtures of a small study: its data and store, and the study as one process makes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import load_config
from pipeline.progress import silent
from pipeline.stages import commands, studies
from pipeline.stages.study_plan import load_study
from tests.cli.conftest import TINY, copy_of

STUDY = """\
base: tiny.yaml
folder: studies/tiny
baseline: plain
set: {train.epochs: 2, model.image_px: 32, resources.ray.max: 2}
variants:
  plain: {model.gates: []}
  slca: {model.gates: [{tap: neck, stage: stage4}]}
  other: {model.gates: [], train.seed: 1}
"""


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, random weights and a store, and a study that nobody has made."""
    folder = tmp_path_factory.mktemp("extracted")
    (folder / "tiny.yaml").write_text(TINY.replace("steps: 4", "steps: 0"))
    (folder / "study.yaml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load_config(Path("tiny.yaml"))
        commands.prepare(config, silent)
        commands.extract(config, silent)
    return folder


@pytest.fixture(scope="session")
def alone(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the study made by this process."""
    folder = copy_of(extracted, tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        studies.study(load_study(Path("study.yaml")), silent)
    return folder
