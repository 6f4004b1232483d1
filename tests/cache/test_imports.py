"""What the package needs to be imported, and how long that takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cache.making import FORMATS, build, rows

WITHOUT = """
import sys
for name in ("torch", "torchvision", "zarr", "h5py", "fsspec", "pydantic", "click", "rich", "segment_anything", "PIL"):
    sys.modules[name] = None
import cache
for path in sys.argv[1:]:
    store = cache.open_store(path)
    assert store.read([2, 0])["neck"].shape == (2, 4, 3, 3)
    assert cache.info(path).rows == 3
    assert "pipeline" not in sys.modules
"""


def test_stores_are_read_with_numpy_alone(tmp_path: Path) -> None:
    paths = [tmp_path / f"store.{suffix}" for suffix in FORMATS]
    for path in paths:
        build(path, rows(range(3)))
    subprocess.run([sys.executable, "-c", WITHOUT, *map(str, paths)], check=True, cwd=Path(__file__).parents[2])
