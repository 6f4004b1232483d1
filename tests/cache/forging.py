"""Stores opened up, changed, and signed again as the specification says: what a hostile stranger can make."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import cache
from cache.description import parse_description
from cache.formats.zarr_layout import root_json
from tests.cache.making import files

Tree = Any


def spell(value: Tree) -> bytes:
    """The canonical spelling, as the specification has it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sign(value: Tree) -> Tree:
    """The object with the checksum that its other keys call for."""
    body = {key: item for key, item in value.items() if key != "checksum"}
    return {**body, "checksum": hashlib.sha256(spell(body)).hexdigest()}


def _root(description: Tree) -> bytes:
    """A root that fits its description, where a store can have that description."""
    try:
        return root_json(parse_description(description, "a forged root"))
    except cache.StoreError:
        root = {"zarr_format": 3, "node_type": "group", "attributes": {"feature_store": description}}
        return (json.dumps(root, indent=2, sort_keys=True) + "\n").encode()


class Forged:
    """A store that is opened up, changed, and signed again as its format's specification says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sound = files(path)
        self._changed: set[str] = set()

    def description(self) -> Tree:
        if self.path.is_dir():
            return json.loads(self.sound["zarr.json"])["attributes"]["feature_store"]
        return self.header()["feature_store"]

    def header(self) -> Tree:
        content = self.sound["."]
        return json.loads(content[28 : int(content[19:27])])

    def write_description(self, description: Tree) -> None:
        """Put a description in place; the second copy is left out of the game."""
        if self.path.is_dir():
            self._put("zarr.json", _root(description))
        else:
            self.write_header({**self.header(), "feature_store": description})

    def write_header(self, header: Tree) -> None:
        content = self.sound["."]
        size = int(content[19:27])
        block = content[:28] + spell(sign(header))
        self._put(".", block.ljust(size - 1) + b"\n" + content[size:] if len(block) < size else block)

    def index(self, name: str) -> np.ndarray[Any, Any]:
        """Bytes of an index array."""
        if self.path.is_dir():
            return np.frombuffer(self.sound[self._chunk(name)][:-4], np.uint8).copy()
        size = int(np.prod(self.description()["index"][name]["shape"])) * {"slot": 8, "extent": 4}.get(
            name, 4 if name.startswith("crc32c") else 1
        )
        start = self.header()["offsets"][f"index/{name}"]
        return np.frombuffer(self.sound["."][start : start + size], np.uint8).copy()

    def _chunk(self, name: str) -> str:
        return next(file for file in self.sound if file.startswith(f"index/{name}/c."))

    def write_index(self, name: str, data: np.ndarray[Any, Any]) -> None:
        """Put an index array of the same size in place, hashed into the description."""
        description = self.description()
        description["index"][name]["sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
        if self.path.is_dir():
            self._put(self._chunk(name), data.tobytes() + self.sound[self._chunk(name)][-4:])
            self.write_description(sign(description))
            return
        header = self.header()
        start = header["offsets"][f"index/{name}"]
        content = bytearray(self.sound["."])
        content[start : start + data.nbytes] = data.tobytes()
        self.sound = {".": bytes(content)}
        regions = sorted(
            (
                header["offsets"][tap["name"]],
                description["slots"] * (cache.TapSpec(*tap["shape"], tap["dtype"]).row_bytes + 4),
            )
            for tap in description["taps"]
        )
        digest, position = hashlib.sha256(), int(content[19:27])
        for first, length in [*regions, (len(content), 0)]:
            digest.update(content[position:first])
            position = first + length
        self.write_header({**header, "feature_store": sign(description), "structure_sha256": digest.hexdigest()})

    def _put(self, name: str, content: bytes) -> None:
        (self.path if name == "." else self.path / name).write_bytes(content)
        self._changed.add(name)

    def restore(self, sound: dict[str, bytes]) -> None:
        """Take back what was put in place, and that alone: reading a store changes none of its files."""
        self.sound = sound
        for name in self._changed.copy():
            self._put(name, sound[name])
        self._changed.clear()


def exercise(path: Path) -> None:
    """Do with a store what a trusting user would; only this package's own errors may come of it."""
    for use in (cache.info, cache.verify, _read_all):
        try:
            use(path)
        except cache.StoreError:
            continue


def _read_all(path: Path) -> None:
    store = cache.open_store(path)
    assert len(store.ids) == len(store) == len(store.extents)
    for verify in (True, False):
        for start in range(0, len(store), 2):
            try:
                store.read(range(start, min(start + 2, len(store))), verify=verify)
            except cache.StoreError:
                continue
