"""Stores made from stores: formats, taps, pools, pseudonyms, labels, and the card."""

from __future__ import annotations

import csv
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import cache
from cache.care import convert
from tests.cache.making import (
    FINGERPRINT,
    FORMATS,
    SHARD_MIB,
    TAPS,
    assert_holds,
    begin,
    build,
    feature,
    files,
    row,
    rows,
    write,
)

WANTED = [row(n % 9, f"patient-{n}/image.png") for n in range(12)]
LABELS = cache.Labels(
    ("benign", "malignant"), tuple(n % 2 for n in range(12)), ("train",) * 8 + ("val",) * 2 + ("test",) * 2
)
KEY = b"0123456789abcdef"


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_formats_convert_to_what_extracting_so_gives(first: str, second: str, tmp_path: Path) -> None:
    build(tmp_path / f"first.{first}", WANTED)
    direct, _ = build(tmp_path / f"direct.{second}", WANTED)
    converted = cache.convert_store(tmp_path / f"first.{first}", tmp_path / f"second.{second}", shard_mib=SHARD_MIB)
    assert_holds(converted, WANTED)
    assert converted.version == direct.version
    assert files(converted.path).keys() == files(direct.path).keys()


def test_a_conversion_gathers_the_extents_of_all_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "store.zarr", rows(range(24)))
    gathered = []

    def counted(store: cache.Store) -> Any:
        gathered.append(store)
        return extents(store)

    extents: Any = cache.Store.extents.fget
    monkeypatch.setattr(cache.Store, "extents", property(counted))
    cache.convert_store(tmp_path / "store.zarr", tmp_path / "other.zarr", shard_mib=SHARD_MIB)
    assert len(list((tmp_path / "other.zarr/neck").glob("c.*"))) == 6
    assert len(gathered) == 1


def test_a_subset_of_taps_is_the_store_extracted_so(tmp_path: Path) -> None:
    build(tmp_path / "all.zarr", WANTED)
    fingerprint = cache.Fingerprint({"taps": ["block:31"]})
    found = cache.convert_store(tmp_path / "all.zarr", tmp_path / "one.h5", taps=["block:31"], fingerprint=fingerprint)
    assert list(found.taps) == ["block:31"]
    for i in range(12):
        assert found.read([i])["block:31"][0].tobytes() == feature(i % 9)["block:31"].tobytes()
    with pytest.raises(cache.StoreError, match="another fingerprint"):
        cache.convert_store(tmp_path / "all.zarr", tmp_path / "two.zarr", taps=["neck"])
    with pytest.raises(cache.StoreError, match="no tap 'nck'"):
        cache.convert_store(tmp_path / "all.zarr", tmp_path / "two.zarr", taps=["nck"], fingerprint=fingerprint)


