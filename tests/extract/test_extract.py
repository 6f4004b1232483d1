"""Stage one around the encoder: what is encoded, what is reused, what is set aside, and in what batches."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

import cache
from pipeline.cluster import Cluster, Done, Need
from pipeline.data import Image, Reading, pixel_digest, reading_rules
from pipeline.data.scan import Looker
from pipeline.errors import DataError
from pipeline.extract import on_ray
from pipeline.extract.extract import ExtractReport, _advice, extract
from pipeline.extract.on_node import Plain
from pipeline.extract.repair import repair

from .fakes import CountingEncoder, as_encoder
from .pictures import Pictures, picture, pictures


def run(source: Pictures, encoder: CountingEncoder, path: Path, **options: object) -> ExtractReport:
    return extract(source.dataset(), as_encoder(encoder), path, reading={}, **options)  # type: ignore[arg-type]


def values(path: Path) -> dict[str, float]:
    """What the store says of each sample: the grey value that its features were made from."""
    with cache.open_store(path) as store:
        rows = store.read(range(len(store)))
        assert (rows["neck"] == rows["neck"][:, :1, :1, :1]).all()
        assert (rows["early"][:, 0, 0, 0] == rows["neck"][:, 0, 0, 0]).all()
        return dict(zip(store.ids, rows["neck"][:, 0, 0, 0].tolist(), strict=True))


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_every_sample_gets_its_own_features(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"s.{suffix}"
    report = run(pictures(11), CountingEncoder(), path, batch_size=4)
    assert (report.rows, report.encoded, report.reused, report.set_aside) == (11, 11, 0, {})
    assert values(path) == {f"{i:03d}.png": float(i) for i in range(11)}
    with cache.open_store(path) as store:
        np.testing.assert_array_equal(store.extents, np.tile(np.float32([1.0, 0.5]), (11, 1)))


def test_an_unchanged_data_set_is_recognised_without_reading_a_pixel(tmp_path: Path) -> None:
    run(pictures(5), CountingEncoder(), tmp_path / "s.zarr")
    again, encoder = pictures(5), CountingEncoder()
    report = run(again, encoder, tmp_path / "s.zarr")
    assert (report.encoded, report.reused) == (0, 5)
    assert not again.reads
    run(again, encoder, tmp_path / "s.zarr", recheck=True)
    assert sum(again.reads.values()) == 5
    assert encoder.encoded == 0


def test_changed_and_new_images_are_encoded_and_no_others(tmp_path: Path) -> None:
    source = pictures(20)
    run(source, CountingEncoder(), tmp_path / "s.zarr")
    images = dict(source.images)
    images["003.png"] = picture(103)  # 2 changed
    images["004.png"] = picture(104)
    del images["010.png"], images["011.png"]  # 2 removed
    images["renamed.png"] = images.pop("012.png")  # 1 renamed
    images |= {"new.png": picture(200), "twin.png": picture(200)}  # 2 new, 1 of them a copy of the other
    encoder = CountingEncoder()
    report = run(Pictures(images), encoder, tmp_path / "s.zarr")
    assert encoder.encoded == report.encoded == 3
    assert values(tmp_path / "s.zarr") == {name: float(np.asarray(image)[0, 0, 0]) for name, image in images.items()}


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_the_store_of_another_data_set_is_not_swapped_out_in_silence(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"s.{suffix}"
    run(pictures(4), CountingEncoder(), path)
    others = Pictures({f"{i:03d}.png": picture(100 + i) for i in range(6)})
    with pytest.raises(DataError, match="holds 4 rows, and none of the 6 images of 'pictures' is among them"):
        run(others, CountingEncoder(), path)
    assert len(cache.open_store(path)) == 4
    assert run(others, CountingEncoder(), path, replace=True).encoded == 6
    others.images["000.png"] = picture(50)
    assert run(others, CountingEncoder(), path).encoded == 1


def test_a_store_that_tells_no_digests_is_not_swapped_out_in_silence(tmp_path: Path) -> None:
    run(pictures(4), CountingEncoder(), tmp_path / "mine.zarr")
    theirs = tmp_path / "theirs.zarr"
    cache.pseudonymise_store(tmp_path / "mine.zarr", theirs, key=bytes(16), mapping=tmp_path / "who.csv").close()
    with pytest.raises(DataError, match="holds 4 rows and tells no digests of their pixels, so all of them would go"):
        run(pictures(4), CountingEncoder(), theirs)
    assert run(pictures(4), CountingEncoder(), theirs, replace=True).encoded == 4


def test_images_are_decoded_once(tmp_path: Path) -> None:
    source = pictures(9)
    run(source, CountingEncoder(), tmp_path / "s.zarr")
    assert set(source.reads.values()) == {1}


def test_bad_images_are_set_aside_and_tried_again(tmp_path: Path) -> None:
    source = pictures(6)
    source.images["002.png"] = b"no image"
    report = run(source, CountingEncoder(poison=4), tmp_path / "s.zarr")
    assert report.rows == 4
    assert report.set_aside == {
        "002.png": "002.png: not an image",
        "004.png": "the encoder gave a feature that is not finite",
    }
    assert values(tmp_path / "s.zarr").keys() == {"000.png", "001.png", "003.png", "005.png"}
    source.images["002.png"] = picture(2)
    encoder = CountingEncoder()
    report = run(source, encoder, tmp_path / "s.zarr")
    assert (report.rows, report.set_aside) == (6, {})
    assert encoder.encoded == 2


def test_strict_stops_at_the_first_bad_image(tmp_path: Path) -> None:
    source = pictures(6)
    with pytest.raises(DataError, match=r"sample '004\.png': .*not finite"):
        run(source, CountingEncoder(poison=4), tmp_path / "s.zarr", strict=True)
    source.images["002.png"] = b"no image"
    with pytest.raises(DataError, match=r"002\.png: not an image"):
        run(source, CountingEncoder(), tmp_path / "t.zarr", strict=True)


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 images of 'pictures' can be read: a: not an image"):
        run(Pictures({"a": b"x", "b": b"y"}), CountingEncoder(), tmp_path / "s.zarr")


def test_a_batch_that_does_not_fit_is_halved_and_remembered(tmp_path: Path) -> None:
    encoder = CountingEncoder(limit=3)
    run(pictures(16), encoder, tmp_path / "s.zarr", batch_size=8)
    assert encoder.batches == [2] * 8
    assert values(tmp_path / "s.zarr") == {f"{i:03d}.png": float(i) for i in range(16)}
    more = CountingEncoder(limit=3)
    more_pictures = Pictures({f"m{i}": picture(100 + i) for i in range(4)})
    run(more_pictures, more, tmp_path / "s.zarr", batch_size=8, replace=True)
    assert more.batches == [2, 2]


def test_a_short_batch_is_filled_up_so_that_numbers_do_not_depend_on_its_size(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    run(pictures(5), encoder, tmp_path / "s.zarr", batch_size=4)
    assert encoder.batches == [4, 4]
    assert values(tmp_path / "s.zarr") == {f"{i:03d}.png": float(i) for i in range(5)}


class Telling(CountingEncoder):
    """Features that say how many images went in at once; 8 rows of 128 KiB fill a shard of 1 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = {"neck": (256, 16, 16)}

    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        super().encode(pixels, sizes, dtype)
        return {tap: torch.full((len(sizes), *shape), len(pixels), dtype=dtype) for tap, shape in self.taps.items()}


