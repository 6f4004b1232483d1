"""`pipeline store` through the real command: repair, convert, diff, inspect, push and pull."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cache
from pipeline.errors import ConfigError
from pipeline.stages.stores import KEY_BYTES, _key, _refuse_other_steps

from .conftest import complaint, copy_of, succeed
from .test_kill import digests


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return copy_of(trained, tmp_path / "work")


def flip_a_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_rows_are_found_and_encoded_again(folder: Path) -> None:
    store = folder / "features/demo.zarr"
    before = digests(store)
    shard = max((p for p in store.glob("neck/c.*")), key=lambda p: p.stat().st_size)
    stride = cache.open_store(store).taps["neck"].row_bytes + 4
    for row in (1, 2, 7):  # of a batch that was full when they were first encoded
        flip_a_bit(shard, row * stride + 100)
    report = succeed(folder, "store", "verify", "features/demo.zarr", status=3)
    assert "neck" in str(report["damages"])
    said = complaint(
        folder, "store", "repair", "features/demo.zarr", "-c", "tiny.yaml", "--set", "encoder.pool=8", status=1
    )
    assert "pool is 4 there, 8 here" in said
    report = succeed(folder, "store", "repair", "features/demo.zarr", "-c", "tiny.yaml")
    assert report["repaired"] == 3
    assert report["as_before"] is True
    assert digests(store) == before


@pytest.mark.parametrize("command", ["info", "verify", "inspect", "repair"])
def test_a_store_at_a_url_is_looked_after_where_it_was_pulled_to(folder: Path, command: str) -> None:
    said = complaint(folder, "store", command, "https://127.0.0.1:1/demo.zarr", status=1)
    assert "https://127.0.0.1:1/demo.zarr is a URL" in said
    assert "`pipeline store pull` it first" in said


def test_a_sound_store_has_a_list_of_no_damages(folder: Path) -> None:
    assert succeed(folder, "store", "verify", "features/demo.zarr")["damages"] == []


def test_a_tap_of_a_map_that_nobody_asked_for_is_refused(folder: Path) -> None:
    said = complaint(folder, "store", "inspect", "features/demo.zarr", "--tap", "nonsense", status=2)
    assert "--tap goes with --plot" in said


def test_a_repair_that_gives_other_bits_says_so(folder: Path) -> None:
    store = folder / "features/demo.zarr"
    opened = cache.open_store(store)
    row = opened.read([3])
    changed = {tap: feature.copy() for tap, feature in opened.read(range(len(opened))).items()}
    changed["neck"][3] += 1  # as if another machine had made it
    rows = [cache.Row(name, digest.tobytes()) for name, digest in zip(opened.ids, opened.digests, strict=True)]
    other = {"fingerprint": opened.fingerprint, "taps": opened.taps, "rows": rows}
    with cache.create_store(folder / "other.zarr", **other, provenance=opened.provenance) as writer:
        for plan in writer.pending:
            chosen = {tap: feature[list(plan.rows)] for tap, feature in changed.items()}
            writer.write(plan, chosen, opened.extents[list(plan.rows)])
        writer.commit()
    shard = max((folder / "other.zarr").glob("neck/c.*"), key=lambda p: p.stat().st_size)
    flip_a_bit(shard, 3 * (opened.taps["neck"].row_bytes + 4))
    report = succeed(folder, "store", "repair", "other.zarr", "-c", "tiny.yaml")
    assert (report["repaired"], report["as_before"]) == (1, False)
    assert cache.open_store(folder / "other.zarr").read([3])["neck"].tobytes() == row["neck"].tobytes()


def test_after_a_change_every_row_is_as_in_a_store_made_from_scratch(folder: Path) -> None:
    images = sorted((folder / "data/demo/images").glob("*.png"))
    for path in (images[1], images[2], images[30]):
        pixels = np.asarray(Image.open(path))
        Image.fromarray(255 - pixels).save(path)
    assert succeed(folder, "extract", "-c", "tiny.yaml")["encoded"] == 3
    succeed(folder, "extract", "-c", "tiny.yaml", "--set", "store.path=features/scratch.zarr")
    found = succeed(folder, "store", "diff", "features/demo.zarr", "features/scratch.zarr")
    assert found["equal"] is True


def test_a_pool_that_no_encoder_has_is_refused() -> None:
    for before, pool in ((1, 12), (2, 2), (2, 6), (4, 3)):
        _refuse_other_steps(before, pool)
    with pytest.raises(ConfigError, match=r"pool of 2 after one of 3 averages in other steps than one of 6.*pool=6"):
        _refuse_other_steps(3, 2)


def test_a_converted_store_equals_one_extracted_so(folder: Path) -> None:
    coarser = ("--set", "encoder.pool=8", "--set", "encoder.taps=[neck]", "--set", "store.path=features/extracted.h5")
    succeed(folder, "extract", "-c", "tiny.yaml", *coarser)
    converting = ("features/demo.zarr", "features/converted.h5", "--tap", "neck", "--pool", "2")
    assert succeed(folder, "store", "convert", *converting)["written"] == "yes"
    assert succeed(folder, "store", "convert", *converting)["written"] == "no, it was there already"
    assert succeed(folder, "store", "diff", "features/extracted.h5", "features/converted.h5")["equal"] is True
    smaller = ("extract", "-c", "tiny.yaml", "--set", "data.count=30", "--set", "data.path=data/fewer")
    succeed(folder, "prepare", *smaller[1:])
    succeed(folder, *smaller, "--set", "store.path=features/fewer.zarr")
    assert succeed(folder, "store", "convert", "features/fewer.zarr", "features/again.zarr")["rows"] == 30
    updated = succeed(folder, "store", "convert", "features/demo.zarr", "features/again.zarr")
    assert (updated["rows"], updated["written"]) == (48, "yes")
    theirs = {"key": bytes(16), "mapping": folder / "who.csv"}
    cache.pseudonymise_store(folder / "features/fewer.zarr", folder / "features/theirs.zarr", **theirs).close()
    assert "none of the 48 that would take their place is among them" in complaint(
        folder, "store", "convert", "features/demo.zarr", "features/theirs.zarr", status=1
    )
    assert "does not divide" in complaint(
        folder, "store", "convert", "features/demo.zarr", "features/x.zarr", "--pool", "3", status=2
    )


def test_inspect_counts_and_names(folder: Path) -> None:
    found = succeed(folder, "store", "inspect", "features/demo.zarr", "-c", "tiny.yaml")
    assert found["rows"] == 48
    assert sum(n for by_class in found["counts"].values() for n in by_class.values()) == 48


def test_a_store_travels_without_names_and_with_labels(folder: Path) -> None:
    options = ("-c", "tiny.yaml", "--pseudonymise", "home/key", "--with-labels")
    report = succeed(folder, "store", "push", "features/demo.zarr", folder / "share/demo.zarr", *options)
    with (folder / report["mapping_stays_here"]).open() as file:
        mapping = {row["id"]: row["pseudonym"] for row in csv.DictReader(file)}
    succeed(folder, "store", "pull", folder / "share/demo.zarr", "features/theirs.zarr")
    with (
        cache.open_store(folder / "features/demo.zarr") as ours,
        cache.open_store(folder / "features/theirs.zarr") as theirs,
    ):
        assert theirs.ids == tuple(sorted(mapping[name] for name in ours.ids))
        at = [theirs.ids.index(mapping[name]) for name in ours.ids]
        assert (theirs.read(at)["neck"] == ours.read(range(len(at)))["neck"]).all()
        assert theirs.labels is not None
    sent = b"".join(p.read_bytes() for p in (folder / "share").rglob("*") if p.is_file())
    assert not [name for name in mapping if name.encode() in sent]


def test_the_key_and_the_mapping_stay_out_of_every_store(folder: Path) -> None:
    before = digests(folder / "features")
    for key in ("features/demo.zarr/key", "features/demo.pseudonymous.zarr/key", "share/demo.zarr/key"):
        said = complaint(
            folder, "store", "push", "features/demo.zarr", "share/demo.zarr", "--pseudonymise", key, status=2
        )
        assert f"{key} would be sent along inside" in said
        assert "keep the key and the mapping elsewhere" in said
    assert digests(folder / "features") == before
    assert not (folder / "share").exists()


def test_a_key_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _key(tmp_path / "home" / "key")
    assert not list((tmp_path / "home").iterdir())
    secret = _key(tmp_path / "home" / "key")
    assert len(secret) == KEY_BYTES
    assert stat.S_IMODE((tmp_path / "home" / "key").stat().st_mode) == 0o600
    assert _key(tmp_path / "home" / "key") == secret


def test_a_url_is_no_place_to_write_a_store(folder: Path) -> None:
    for command in (
        ("store", "convert", "features/demo.zarr", "s3://bucket/demo.zarr"),
        ("store", "pull", "share/demo.zarr", "s3://bucket/demo.zarr"),
    ):
        said = complaint(folder, *command, status=1)
        assert "s3://bucket/demo.zarr is a URL" in said
        assert "name a local path, and push that store" in said
    said = complaint(folder, "extract", "-c", "tiny.yaml", "--set", "store.path=s3://bucket/demo.zarr", status=2)
    assert "store.path: got 's3://bucket/demo.zarr', expected a path of this machine, and this is a URL" in said
    assert not (folder / "s3:").exists()