def test_a_coarser_pool_is_the_mean_of_windows(tmp_path: Path) -> None:
    taps = {"neck": cache.TapSpec(3, 5, 4, "float16")}
    build(tmp_path / "fine.zarr", rows(range(4)), taps=taps)
    coarse = cache.convert_store(
        tmp_path / "fine.zarr", tmp_path / "coarse.zarr", pool=2, fingerprint=cache.Fingerprint({"pool": 2})
    )
    assert coarse.taps["neck"] == cache.TapSpec(3, 2, 2, "float16")
    for number in range(4):
        fine, read = feature(number, taps)["neck"].astype(np.float64), coarse.read([number])["neck"][0]
        for i in range(2):
            for j in range(2):
                expected = fine[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
                np.testing.assert_allclose(read[:, i, j], expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(cache.StoreError, match="pool 9 does not fit"):
        cache.convert_store(
            tmp_path / "fine.zarr", tmp_path / "no.zarr", pool=9, fingerprint=cache.Fingerprint({"pool": 9})
        )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pools_one_after_the_other_are_one_pool(dtype: str) -> None:
    maps = 100 * np.random.default_rng(0).standard_normal((2, 3, 24, 24)).astype(np.float32)
    maps[0, 0, :2] = -0.0
    stored = maps.astype(dtype)
    once = convert._pool(stored, 12)
    assert once.dtype == dtype
    assert once.shape == (2, 3, 2, 2)
    assert convert._pool(convert._pool(stored, 2), 6).tobytes() == once.tobytes()
    assert convert._pool(convert._pool(stored, 4), 3).tobytes() == once.tobytes()
    exact = maps.astype(np.float64).reshape(2, 3, 2, 12, 2, 12).mean((3, 5))
    np.testing.assert_allclose(once, exact, atol=0.02 if dtype == "float16" else 1e-5)


def test_a_pool_goes_in_prime_steps() -> None:
    assert {pool: cache.pool_steps(pool) for pool in (1, 2, 7, 8, 12, 45)} == {
        1: (),
        2: (2,),
        7: (7,),
        8: (2, 2, 2),
        12: (2, 2, 3),
        45: (3, 3, 5),
    }


def test_samples_set_aside_stay_so_through_a_conversion(tmp_path: Path) -> None:
    wanted = rows(range(9))
    with begin(tmp_path / "first.zarr", wanted) as writer:
        for plan in writer.pending:
            write(writer, plan, wanted, set_aside={i: "bad" for i in plan.rows if i in {0, 3, 4}})
        writer.commit()
    found = cache.convert_store(tmp_path / "first.zarr", tmp_path / "second.h5")
    assert_holds(found, rows([1, 2, 5, 6, 7, 8]))
    assert found.set_aside == dict.fromkeys(("image-0.png", "image-3.png", "image-4.png"), "bad")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_pseudonymised_copy_names_nobody(suffix: str, tmp_path: Path) -> None:
    wanted = rows(range(40))
    story = {"license": "CC0", "command": "extract /home/jane/patients", "created": "2025-01-01"}
    build(tmp_path / "first.zarr", rows(range(38, 80)), provenance=story)
    build(tmp_path / "first.zarr", wanted, provenance=story)
    listing = tmp_path / "who.csv"
    copy = cache.pseudonymise_store(tmp_path / "first.zarr", tmp_path / f"copy.{suffix}", key=KEY, mapping=listing)
    with listing.open() as file:
        pairs = {line["pseudonym"]: line["id"] for line in csv.DictReader(file)}
    assert sorted(pairs[name] for name in copy.ids) == sorted(row.id for row in wanted)
    assert list(copy.ids) == sorted(copy.ids), "the order of the names tells whose each row is"
    assert stat.S_IMODE(listing.stat().st_mode) == 0o600
    assert copy.digests.shape == (0, 32)
    assert copy.provenance == {"license": "CC0", "created": "2025-01-01"}
    everything = b"".join(files(copy.path).values())
    for row_ in wanted:
        assert row_.id.encode() not in everything
        assert row_.digest not in everything
        assert row_.digest.hex().encode() not in everything
    assert b"jane" not in everything
    assert feature(60)["neck"].tobytes() not in everything, "rows that were removed are not sent along"
    found = dict(zip(copy.ids, copy.read(range(40))["neck"], strict=True))
    again = cache.keyed_pseudonyms([row.id for row in wanted], KEY)
    for i, row_ in enumerate(wanted):
        assert found[again[row_.id]].tobytes() == feature(i)["neck"].tobytes()
    assert cache.verify(copy.path) == ()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_copy_that_was_stopped_takes_nothing_from_the_store_that_was_there_before(
    suffix: str, tmp_path: Path
) -> None:
    names = cache.keyed_pseudonyms([f"p{n}" for n in range(12)], KEY)

    def stop(task: str, done: int, total: int, **info: float | str) -> None:
        raise KeyboardInterrupt

    def send(**kwargs: Any) -> cache.Store:
        source, target = tmp_path / f"first.{suffix}", tmp_path / f"copy.{suffix}"
        return cache.convert_store(source, target, pseudonym=names.__getitem__, shard_mib=SHARD_MIB, **kwargs)

    build(tmp_path / f"first.{suffix}", [row(n, f"p{n}") for n in range(12)])
    with pytest.raises(KeyboardInterrupt):
        send(progress=stop)
    (tmp_path / f"first.{suffix}").rename(tmp_path / f"before.{suffix}")
    build(tmp_path / f"first.{suffix}", [row(100 + n, f"p{n}") for n in range(12)])
    with send() as copy:
        for n in range(12):
            assert copy[names[f"p{n}"]]["neck"].tobytes() == feature(100 + n)["neck"].tobytes()


def test_pseudonyms_need_a_secret_and_a_list_kept_at_home(tmp_path: Path) -> None:
    build(tmp_path / "first.zarr", WANTED)
    with pytest.raises(cache.StoreError, match="at least 16"):
        cache.pseudonymise_store(
            tmp_path / "first.zarr", tmp_path / "copy.zarr", key=b"x", mapping=tmp_path / "who.csv"
        )
    (tmp_path / "link").symlink_to(tmp_path / "first.zarr")
    for inside in ("copy.zarr/who.csv", "first.zarr/who.csv", "link/neck/who.csv", "copy.zarr"):
        with pytest.raises(cache.StoreError, match=r"inside .*; keep the mapping elsewhere"):
            cache.pseudonymise_store(
                tmp_path / "first.zarr", tmp_path / "copy.zarr", key=KEY, mapping=tmp_path / inside
            )
    assert cache.verify(tmp_path / "first.zarr") == ()
    assert not (tmp_path / "copy.zarr").exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_labels_travel_where_somebody_sends_them(suffix: str, tmp_path: Path) -> None:
    build(tmp_path / "first.zarr", WANTED)
    assert cache.open_store(tmp_path / "first.zarr").labels is None
    copy = cache.convert_store(tmp_path / "first.zarr", tmp_path / f"copy.{suffix}", labels=LABELS)
    assert cache.open_store(copy.path).labels == LABELS
    several = cache.Labels(("a", "b"), ((0, 1),) * 12, ("train",) * 12)
    copy = cache.convert_store(tmp_path / "first.zarr", copy.path, labels=several)
    assert copy.labels == several
    with pytest.raises(cache.StoreError, match="none of the 2 classes"):
        cache.convert_store(tmp_path / "first.zarr", copy.path, labels=cache.Labels(("a", "b"), (2,) * 12, ("x",) * 12))


def test_labels_leave_out_samples_set_aside(tmp_path: Path) -> None:
    wanted = rows(range(3))
    labels = cache.Labels(("a", "b", "c"), (0, 1, 2), ("train", "val", "test"))
    with begin(tmp_path / "store.zarr", wanted, labels=labels) as writer:
        write(writer, writer.pending[0], wanted, set_aside={1: "bad"})
        store = writer.commit()
    assert store.labels == cache.Labels(("a", "b", "c"), (0, 2), ("train", "test"))


def test_the_card_tells_a_stranger_what_this_is(tmp_path: Path) -> None:
    story = {"license": "CC-BY-4.0", "data_set": "BreastMNIST", "citation": "Yang et al. 2023"}
    store, _ = build(tmp_path / "store.zarr", WANTED, provenance=story)
    text = (tmp_path / "store.zarr" / "README.md").read_text()
    assert text == store.card
    _, front, _ = text.split("---\n", 2)
    fields = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in front.splitlines())}
    assert fields["license"] == "CC-BY-4.0"
    assert (fields["rows"], fields["taps"], fields["encoder"]) == (12, list(TAPS), "fake")
    assert fields["fingerprint"] == FINGERPRINT.digest()
    assert fields["weights_sha256"] == FINGERPRINT.fields["weights_sha256"]
    assert "Yang et al. 2023" in text
    for name, tap in TAPS.items():
        shape = f"{tap.channels} x {tap.height} x {tap.width}"
        assert f"| `{name}` | {shape} | {tap.dtype} | {tap.row_bytes / 1024:.1f} |" in text
    _, code, _ = text.split("```")
    found: dict[str, Any] = {}
    exec(code.removeprefix("python\n").replace("PATH OR URL OF THIS STORE", str(store.path)), found)
    assert found["features"]["neck"].tobytes() == store.read([0, 1, 2])["neck"].tobytes()
    assert build(tmp_path / "store.h5", WANTED, provenance=story)[0].card == text
    names = [name for name, _ in zarr.open_group(tmp_path / "store.zarr", mode="r")["index"].members()]
    assert "slot" in names


