"""The page of the configuration says what the schema says."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.reference import page
from pipeline.config.schema import Config, TrainConfig

ROOT = Path(__file__).parents[2]


def test_the_page_in_the_docs_is_current() -> None:
    remedy = "run `uv run python -m pipeline.config.reference > docs/configuration.md`"
    assert (ROOT / "docs/configuration.md").read_text() == page(), remedy


def test_every_key_is_on_the_page() -> None:
    said = page()
    for key in (*Config.model_fields, *TrainConfig.model_fields):
        assert f"| `{key}` |" in said
    assert "| `lr` | number > 0 | `0.0001` | Peak learning rate. |" in said
