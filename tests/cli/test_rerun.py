"""A rerun on a complete, unchanged store: found out from file sizes and times, before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .conftest import environment, succeed

UNCHANGED = """
import sys
from pipeline.cli import cli
try:
    cli.main(["extract", "-c", "tiny.yaml", *sys.argv[1:]], standalone_mode=False)
finally:
    print("torch" in sys.modules)
"""


def imports_torch(folder: Path, *arguments: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", UNCHANGED, *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] == "True"


def test_an_unchanged_store_is_recognised_without_torch(work: Path) -> None:
    first = succeed(work, "extract", "-c", "tiny.yaml")
    assert not imports_torch(work)
    again = succeed(work, "extract", "-c", "tiny.yaml")
    assert again.keys() == first.keys()
    assert (again["rows"], again["encoded"], again["reused"]) == (48, 0, 48)
    assert imports_torch(work, "--recheck")
