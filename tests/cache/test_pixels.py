"""Images as one more tap, of type uint8: read by anybody, never pooled, never under pseudonyms, no damage if dark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

import cache
from tests.cache.making import FORMATS, NUMBER_OF, TAPS, assert_holds, build, feature, files, rows, write

PIXELS = {**TAPS, "image": cache.TapSpec(3, 5, 5, "uint8")}
WANTED = rows(range(9))
KEY = bytes(range(32))


def plain(path: Path, name: str) -> Any:
    if path.suffix == ".zarr":
        return zarr.open_group(path, mode="r")[name][:]  # type: ignore[index]
    with h5py.File(path, "r") as file:
        return file[name][:]


@pytest.mark.parametrize("suffix", FORMATS)
def test_plain_libraries_read_images(suffix: str, tmp_path: Path) -> None:
    store, _ = build(tmp_path / f"store.{suffix}", WANTED, taps=PIXELS)
    assert_holds(store, WANTED, PIXELS)
    images = plain(store.path, "image")
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, np.stack([feature(n, PIXELS)["image"] for n in range(9)]))
    assert cache.verify(store.path) == ()


def test_a_version_from_the_future_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = build(tmp_path / "store.zarr", WANTED)[0].path
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["feature_store"]["format_version"] = 5
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(cache.FormatError, match="has format version 5, this software reads 1 to 4: update it"):
        cache.open_store(path)


def test_the_card_says_that_there_are_images(tmp_path: Path) -> None:
    without, with_images = (build(tmp_path / f"{len(taps)}.zarr", WANTED, taps=taps)[0] for taps in (TAPS, PIXELS))
    assert "This store holds the images themselves" not in without.card
    assert "**This store holds the images themselves**, reduced, in `image`: whoever has it sees them" in (
        with_images.card
    )
    assert "They are no images" not in with_images.card


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_image_is_found_and_repaired_to_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    path = build(tmp_path / f"store.{suffix}", WANTED, taps=PIXELS)[0].path
    sound = files(path)
    needle = feature(4, PIXELS)["image"].tobytes()
    for file in [path] if path.is_file() else sorted((path / "image").glob("c.*")):
        content = bytearray(file.read_bytes())
        if (at := content.find(needle)) >= 0:
            content[at + 7] ^= 1
            file.write_bytes(content)
    with pytest.raises(cache.DamagedRowError, match=r"'image-4\.png'"):
        cache.open_store(path).read([4], ["image"])
    encoded = []
    with cache.repair_store(path) as writer:
        for plan in writer.pending:
            encoded += [NUMBER_OF[writer.rows[i].digest] for i in plan.rows]
            write(writer, plan, writer.rows, PIXELS)
        writer.commit()
    assert encoded == [4]
    assert files(path) == sound


def test_black_and_white_images_are_no_damage(tmp_path: Path) -> None:
    taps = {"image": PIXELS["image"]}
    path = tmp_path / "store.zarr"
    with cache.create_store(path, fingerprint=cache.Fingerprint({}), taps=taps, rows=WANTED) as writer:
        for plan in writer.pending:
            images = np.full((len(plan.rows), 3, 5, 5), 100, np.uint8)
            images += np.arange(len(images), dtype=np.uint8)[:, None, None, None]
            images[0], images[1] = 0, 255
            writer.write(plan, {"image": images}, np.ones((len(images), 2), np.float32))
        writer.commit()
    (found,) = cache.inspect_store(path).taps
    assert (found.zero, found.constant, found.non_finite, found.outliers) == ((), (), (), {})
    assert 80 < found.mean < 130


def test_stores_of_images_are_compared_as_numbers(tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("first.zarr", "second.zarr"))
    taps = {"image": PIXELS["image"]}
    for path, grey in ((first, 250), (second, 3)):
        with cache.create_store(path, fingerprint=cache.Fingerprint({}), taps=taps, rows=rows([1])) as writer:
            (plan,) = writer.pending
            writer.write(plan, {"image": np.full((1, 3, 5, 5), grey, np.uint8)}, np.ones((1, 2), np.float32))
            writer.commit()
    (found,) = cache.diff_stores(first, second).taps
    assert found.max_abs == 247


def test_a_pool_leaves_images_as_they_are(tmp_path: Path) -> None:
    taps = {"neck": cache.TapSpec(2, 4, 4, "float32"), "image": PIXELS["image"]}
    store, _ = build(tmp_path / "store.zarr", WANTED, taps=taps)
    pooled = cache.convert_store(store.path, tmp_path / "p.h5", pool=2, fingerprint=cache.Fingerprint({"pool": 2}))
    assert pooled.taps["neck"].shape == (2, 2, 2)
    assert pooled.taps["image"] == taps["image"]
    assert pooled.read(range(9), ["image"])["image"].tobytes() == store.read(range(9), ["image"])["image"].tobytes()


def test_no_pseudonym_hides_an_image(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", WANTED, taps=PIXELS)
    copy, mapping = tmp_path / "copy.zarr", tmp_path / "names.csv"
    with pytest.raises(cache.StoreError, match="tap 'image' holds images, which may identify people whatever"):
        cache.pseudonymise_store(store.path, copy, key=KEY, mapping=mapping)
    with pytest.raises(cache.StoreError, match="tap 'image' holds images"):
        cache.convert_store(store.path, copy, pseudonym=lambda name: name[::-1])
    assert not copy.exists()
    assert not mapping.exists()
    names = cache.Fingerprint({"taps": "fewer"})
    made = cache.pseudonymise_store(store.path, copy, key=KEY, mapping=mapping, taps=tuple(TAPS), fingerprint=names)
    assert tuple(made.taps) == tuple(TAPS)
    assert not any(feature(4, PIXELS)["image"].tobytes() in content for content in files(copy).values())
