"""Checkpoints with seeded weights, and a user folder of their own for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.encoders import ARCHITECTURES
from tests.encoders.seeded import seeded_state


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered from, or kept for, other runs."""
    folder = tmp_path / "user"
    monkeypatch.setenv("PIPELINE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sam_demo` with seeded weights."""
    path = tmp_path_factory.mktemp("weights") / "sam_demo.pth"
    torch.save(seeded_state(ARCHITECTURES["sam_demo"]), path)
    return path


@pytest.fixture(scope="session")
def vit_b_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`sam_vit_b` with seeded weights; 340 MiB, so it does not outlive the session."""
    path = tmp_path_factory.mktemp("weights") / "sam_vit_b.pth"
    torch.save(seeded_state(ARCHITECTURES["sam_vit_b"]), path)
    yield path
    path.unlink()