@pytest.mark.parametrize(
    ("batch_size", "batches"),
    [(None, [8] * 3), (8, [8] * 3), (7, [4] * 6), (3, [3] * 9), (2, [2] * 12)],
)
def test_the_network_sees_few_copies(tmp_path: Path, batch_size: int | None, batches: list[int]) -> None:
    """In batches of 256, the largest of this input, it would see 768 images for 24."""
    encoder = Telling()
    run(pictures(24), encoder, tmp_path / "s.zarr", batch_size=batch_size, shard_mib=1)
    assert encoder.batches == batches


def test_a_batch_has_its_size_however_many_images_wait(tmp_path: Path) -> None:
    """At first, with one more, after a stop, and in a repair: 20 rows are two full shards of 8, and 4."""
    path, encoder = tmp_path / "s.zarr", Telling()

    def stop(task: str, done: int, total: int, **info: float | str) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pictures(20), encoder, path, batch_size=7, shard_mib=1, progress=stop)
    run(pictures(20), encoder, path, batch_size=7, shard_mib=1)
    run(pictures(21), encoder, path, batch_size=7, shard_mib=2)  # a store keeps the rows of its shards
    file = path / "neck" / "c.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    before = len(encoder.batches)
    assert repair(pictures(21).dataset(), as_encoder(encoder), path, reading={}, batch_size=7).encoded == 1
    assert encoder.batches[before:] == [4]
    with cache.open_store(path) as store:
        assert (store.read(range(21))["neck"] == 4).all()


def test_an_image_that_never_fits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="too small"):
        run(pictures(2), CountingEncoder(limit=0), tmp_path / "s.zarr")


def test_an_image_that_changes_after_the_scan_is_not_stored_under_the_old_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.scan.KEEP_BYTES", 0)
    source = pictures(4)

    class Meddling(CountingEncoder):
        def prepare(self, image: object) -> object:  # type: ignore[override]
            source.images["003.png"] = picture(99)
            return super().prepare(image)  # type: ignore[arg-type]

    with pytest.raises(DataError, match=r"'003\.png': its image changed"):
        run(source, Meddling(), tmp_path / "s.zarr", batch_size=1, workers=1)


def test_not_enough_disk_stops_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    encoder = CountingEncoder()
    with pytest.raises(cache.NoSpaceError, match=r"make space, raise encoder\.pool, or list fewer taps"):
        run(pictures(4), encoder, tmp_path / "s.zarr")
    assert encoder.encoded == 0


