"""The date on the page: today's, or the one that somebody fixed for the sake of equal bytes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pipeline.stages.commands import _today


@pytest.mark.parametrize("given", ["", "soon", "9" * 30])
def test_the_date_is_todays(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", given)
    before = datetime.now(UTC).date().isoformat()
    assert before <= _today() <= datetime.now(UTC).date().isoformat()


def test_the_date_may_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert _today() == "2023-11-14"
