"""Features as int8 with scales and as bfloat16: the rule, number by number, and that they are rows like any others."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of_numbers

import cache
from cache import packing
from tests.cache.making import FINGERPRINT, FORMATS, NUMBER_OF, SHARD_MIB, begin, build, feature, files, rows, write
from tests.cache.run_store import finish, make_taps, start
from tests.cache.serving import Server

INT8 = cache.TapSpec(3, 4, 5, "int8")
BRAIN = cache.TapSpec(2, 3, 2, "bfloat16")
PACKED = {"neck": INT8, "late": BRAIN, "image": cache.TapSpec(3, 5, 5, "uint8")}
FLOAT = {"neck": cache.TapSpec(3, 4, 5, "float16"), "late": cache.TapSpec(2, 3, 2, "float32"), "image": PACKED["image"]}
WANTED = rows(range(11))
Array = npt.NDArray[Any]


def bits(values: Array) -> Array:
    return values.view({2: np.uint16, 4: np.uint32}[values.itemsize])


def plain(path: Path, name: str) -> tuple[Array, Mapping[str, Any]]:
    """An array and its attributes as the format's own library reads them."""
    if path.suffix == ".zarr":
        found: Any = zarr.open_group(path, mode="r")[name]
        return found[:], dict(found.attrs)
    with h5py.File(path, "r") as file:
        return file[name][:], {key: value.decode() for key, value in file[name].attrs.items()}


def by_hand(row: Array) -> tuple[Array, Array, Array]:
    """Whole numbers, scales and what is read of them, one number at a time."""
    whole, scales, read = np.zeros(row.shape, np.int8), np.zeros((len(row), 1, 1), np.float32), np.zeros_like(row)
    for channel, values in enumerate(row):
        if not np.isfinite(values).all():
            scales[channel], read[channel] = np.nan, np.nan
            continue
        largest = max(abs(float(value)) for value in values.flat)
        scale = scales[channel, 0, 0] = np.float32(largest) / np.float32(127)
        for place in np.ndindex(values.shape):
            if scale:
                whole[channel][place] = round(float(np.float32(values[place]) / scale))  # Python rounds half to even
                read[channel][place] = np.float16(np.float32(whole[channel][place]) * scale)
    return whole, scales, read


@given(
    row=arrays_of_numbers.arrays(
        np.float16, (2, 2, 3), elements=st.floats(width=16) | st.sampled_from([0.0, -0.0, 6e-8, 65504.0])
    )
)
@settings(max_examples=200, deadline=None)
def test_a_row_is_packed_and_read_by_the_rule(row: Array) -> None:
    packed = cache.pack("neck", cache.TapSpec(2, 2, 3, "int8"), row[None])
    whole, scales, read = by_hand(row)
    np.testing.assert_array_equal(packed["neck"][0], whole)
    np.testing.assert_array_equal(packed["neck.scale"][0], scales)
    found = np.empty((1, 2, 2, 3), np.float16)
    packing.scale_up(packed["neck"], packed["neck.scale"], found)
    np.testing.assert_array_equal(found[0], read)
    np.testing.assert_array_equal(cache.Roundings("int8").apply(row[None])[0], read)
    near, wide = np.isfinite(read), np.abs(read.astype(np.float64))
    with np.errstate(invalid="ignore"):
        away = np.abs(read - row.astype(np.float64))
    assert (away <= scales / 2 + 2.0**-11 * wide + 2.0**-25)[near].all()


def test_every_product_that_a_float16_store_can_have_is_read_as_ieee_rounds_it() -> None:
    """All whole numbers by the scales of all largest values, subnormal ones and ties among them."""
    largest = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    scales = (largest / np.float32(127)).reshape(-1, 64, 1, 1)
    whole = np.broadcast_to(np.arange(-127, 128, dtype=np.int8).reshape(1, 1, 1, -1), (len(scales), 64, 1, 255)).copy()
    found = np.empty(whole.shape, np.float16)
    for rows_, of, out in zip(whole, scales, found, strict=True):  # in rows as a store has them
        packing.scale_up(rows_, of, out)
    np.testing.assert_array_equal(bits(found), bits((whole.astype(np.float32) * scales).astype(np.float16)))


