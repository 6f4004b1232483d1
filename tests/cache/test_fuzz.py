"""Metadata and index changed at random, with the right checksums: no crash, no hang, no other error than ours."""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache
from tests.cache.forging import Forged, Tree, exercise, sign
from tests.cache.making import FORMATS, TAPS, build, files, rows

COUNT = 6
CASES = int(os.environ.get("STORE_FUZZ_CASES", "10000"))  # of each format
PARTS = 4  # for as many workers
AT_ONCE = 25
SIZES: list[Any] = [-1, 0, 1, 2, COUNT, 2**31, 2**63, 10**15, 10**400, 0.5, True, None]
SIZES += ["", "..", "/", [], {}, [[]], "\ud800", "x" * 99]


def mutate(tree: Tree, dice: random.Random) -> Tree:
    """Change one node of a JSON tree: replace it, drop it, repeat it, or put another part of the tree in its place."""
    nodes: list[tuple[Tree, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        nodes += [(node, key) for key, _ in items]
        pending += [item for _, item in items if isinstance(item, dict | list)]
    parent, key = dice.choice(nodes)
    other_parent, other_key = dice.choice(nodes)
    choice = dice.randrange(5)
    if choice == 0 and isinstance(parent, dict):
        del parent[key]
    elif choice == 1 and isinstance(parent, dict):
        parent[dice.choice(["x", "neck", "../y", "ids"])] = parent[key]
    elif choice == 2:
        parent[key] = json.loads(json.dumps(other_parent[other_key]))
    elif isinstance(parent[key], int) and choice == 3:
        parent[key] += dice.choice([-2, -1, 1, 2, 1000])
    else:
        parent[key] = dice.choice(SIZES)
    return tree


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("suffix", FORMATS)
@settings(max_examples=CASES // PARTS // AT_ONCE, deadline=None)
@given(seed=st.integers(0, 2**64))
def test_fuzz(seed: int, suffix: str, part: int, fuzzed: dict[str, Forged]) -> None:
    """Metadata and index changed at random, with the right checksums: no crash, no hang, no other error than ours."""
    forged, dice = fuzzed[suffix], random.Random(seed)
    sound = dict(forged.sound)
    for _ in range(AT_ONCE):
        kind = dice.randrange(3)
        start = time.monotonic()
        try:
            if kind == 0:
                description = mutate(forged.description(), dice)
                forged.write_description(sign(description) if dice.random() < 0.9 else description)
            elif kind == 1 and suffix == "h5":
                forged.write_header(mutate(forged.header(), dice))
            else:
                name = dice.choice(["slot", "extent", "ids", "set_aside", "crc32c/neck", "digest"])
                data = forged.index(name)
                for _ in range(dice.randrange(1, 4)):
                    data[dice.randrange(len(data))] = dice.choice([0, 1, 10, 127, 128, 255])
                forged.write_index(name, data)
            exercise(forged.path)
        finally:
            forged.restore(sound)
        assert time.monotonic() - start < 10
    assert files(forged.path) == sound
    assert cache.verify(forged.path) == ()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Forged]:
    folder = tmp_path_factory.mktemp("fuzz")
    taps = {**TAPS, "image": cache.TapSpec(3, 5, 5, "uint8")}
    return {
        suffix: Forged(build(folder / f"store.{suffix}", rows(range(COUNT)), taps=taps)[0].path) for suffix in FORMATS
    }
