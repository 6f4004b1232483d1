"""Fixtures of stage two's tests."""

from __future__ import annotations

import pytest
import torch

from tests.train.scenes import make_dataset, make_store, register_tiny

register_tiny()


@pytest.fixture(
    autouse=True, scope="session"
)  # before the runs that tests share, or these would differ in the last bits
def one_thread():
    """Models this small spend more time waking threads than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def scene():
    return make_dataset()


@pytest.fixture(scope="session")
def store(scene, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("scene") / "scene.zarr", scene)
