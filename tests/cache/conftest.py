"""Speed for many small stores: the disk need not spin for tests that no power cut threatens."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.fsync` does nothing in the test's own process; that it is called in time is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