def test_equal_stores_do_not_differ(tmp_path: Path) -> None:
    for suffix in FORMATS:
        build(tmp_path / f"store.{suffix}", WANTED)
    assert cache.diff_stores(tmp_path / "store.zarr", tmp_path / "store.h5").equal


def test_diff_names_fields_rows_and_how_far(tmp_path: Path) -> None:
    other = cache.Fingerprint({"encoder": "other"})
    taps = {"neck": TAPS["neck"], "late": TAPS["block:31"]}
    build(tmp_path / "one.zarr", [row(0, "same"), row(1, "changed"), row(2, "gone")])
    build(tmp_path / "two.zarr", [row(5, "changed"), row(0, "same"), row(7, "new")], fingerprint=other, taps=taps)
    found = cache.diff_stores(tmp_path / "one.zarr", tmp_path / "two.zarr")
    assert not found.equal
    assert cache.Difference("encoder", "fake", "other") in found.fingerprint
    assert (found.only_first, found.only_second, found.other_pixels) == (("gone",), ("new",), ("changed",))
    assert found.other_taps == ("block:31", "late")
    (neck,) = found.taps
    gap = feature(1)["neck"].astype(np.float64) - feature(5, taps)["neck"].astype(np.float64)
    assert (neck.tap, neck.rows, neck.differing) == ("neck", 2, ("changed",))
    assert neck.max_abs == pytest.approx(np.abs(gap).max())
    size = sum(float((feature(n)["neck"].astype(np.float64) ** 2).sum()) for n in (0, 1))
    assert neck.relative == pytest.approx(np.sqrt((gap**2).sum() / size))
    assert not found.same_order


