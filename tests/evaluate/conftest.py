"""Fixtures of these tests: the scene that stage two is tested on."""

from __future__ import annotations

from tests.train.conftest import one_thread, scene, store

__all__ = ["one_thread", "scene", "store"]
