"""The digest of a file of weights, computed once and remembered by the file's size and time of change.

A digest of 2.5 GB takes seconds. What is remembered lies in the user's folder, for all projects.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import CheckpointError


def weights_sha256(path: Path) -> str:
    """Digest of a file of weights, remembered for as long as its size and time of change stay.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        status = path.stat()
        key = str(path.resolve())
        seen = [status.st_size, status.st_mtime_ns]
        memory = _remembered()
        entry = memory.get(key)
        if isinstance(entry, list) and entry[:2] == seen and len(entry) == 3:
            return str(entry[2])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); set encoder.checkpoint to a file of weights"
        raise CheckpointError(message) from None
    _remember({**memory, key: [*seen, digest]})
    return digest


def user_folder() -> Path:
    """Where this user keeps what all projects share: `$PIPELINE_HOME`, else the user's cache folder."""
    home = os.environ.get("PIPELINE_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slca-pipeline"


def _remembered() -> dict[str, object]:
    try:
        memory = json.loads((user_folder() / "digests.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(memory: Mapping[str, object]) -> None:
    """Replace the remembered digests; a folder that cannot be written to costs the next run some seconds, no more."""
    with contextlib.suppress(OSError):
        user_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=user_folder(), prefix=".digests", delete=False) as file:
            json.dump(memory, file)
        Path(file.name).replace(user_folder() / "digests.json")