def test_inspection_finds_what_a_careful_person_would(tmp_path: Path) -> None:
    tap = cache.TapSpec(4, 3, 3, "float16")
    random = np.random.default_rng(0)
    values = random.standard_normal((20, *tap.shape)).astype(np.float16)
    values[3] = 0
    values[5, 1, 1, 1] = np.nan
    values[7] = 0.35 * np.arange(1, 5, dtype=np.float16)[:, None, None]
    values[11] *= 1000
    wanted = [*(row(n, f"{n}") for n in range(20)), row(2, "twin of 2"), row(4, "twin of 4")]
    with cache.create_store(
        tmp_path / "store.zarr", fingerprint=FINGERPRINT, taps={"neck": tap}, rows=wanted, shard_mib=0.001
    ) as writer:
        for plan in writer.pending:
            writer.write(plan, {"neck": values[list(plan.rows)]}, np.ones((len(plan.rows), 2)))
        writer.commit()
    labels = cache.Labels(("a", "b"), (0,) * 20 + (1, 0), ("train",) * 21 + ("test",))
    found = cache.inspect_store(tmp_path / "store.zarr", labels)
    (report,) = found.taps
    assert (report.non_finite, report.zero, report.constant) == (("5",), ("3",), ("7",))
    assert report.outliers.keys() == {"11"}
    norms = np.linalg.norm(values.reshape(20, -1).astype(np.float64), axis=1)
    assert report.outliers["11"] == pytest.approx(norms[11] / report.median_norm, rel=1e-3)
    finite = np.delete(values, 5, 0)[[*range(19), 2, 4]].astype(np.float64)
    assert report.mean == pytest.approx(finite.mean(), abs=1e-2)
    assert report.std == pytest.approx(finite.std(), rel=1e-3)
    assert found.twins == (
        cache.Twins(("2", "twin of 2"), ("train",), (0, 1)),
        cache.Twins(("4", "twin of 4"), ("train", "test"), (0,)),
    )
    assert found.counts == {"train": {"a": 20, "b": 1}, "test": {"a": 1, "b": 0}}
    assert cache.inspect_store(tmp_path / "store.zarr").counts == {}
