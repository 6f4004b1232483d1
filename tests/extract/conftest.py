"""Fixtures of the tests of stage one: the tiny demo of the commands' tests."""

from __future__ import annotations

from tests.cli.conftest import prepared, trained, work

__all__ = ["prepared", "trained", "work"]