def test_channels_of_any_scale_lie_side_by_side_in_a_row() -> None:
    """Tiny, none, not finite, beyond what float16 holds, as another program may write them, and plain ones."""
    few = np.array([2.0**-14, 1e-5, 1e-30, 0, np.nan, np.inf, 515.7, 515.9, 600, 1e30, 0.01, 1], np.float32)
    scales = np.resize(few, (7, 60, 1, 1))
    whole = np.random.default_rng(0).integers(-127, 128, (7, 60, 16, 16), np.int8)
    for kind in (np.float16, np.float32):
        found = np.empty(whole.shape, kind)
        packing.scale_up(whole, scales, found)
        with np.errstate(all="ignore"):
            expected = (whole.astype(np.float32) * scales).astype(kind)
        np.testing.assert_array_equal(
            bits(found) if kind is np.float16 else found, bits(expected) if kind is np.float16 else expected
        )


@given(arrays_of_numbers.arrays(np.float32, (1, 2, 2), elements=st.floats(width=32)))
@settings(max_examples=200, deadline=None)
def test_bfloat16_is_the_nearest_and_even_on_a_tie(row: Array) -> None:
    row = np.where(np.isinf(row), np.float32(0), row)
    found = cache.Roundings("bfloat16").apply(row[None])[0]
    assert not (bits(found) & 0xFFFF).any()
    lower = (bits(row) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    upper = ((bits(row) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    for value, got, below, above in zip(row.flat, found.flat, lower.flat, upper.flat, strict=True):
        if np.isnan(value):
            assert np.isnan(got)
        elif np.isfinite(above):
            gaps = abs(float(value) - below), abs(float(value) - above)
            even = below if not (int(np.float32(below).view(np.uint32)) >> 16) & 1 else above
            assert got == (even if gaps[0] == gaps[1] else below if gaps[0] < gaps[1] else above)


@pytest.mark.parametrize("suffix", FORMATS)
def test_plain_libraries_read_whole_numbers_with_the_scales_beside_them(suffix: str, tmp_path: Path) -> None:
    store, _ = build(tmp_path / f"store.{suffix}", WANTED, taps=PACKED)
    whole, notes = plain(store.path, "neck")
    assert notes == {"scale": "neck.scale"}
    assert whole.dtype == np.int8
    scales, _ = plain(store.path, notes["scale"])
    assert (scales.dtype, scales.shape) == (np.float32, (11, 3, 1, 1))
    np.testing.assert_array_equal((whole * scales).astype(np.float16), store.read(range(11))["neck"])
    brain, notes = plain(store.path, "late")
    assert (brain.dtype, notes) == (np.uint16, {"bits_of": "bfloat16"})
    np.testing.assert_array_equal((brain.astype(np.uint32) << 16).view(np.float32), store.read(range(11))["late"])
    errors, _ = plain(store.path, "neck.error")
    for row, error in enumerate(errors[:, 0, 0, 0]):
        given_ = feature(row, PACKED)["neck"].astype(np.float64)
        away = store.read([row], dtype="float32")["neck"][0] - given_
        assert error == pytest.approx(np.sqrt((away**2).mean()) / given_.std(), rel=2e-3)
    assert cache.verify(store.path) == ()


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_are_read_as_float16_float32_or_as_they_lie(suffix: str, tmp_path: Path) -> None:
    store, _ = build(tmp_path / f"store.{suffix}", WANTED, taps=PACKED)
    order = [7, 0, 7, 10, 3]
    numbers = store.read(order)
    assert {name: values.dtype.name for name, values in numbers.items()} == {
        "neck": "float16",
        "late": "float32",
        "image": "uint8",
    }
    stored = store.read(order, dtype="stored")
    assert list(stored) == list(store.arrays) == ["neck", "neck.scale", "neck.error", "late", "late.error", "image"]
    wide = store.read(order, dtype="float32")
    np.testing.assert_array_equal(wide["neck"], stored["neck"] * stored["neck.scale"])
    np.testing.assert_array_equal(numbers["neck"], wide["neck"].astype(np.float16))
    for place, row in enumerate(order):
        np.testing.assert_array_equal(numbers["neck"][place], by_hand(feature(row, PACKED)["neck"])[2])
    out = {"neck": np.empty((5, *INT8.shape), np.float32), "neck.scale": np.empty((5, 3, 1, 1), np.float32)}
    store.read(order, ["neck", "neck.scale"], out=out)
    np.testing.assert_array_equal(out["neck"], wide["neck"])
    whole = {"neck": np.empty((5, *INT8.shape), np.int8)}
    np.testing.assert_array_equal(store.read(order, ["neck"], out=whole)["neck"], stored["neck"])
    with pytest.raises(cache.StoreError, match="expected a writable, C-contiguous float16 or float32 or int8 array"):
        store.read([0], ["neck"], out={"neck": np.empty((1, *INT8.shape), np.float64)})
    assert store[2]["neck"].dtype == np.float16


def test_float16_is_read_as_float32_too(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", WANTED, taps=FLOAT)
    wide = store.read([4, 2], dtype="float32")
    assert (wide["neck"].dtype, wide["image"].dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(wide["neck"], store.read([4, 2])["neck"].astype(np.float32))


@pytest.mark.parametrize("shape", [(40, 32, 33), (2, 1, 1), (600, 1, 60)], ids=str)
def test_long_and_short_rows_are_read_alike(shape: tuple[int, int, int], tmp_path: Path) -> None:
    taps = {"neck": cache.TapSpec(*shape, "int8")}
    store, _ = build(tmp_path / "store.zarr", WANTED, taps=taps)
    order = [9, 1, 1, 0, 10]
    expected = np.stack([by_hand_fast(feature(row, taps)["neck"]) for row in order])
    np.testing.assert_array_equal(store.read(order)["neck"], expected)


def by_hand_fast(row: Array) -> Array:
    wide = row.astype(np.float32)
    scale = np.abs(wide).max((1, 2), keepdims=True) / np.float32(127)
    return (np.rint(wide / scale) * scale).astype(np.float16)


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_a_converted_store_is_the_one_that_was_extracted_so(first: str, second: str, tmp_path: Path) -> None:
    build(tmp_path / f"float.{first}", WANTED, taps=FLOAT)
    direct, _ = build(tmp_path / f"direct.{second}", WANTED, taps=PACKED)
    types = {name: tap.dtype for name, tap in PACKED.items()}
    made = cache.convert_store(
        tmp_path / f"float.{first}",
        tmp_path / f"made.{second}",
        dtype=types,
        fingerprint=FINGERPRINT,
        shard_mib=SHARD_MIB,
    )
    assert made.version == direct.version
    moved = cache.convert_store(direct.path, tmp_path / f"moved.{first}")
    whole, again = direct.read(range(11), dtype="stored"), moved.read(range(11), dtype="stored")
    assert all(whole[name].tobytes() == again[name].tobytes() for name in direct.arrays)
    assert cache.info(moved.path).rounding == cache.info(direct.path).rounding


def test_what_was_rounded_twice_says_so(tmp_path: Path) -> None:
    assert cache.Roundings("float16").then("int8").said == "int8"
    assert cache.Roundings("float32").then("bfloat16").said == "bfloat16"
    assert cache.Roundings("int8").then("int8").said == "int8"
    assert cache.Roundings("float32").then("int8").said == "int8 of float32"
    assert cache.Roundings("int8 of float32").then("float16").said == "float16 of int8 of float32"
    assert [cache.Roundings(dtype).given for dtype in ("float16", "int8", "float16 of int8", "bfloat16")] == [
        "float16",
        "float16",
        "float16",
        "float32",
    ]
    assert [cache.Roundings(dtype).coarsest for dtype in ("float32 of int8 of float16", "float32")] == [
        "int8",
        "float32",
    ]
    store, _ = build(tmp_path / "store.zarr", WANTED, taps=PACKED)
    back = cache.convert_store(
        store.path, tmp_path / "back.zarr", dtype={"neck": "float16"}, fingerprint=cache.Fingerprint({"back": 1})
    )
    assert back.taps["neck"].dtype == "float16"
    numbers = store.read(range(11))["neck"]
    np.testing.assert_array_equal(back.read(range(11))["neck"], numbers)
    values = np.stack([feature(row, PACKED)["neck"] for row in range(11)])
    np.testing.assert_array_equal(cache.Roundings("float16 of int8").apply(values), numbers)


def test_a_pool_comes_before_the_rounding_and_never_after_it(tmp_path: Path) -> None:
    taps = {"neck": cache.TapSpec(3, 4, 6, "float16")}
    coarse = {"fingerprint": cache.Fingerprint({"pool": 2})}
    build(tmp_path / "fine.zarr", WANTED, taps=taps)
    pooled = cache.convert_store(tmp_path / "fine.zarr", tmp_path / "pooled.zarr", pool=2, **coarse)
    both = cache.convert_store(tmp_path / "fine.zarr", tmp_path / "both.zarr", pool=2, dtype="int8", **coarse)
    after = cache.convert_store(pooled.path, tmp_path / "after.zarr", dtype="int8", **coarse)
    assert both.version == after.version
    with pytest.raises(cache.StoreError, match="of type int8 are rounded already, and their averages are not those"):
        cache.convert_store(after.path, tmp_path / "no.zarr", pool=2, **coarse)


def test_a_number_too_large_for_the_new_type_is_refused(tmp_path: Path) -> None:
    taps = {"neck": cache.TapSpec(1, 1, 2, "float32")}
    with begin(tmp_path / "large.zarr", rows([0]), taps=taps) as writer:
        writer.write(writer.pending[0], {"neck": np.full((1, 1, 1, 2), 1e6, np.float32)}, np.ones((1, 2), np.float32))
        writer.commit()
    with pytest.raises(cache.StoreError, match="a number of tap 'neck' is too large for float16"):
        cache.convert_store(tmp_path / "large.zarr", tmp_path / "n.zarr", dtype="int8", fingerprint=FINGERPRINT)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["neck", "neck.scale", "neck.error", "late"])
def test_a_flipped_bit_is_found_named_and_repaired(name: str, suffix: str, tmp_path: Path) -> None:
    store, _ = build(tmp_path / f"store.{suffix}", WANTED, taps=PACKED)
    path, sound = store.path, files(store.path)
    needle = store.read([4], [name], dtype="stored")[name].tobytes()
    store.close()
    beside = store.read([4], ["neck.scale"], dtype="stored")["neck.scale"].tobytes()
    for file in [path] if path.is_file() else sorted((path / name).glob("c.*")):
        content = bytearray(file.read_bytes())
        after = content.find(beside) if name == "neck.error" and path.is_file() else 0  # two bytes are found anywhere
        if (at := content.find(needle, max(after, 0))) >= 0:
            content[at] ^= 1
            file.write_bytes(content)
            break
    damage = cache.verify(path)
    assert damage
    if not (path.is_file() and name == "neck.error"):
        assert next((found.tap, found.ids) for found in damage if found.tap) == (name, ("image-4.png",))
        with pytest.raises(cache.DamagedRowError, match=r"image-4\.png"):
            cache.open_store(path).read([2, 4], [name] if name == "neck.error" else [name.removesuffix(".scale")])
    with cache.repair_store(path) as writer:
        for plan in writer.pending:
            assert [NUMBER_OF[writer.rows[i].digest] for i in plan.rows] == [4]
            write(writer, plan, writer.rows, PACKED)
        writer.commit()
    assert files(path) == sound


@pytest.mark.parametrize("shard", [1, 3])
def test_a_killed_run_is_continued_to_the_same_bytes(shard: int, tmp_path: Path) -> None:
    whole, _ = build(tmp_path / "whole.zarr", WANTED, taps=PACKED)
    path, log = tmp_path / "store.zarr", tmp_path / "log"
    log.touch()
    process = start(make_taps, path, range(11), PACKED, log)
    while log.read_text().count("shard") < shard:
        time.sleep(0.001)
    process.kill()
    assert finish(process) < 0
    assert not path.exists()
    assert cache.info(path).rounding == {}
    _, encoded = build(path, WANTED, taps=PACKED)
    assert len(encoded) <= len(WANTED) - 3 * (shard - 1)
    assert files(path) == files(whole.path)


def test_an_update_shares_the_files_of_all_arrays(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", WANTED, taps=PACKED)
    shared = {name: (store.path / name / "c.0.0.0.0").stat().st_ino for name in store.arrays}
    wanted = [*WANTED[:8], *rows([30])]
    updated, encoded = build(store.path, wanted, taps=PACKED)
    assert [wanted[i].id for i in encoded] == ["image-30.png"]
    assert {name: (store.path / name / "c.0.0.0.0").stat().st_ino for name in store.arrays} == shared
    fresh, _ = build(tmp_path / "fresh.zarr", wanted, taps=PACKED)
    assert cache.info(updated.path).rounding == cache.info(fresh.path).rounding
    for name, values in fresh.read(range(9), dtype="stored").items():
        np.testing.assert_array_equal(updated.read(range(9), dtype="stored")[name], values)


def test_only_stores_with_packed_taps_are_of_the_version_that_older_readers_refuse(tmp_path: Path) -> None:
    packed, plain_ = (build(tmp_path / f"{i}.zarr", WANTED, taps=taps)[0] for i, taps in enumerate((PACKED, FLOAT)))
    assert [cache.info(store.path).format_version for store in (packed, plain_)] == [4, 3]
    root = json.loads((packed.path / "zarr.json").read_text())
    root["attributes"]["feature_store"]["format_version"] = 3
    (packed.path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(cache.UntrustedStoreError, match="tap 'neck' of type 'int8': none of version 3"):
        cache.open_store(packed.path)


def test_a_packed_tap_has_all_that_lies_beside_it(tmp_path: Path) -> None:
    packed, _ = build(tmp_path / "0.zarr", WANTED, taps=PACKED)
    root = json.loads((packed.path / "zarr.json").read_text())
    taps = root["attributes"]["feature_store"]["taps"]
    root["attributes"]["feature_store"]["taps"] = [tap for tap in taps if tap["name"] != "neck.scale"]
    (packed.path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(cache.UntrustedStoreError, match="or an array beside it is missing"):
        cache.open_store(packed.path)


def test_a_name_that_lies_beside_another_tap_is_refused(tmp_path: Path) -> None:
    taps = {"neck": INT8, "neck.scale": cache.TapSpec(3, 1, 1, "float32")}
    with pytest.raises(cache.StoreError, match=r"tap name 'neck\.scale' is that of an array beside tap 'neck'"):
        begin(tmp_path / "store.zarr", WANTED, taps=taps)
    fine, _ = build(tmp_path / "fine.zarr", WANTED, taps={**taps, "neck": FLOAT["neck"]})
    assert list(fine.taps) == ["neck", "neck.scale"]


def test_features_of_another_type_are_refused(tmp_path: Path) -> None:
    with begin(tmp_path / "store.zarr", rows([0]), taps={"neck": INT8}) as writer:
        wrong = {"neck": np.zeros((1, *INT8.shape), np.float32)}
        with pytest.raises(cache.StoreError, match=r"got a float32 array of .* expected float16 .* int8 is made"):
            writer.write(writer.pending[0], wrong, np.ones((1, 2), np.float32))
        alone = {"neck": np.zeros((1, *INT8.shape), np.int8)}
        with pytest.raises(cache.StoreError, match=r"expected \['neck', 'neck.error', 'neck.scale'\]"):
            writer.write(writer.pending[0], alone, np.ones((1, 2), np.float32))


def test_the_card_and_the_summary_tell_the_error(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", WANTED, taps=PACKED)
    told = cache.info(store.path).rounding
    errors = store.read(range(11), ["neck.error"])["neck.error"].astype(np.float64)
    assert told["neck"] == pytest.approx(np.sqrt((errors**2).mean()), rel=5e-3)
    assert 0.002 < told["neck"] < 0.006
    assert 0.001 < told["late"] < 0.003
    assert f"| `neck` | 3 x 4 x 5 | int8 | 0.1 | {told['neck']:.2%} |" in store.card
    assert "| `image` | 3 x 5 x 5 | uint8 | 0.1 | none |" in store.card
    assert "rounding" not in build(tmp_path / "float.zarr", WANTED, taps=FLOAT)[0].card


def test_an_int8_store_is_compared_with_the_one_it_was_made_from(tmp_path: Path) -> None:
    plain_, _ = build(tmp_path / "float.zarr", WANTED, taps=FLOAT)
    packed, _ = build(tmp_path / "packed.zarr", WANTED, taps=PACKED)
    found = {tap.tap: tap for tap in cache.diff_stores(plain_.path, packed.path).taps}
    assert 0.001 < found["neck"].relative < 0.01
    assert found["image"].differing == ()


def test_numbers_that_are_not_finite_stay_so_and_are_found(tmp_path: Path) -> None:
    with begin(tmp_path / "store.zarr", WANTED, taps={"neck": INT8}) as writer:
        for plan in writer.pending:
            values = np.stack([feature(row, PACKED)["neck"] for row in plan.rows])
            values[0, 1, 0, 0] = np.inf
            writer.write(plan, {"neck": values}, np.ones((len(values), 2), np.float32))
        store = writer.commit()
    read = store.read([0, 1])["neck"]
    assert np.isnan(read[0, 1]).all()
    assert np.isfinite(read[0, [0, 2]]).all()
    assert np.isfinite(read[1]).all()
    assert cache.inspect_store(store.path).taps[0].non_finite == ("image-0.png", "image-4.png", "image-8.png")
    assert 0.002 < cache.info(store.path).rounding["neck"] < 0.006


def test_an_int8_store_is_read_where_it_lies(server: Server, tmp_path: Path) -> None:
    store, _ = build(tmp_path / "made/store.zarr", WANTED, taps=PACKED)
    shutil.copytree(store.path, tmp_path / "served/store.zarr")
    remote = cache.open_store(f"{server.url}/store.zarr")
    for name, values in store.read([9, 2, 5]).items():
        np.testing.assert_array_equal(remote.read([9, 2, 5])[name], values)


def test_features_of_few_cells_stay_as_they_are_where_scales_would_cost_more(tmp_path: Path) -> None:
    assert [cache.type_for((9, *cells), "int8") for cells in ((1, 1), (2, 2), (1, 5))] == ["float16", "float16", "int8"]
    assert cache.type_for((9, 1, 1), "bfloat16") == "bfloat16"
    taps = {"embedding": cache.TapSpec(6, 1, 1, "float16"), "neck": FLOAT["neck"]}
    store, _ = build(tmp_path / "store.zarr", WANTED, taps=taps)
    made = cache.convert_store(store.path, tmp_path / "made.zarr", dtype="int8", fingerprint=FINGERPRINT)
    assert {name: tap.dtype for name, tap in made.taps.items()} == {"embedding": "float16", "neck": "int8"}
    values = store.read([3])["embedding"]
    np.testing.assert_array_equal(made.read([3])["embedding"], values)
    np.testing.assert_array_equal(cache.Roundings("int8").apply(values), values)


@pytest.mark.parametrize("told", [True, 3, "much", [1], [[]], {"neck": "much"}, {"neck": True}])
def test_a_rounding_that_is_no_number_is_not_told(told: Any, tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", rows(range(3)), provenance={"rounding_error": told})
    assert cache.info(store.path).rounding == {}
    assert cache.info(cache.convert_store(store.path, tmp_path / "other.h5").path).rounding == {}
