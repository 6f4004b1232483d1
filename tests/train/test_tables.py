"""Tables that a person opens in a spreadsheet run nothing there, and are read back as they were."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import read_csv, write_csv

HOSTILE = [
    '=HYPERLINK("http://evil")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "'=1", "''=1", "'plain", "a=b", "", 'é,"x',
]  # fmt: skip


def test_nothing_in_a_table_begins_a_formula(tmp_path):
    write_csv(tmp_path / "t.csv", [{"class": text, "score": -0.5} for text in HOSTILE])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert not [cell["class"] for cell in cells if cell["class"][:1] in {"=", "+", "-", "@", "\t", "\r"}]
    assert [cell["class"] for cell in cells if cell["class"] == "a=b"] == ["a=b"]
    assert {cell["score"] for cell in cells} == {"-0.5"}  # a number stays one


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_is_read_back_as_it_was(tmp_path, text):
    write_csv(tmp_path / "t.csv", [{"class": text, "id": "x"}])
    assert read_csv(tmp_path / "t.csv") == [{"class": text, "id": "x"}]


@given(st.lists(st.text(alphabet="'=+-@ab,\"\n", max_size=6), min_size=1, max_size=5))
def test_any_text_is_read_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write_csv(path, [{"id": text, "n": "1"} for text in texts])
    assert [row["id"] for row in read_csv(path)] == texts
