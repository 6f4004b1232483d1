"""Fixtures of the tests of studies: the small scene of stage two's tests, and the tiny demo of the commands' tests."""

from __future__ import annotations

from tests.cli.conftest import prepared, trained, work
from tests.train.conftest import one_thread, scene, store

__all__ = ["one_thread", "prepared", "scene", "store", "trained", "work"]
