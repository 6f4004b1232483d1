"""Rows are made when they are looked at, and what was found out once is not asked for again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cache
from pipeline.data import scan as scanning
from pipeline.data.scan import memory_of, remembered, scan
from pipeline.extract.plan import Contents, Rows, unchanged
from pipeline.progress import silent

from .fakes import CountingEncoder
from .pictures import Pictures, picture, pictures
from .test_extract import run


def test_rows_name_the_readable_samples_in_order(tmp_path: Path) -> None:
    source = pictures(5)
    source.images["002.png"] = b"no image"
    seen = scan(source.dataset(), tmp_path / "memory.npz")
    rows = Rows(seen)
    assert [row.id for row in rows] == rows.ids == ["000.png", "001.png", "003.png", "004.png"]
    assert [rows[i] for i in range(len(rows))] == list(rows)
    assert rows[1:3] == list(rows)[1:3]
    assert rows[2].digest == seen.digests[3].tobytes()


def test_a_writer_holds_no_copy_of_the_rows(tmp_path: Path) -> None:
    rows = Rows(scan(pictures(3).dataset(), tmp_path / "memory.npz"))
    taps = {"neck": cache.TapSpec(1, 2, 2, "float16")}
    with cache.create_store(tmp_path / "s.zarr", fingerprint=cache.Fingerprint({}), taps=taps, rows=rows) as writer:
        assert writer.rows is rows


def test_a_stopped_scan_remembers_what_it_had_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "SAVE_EVERY_SECONDS", -1.0)
    source = pictures(20)

    def stop(task: str, done: int, total: int, **info: float | str) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(source.dataset(), tmp_path / "memory.npz", progress=stop)
    source.reads.clear()
    scan(source.dataset(), tmp_path / "memory.npz")
    assert sum(source.reads.values()) == 6


def test_whoever_waits_is_told_when_just_this_data_set_has_been_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an image cannot be read, which is never remembered; and not by a scan that was stopped."""
    monkeypatch.setattr(scanning, "SAVE_EVERY_SECONDS", -1.0)
    source, memory, told = pictures(5), tmp_path / "memory.npz", list[bool]()

    def ask(has_looked: Callable[[], bool]) -> None:
        told.append(has_looked())

    def stop(task: str, done: int, total: int, **info: float | str) -> None:
        if done == total:
            raise KeyboardInterrupt

    source.images["002.png"] = b"no image"
    with pytest.raises(KeyboardInterrupt):
        scan(source.dataset(), memory, wait=ask, progress=stop)
    scan(source.dataset(), memory, wait=ask)
    scan(source.dataset(), memory, wait=ask)
    source.images["002.png"] = picture(9)
    scan(source.dataset(), memory, wait=ask)
    scan(source.dataset(), memory, wait=ask)
    assert told == [False, False, True, False, True]


def test_images_are_kept_for_the_encoder_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "KEEP_BYTES", 4 * (picture(0).nbytes + 256))
    assert len(scan(pictures(6).dataset(), tmp_path / "memory.npz")._kept) == 4


def spoil_images(source: Pictures, store: Path) -> None:
    source.images["001.png"] = picture(99)


def spoil_order(source: Pictures, store: Path) -> None:
    source.images = dict(reversed(source.images.items()))


def spoil_interrupted(source: Pictures, store: Path) -> None:
    store.with_name(store.name + ".partial").mkdir()


def spoil_store(source: Pictures, store: Path) -> None:
    (store / "zarr.json").write_text("{}")


def spoil_memory(source: Pictures, store: Path) -> None:
    memory_of(store).write_bytes(b"no memory")


def spoil_memory_wholly(source: Pictures, store: Path) -> None:
    memory_of(store).write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [None, spoil_images, spoil_order, spoil_interrupted, spoil_store, spoil_memory, spoil_memory_wholly],
    ids=lambda spoil: getattr(spoil, "__name__", "nothing"),
)
def test_only_a_plain_yes_counts_as_unchanged(tmp_path: Path, spoil: object) -> None:
    source, encoder, path = pictures(4), CountingEncoder(), tmp_path / "s.zarr"
    run(source, encoder, path)
    if callable(spoil):
        spoil(source, path)
    dataset = source.dataset()
    known = remembered(dataset, memory_of(path))
    digests = known.digests if known.known.all() else None
    wanted = Contents(encoder.fingerprint(), encoder.taps, {})
    assert unchanged(dataset, path, wanted, digests, silent) is (spoil is None)
    for other in ({"encoder": {"encoder": "other"}}, {"dtype": "float32"}, {"shapes": {"neck": (2, 4, 4)}}):
        assert not unchanged(dataset, path, replace(wanted, **other), digests, silent)


def test_a_sample_set_aside_is_tried_again_and_not_called_unchanged(tmp_path: Path) -> None:
    source = pictures(4)
    run(source, CountingEncoder(poison=2), tmp_path / "s.zarr")
    assert run(source, CountingEncoder(), tmp_path / "s.zarr").encoded == 1
