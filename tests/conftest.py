"""Fixtures that every area shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see pipeline/__main__.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs as several processes
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of many processes compiles torch again: twice the start

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, whose children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("test_dvc.py", "test_fuzz.py", "test_job.py", "test_official.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest runs first, so that at the end no worker is left alone with it."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the data, weights, features and runs that lie in the checkout: each starts in an empty folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real medical images: `$PIPELINE_TEST_DATA`, else `../shared/data` from the project's root."""
    root = Path(os.environ.get("PIPELINE_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real images are not at {root}: set PIPELINE_TEST_DATA to a folder that holds breastmnist.npz")
    return root
