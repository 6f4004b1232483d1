"""The fingerprint of each encoder is what it was when the first stores were made with it: they stay valid.

`golden/fingerprints.json` was written by version 0.2.0, before grids could differ by tap. A failure here means that
people's stores would be refused: raise `ARITHMETIC` or a preprocessing's version only where numbers do change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import data
from pipeline.encoders import make_recipe, of_taps
from pipeline.extract.plan import Contents

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden/fingerprints.json").read_text())
FIVE = ("patch", "early", "middle", "late", "neck")


@pytest.mark.parametrize("name", GOLDEN)
def test_a_store_made_by_an_older_version_is_still_the_one_asked_for(name: str) -> None:
    golden = GOLDEN[name]
    asked = {**golden["asked"], "taps": tuple(golden["asked"]["taps"])}
    recipe = make_recipe(name.partition(",")[0], **asked)
    contents = Contents(recipe.fingerprint("5a" * 32), recipe.shapes, data.reading_rules(data.Reading()))
    assert dict(contents.fingerprint.fields) == golden["fields"]
    assert contents.fingerprint.digest() == golden["digest"]
    assert {tap: list(shape) for tap, shape in recipe.shapes.items()} == golden["shapes"]


def test_every_encoder_of_that_version_has_one() -> None:
    assert {name.partition(",")[0] for name in GOLDEN} == {"sam_demo", "sam_vit_b", "sam_vit_l", "sam_vit_h", "mask"}


@pytest.mark.parametrize("name", ["sam_vit_b", "sam_vit_l", "sam_vit_h"])
def test_without_a_pool_maps_have_a_side_of_16_and_the_fingerprint_of_a_pool_of_4(name: str) -> None:
    left_out, said = (make_recipe(name, FIVE, pool=pool) for pool in (None, 4))
    assert left_out.fingerprint("ab") == said.fingerprint("ab")
    assert {shape[1:] for shape in left_out.shapes.values()} == {(16, 16)}


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        *((name, FIVE) for name in ("sam_demo", "sam_vit_b", "lite_medsam", "mobile_sam", "sam2.1_hiera_tiny")),
        ("clip:demo", ("embedding",)),
        ("mask", ("mask",)),
    ],
)
def test_taps_that_are_left_out_are_those_of_the_family(name: str, taps: tuple[str, ...]) -> None:
    assert make_recipe(name, None).fingerprint("ab") == make_recipe(name, taps).fingerprint("ab")


@pytest.mark.parametrize(
    ("name", "taps", "pool"),
    [("sam_demo", ("neck", "masks"), 2), ("lite_medsam", ("late", "masks"), None), ("mask", ("mask", "masks"), 1)],
)
def test_a_store_of_some_of_its_taps_is_the_one_extracted_so(
    name: str, taps: tuple[str, ...], pool: int | None
) -> None:
    whole = make_recipe(name, taps, None, pool).fingerprint("0" * 64)
    for tap in taps:
        alone = make_recipe(name, (tap,), None, pool).fingerprint("0" * 64)
        assert of_taps(whole, (tap,)) == alone
