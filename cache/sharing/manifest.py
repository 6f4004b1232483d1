"""The manifest of a store at a URL: its files with sizes and digests; one from a stranger is checked here."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cache.description import load_json
from cache.errors import FormatError, UntrustedStoreError
from cache.fingerprint import canonical
from cache.reading.remote import PUSHED_FILE

MANIFEST = "manifest.json"
_VERSION = 1
MAX_MANIFEST_BYTES = 32 << 20
"""Some 250 000 files; parsed, a manifest of that size takes about 1 GiB of memory at worst."""
_MAX_FILE_BYTES = 2**63 - 1
_MAX_NAME = 200
_MAX_DEPTH = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """One file of a store.

    Attributes:
        size: Bytes.
        sha256: Hexadecimal digest.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What lies at a URL.

    Attributes:
        version: Checksum of the store's description.
        files: By path below the URL.
        complete: False while a push is under way.
    """

    version: str
    files: Mapping[str, File]
    complete: bool

    def to_bytes(self) -> bytes:
        """As stored at the URL."""
        files = {name: {"size": file.size, "sha256": file.sha256} for name, file in self.files.items()}
        return canonical({"manifest": _VERSION, "version": self.version, "complete": self.complete, "files": files})


def parse_manifest(data: bytes, url: str) -> Manifest:
    """The manifest in the bytes of a file.

    Raises:
        FormatError: It is malformed.
        UntrustedStoreError: It names a file outside of the store.
    """
    value = load_json(data, f"{url}/{MANIFEST}")
    try:
        if value["manifest"] != _VERSION:
            message = f"its version is {value['manifest']!r:.100}, this software reads {_VERSION}"
            raise ValueError(message)
        files = {name: _parse_file(name, item) for name, item in value["files"].items()}
        if not isinstance(value["version"], str) or type(value["complete"]) is not bool:
            message = "a value has the wrong type"
            raise TypeError(message)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{url}: the manifest is malformed ({error}); push the store again"
        raise FormatError(message) from error
    check_names(files, f"{url}: the manifest")
    return Manifest(value["version"], files, value["complete"])


def _parse_file(name: str, value: Any) -> File:
    """Size and digest of one file."""
    size, sha256 = value["size"], value["sha256"]
    if type(size) is not int or not 0 <= size <= _MAX_FILE_BYTES or not _SHA256.fullmatch(sha256):
        message = f"{name[:_MAX_NAME]!r} has the size {str(size)[:30]} and the digest {str(sha256)[:70]!r}"
        raise ValueError(message)
    return File(size, sha256)


def check_names(files: Collection[str], where: str) -> None:
    """Refuse file names that lead out of the store's own folder, or that no folder can hold together.

    Raises:
        UntrustedStoreError: There is one; `where` says what names it.
    """
    for name in files:
        parts = PurePosixPath(name).parts
        plain = json.dumps(name) == f'"{name}"' and "\\" not in name
        inside = name == "/".join(parts) and not name.startswith("/") and not {"..", "."} & set(parts)
        if not (plain and inside and 0 < len(parts) <= _MAX_DEPTH and len(name) <= _MAX_NAME):
            message = f"{where}: {name[:_MAX_NAME]!r} is no file inside a store; delete it there, or do not use it"
            raise UntrustedStoreError(message)
    blocked = next((name for name in files if any(str(f) in files for f in PurePosixPath(name).parents)), None)
    if blocked is not None or (PUSHED_FILE in files and len(files) > 1):
        message = f"{where}: {blocked or PUSHED_FILE!r} has a file in its way; delete one there, or do not use it"
        raise UntrustedStoreError(message)