def test_a_single_file_is_written_anew_as_a_whole_and_a_folder_only_where_it_changes(tmp_path: Path) -> None:
    needed: dict[str, float] = {}

    def listen(task: str, done: int, total: int, **info: float | str) -> None:
        if task == "plan":
            needed[path.suffix] = float(info["needed_mib"]) * 2**20 / ((2 * 16 + 4) * 2)  # in rows

    for path in (tmp_path / "s.h5", tmp_path / "s.zarr"):
        run(pictures(5), CountingEncoder(), path, batch_size=2)
        run(pictures(6), CountingEncoder(), path, batch_size=2, progress=listen)
    assert needed == {".h5": 6 + 6, ".zarr": 1}


def test_what_is_announced(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    plan: dict[str, object] = {}

    def listen(task: str, done: int, total: int, **info: float | str) -> None:
        said.append((task, done, total))
        if task == "plan":
            plan.update(info)

    run(pictures(5), CountingEncoder(), tmp_path / "s.zarr", batch_size=2, progress=listen)
    assert [s for s in said if s[0] == "encode"] == [("encode", done, 5) for done in (0, 2, 4, 5)]
    assert (plan["encode"], plan["reuse"]) == (5, 0)
    assert plan["needed_mib"] == 5 * (2 * 16 + 4) * 2 / 2**20


class SlowPictures(Pictures):
    """Takes its time over each image."""

    def read(self, index: int) -> Image:
        time.sleep(0.1)
        return super().read(index)


def test_a_starved_encoder_is_told_with_what_to_change_and_a_busy_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.scan.KEEP_BYTES", 0)
    slow = SlowPictures(pictures(14).images)
    report = run(slow, CountingEncoder(), tmp_path / "slow.zarr", workers=1, batch_size=1)
    assert re.match(r"the encoder spent \d+ s on 'wait for decode' against \d+ s of work", report.advice)
    assert "raise resources.workers above 1" in report.advice
    assert run(pictures(14), CountingEncoder(), tmp_path / "fast.zarr").advice == ""


def test_a_slow_disk_is_told_too() -> None:
    assert "faster disk" in _advice({"encode": 10.0, "wait for write": 5.0}, 2)
    assert _advice({"encode": 100.0, "wait for write": 5.0, "wait for decode": 5.0}, 2) == ""


def test_the_report_says_where_the_time_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.scan.KEEP_BYTES", 0)
    report = run(SlowPictures(pictures(4).images), CountingEncoder(), tmp_path / "s.zarr", workers=2)
    assert report.seconds["decode"] >= 0.4  # of two threads together
    assert 0 < report.seconds["write"] < report.seconds["total"]
    parts = ("scan", "wait for decode", "encode", "wait for write", "commit")
    assert report.seconds["scan"] >= 0.2
    assert sum(report.seconds[part] for part in parts) <= report.seconds["total"]


def test_files_read_by_another_rule_are_another_store(tmp_path: Path) -> None:
    source, encoder, path = pictures(2), as_encoder(CountingEncoder()), tmp_path / "s.zarr"
    extract(source.dataset(), encoder, path, reading=reading_rules())
    with pytest.raises(cache.FingerprintMismatchError, match=r"reading\.depth is 'full' there and 'percentile' here"):
        extract(source.dataset(), encoder, path, reading=reading_rules(Reading("percentile")))


class FarPictures(Pictures):
    """Each answer comes once four are asked for at the same time."""

    meeting = threading.Barrier(4)

    def read(self, index: int) -> Image:
        self.meeting.wait(timeout=5)
        return super().read(index)


def test_a_node_waits_for_a_server_in_as_many_threads_as_a_machine_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    source = pictures(8)
    source.images["002.png"] = b"torn"
    far = FarPictures(source.images)

    class Here:
        """A pool whose worker is this process."""

        def __init__(self, make: Callable[[], Looker]) -> None:
            self.work = make()

        def map(self, items: Iterable[tuple[int, ...]], **options: object) -> Iterator[Done[object, object]]:
            yield from (Done(item, self.work(item), "here", 0.0) for item in [tuple(i for item in items for i in item)])

    @contextmanager
    def hired(cluster: object, make: Callable[[], Looker], **options: object) -> Iterator[Here]:
        yield Here(make)

    monkeypatch.setattr(on_ray, "hired", hired)
    monkeypatch.setattr(on_ray, "_read_here", lambda dataset, index, reason, node: DataError(reason))
    on = on_ray.OnRay(cast("Cluster", None), cast("Plain", None), Need(), threads=4)
    found = {seen.index: seen for seen in on.look(far.dataset(), range(8))}
    assert str(found.pop(2).error) == "002.png: not an image"
    assert {index: seen.digest for index, seen in found.items()} == {
        index: pixel_digest(picture(index)) for index in (0, 1, 3, 4, 5, 6, 7)
    }
