"""The size of batches: the largest that pays, found on a machine of which we know what pays; and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.scan import memory_of, scan
from pipeline.encoders import Encoder
from pipeline.extract import batch_size
from pipeline.extract.batch_size import BatchSize, evenly, largest_that_pays
from pipeline.extract.on_node import Job, NodeEncoder, Part, Plain, Size, SizeFor
from pipeline.extract.plan import Contents, Rows
from tests.ray.paint import Paint

from .fakes import CountingEncoder, as_encoder
from .pictures import pictures

MANY = 10**9
DOUBLED = [2**power for power in range(9)]


def machine(overhead: float, memory: int, tried: list[int] | None = None) -> Callable[[int], float]:
    """A device that takes `overhead` seconds a batch and one an image, and has room for `memory` images."""

    def seconds(images: int) -> float:
        if tried is not None:
            tried.append(images)
        if images > memory:
            raise torch.OutOfMemoryError
        return overhead + images

    return seconds


def sizes(tmp_path: Path, given: int | None = None, encoder: CountingEncoder | None = None) -> BatchSize:
    return BatchSize(as_encoder(encoder or CountingEncoder()), given, tmp_path / "s.zarr.batch.json")


@pytest.mark.parametrize(
    ("overhead", "memory", "found"),
    [
        (0.0, 1000, 8),  # nothing to gain
        (1.0, 1000, 32),  # 16 to 32 images: 1.0303 times as fast; 32 to 64: 1.015
        (1000.0, 1000, 256),  # every doubling pays
        (1000.0, 100, 64),  # until memory ends
        (1000.0, 3, 2),  # less than what is tried first
        (1000.0, 0, 1),
    ],
)
def test_the_largest_size_that_pays(overhead: float, memory: int, found: int) -> None:
    assert largest_that_pays(machine(overhead, memory), DOUBLED, 8) == found


def test_each_size_is_faster_by_three_percent_than_the_one_before() -> None:
    tried: list[int] = []
    seconds = machine(1.0, 1000, tried)
    chosen = largest_that_pays(seconds, DOUBLED, 2)
    speeds = {images: images / (1.0 + images) for images in tried}
    assert tried == [2 * 2**i for i in range(len(tried))]
    assert all(speeds[2 * b] >= 1.03 * speeds[b] for b in tried if 2 * b <= chosen)
    assert tried[-1] == 2 * chosen
    assert speeds[2 * chosen] < 1.03 * speeds[chosen]


def test_another_error_is_no_lack_of_memory() -> None:
    def breaks(images: int) -> float:
        message = "illegal instruction"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="illegal instruction"):
        largest_that_pays(breaks, DOUBLED, 8)


def test_a_size_that_a_kernel_refuses_is_too_large() -> None:
    def seconds(images: int) -> float:
        if images > 32:
            message = "Expected canUse32BitIndexMath(input) to be true"
            raise RuntimeError(message)
        return 1000.0 + images

    assert largest_that_pays(seconds, DOUBLED, 8) == 32


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),  # of pinned memory
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError(), False),
    ],
)
def test_who_was_refused_memory_is_told_by_what_it_says(error: BaseException, memory: bool) -> None:
    assert batch_size.out_of_memory(error) is memory


def test_what_was_found_is_taken_by_later_runs_of_this_encoder_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sizes(tmp_path)
    before = first.images
    first.search(MANY, machine(1000.0, 100))
    assert first.images == 64 != before
    tried: list[int] = []
    again = sizes(tmp_path)
    assert again.images == 64
    again.search(MANY, machine(1000.0, 100, tried))
    assert (again.images, tried) == (64, [])
    monkeypatch.setattr(CountingEncoder, "fingerprint", lambda self: {"encoder": "another"})
    assert sizes(tmp_path).images == before


def test_a_process_that_began_earlier_takes_over_what_the_first_one_found(tmp_path: Path) -> None:
    helper = sizes(tmp_path)
    sizes(tmp_path).search(MANY, machine(1000.0, 100))
    assert helper.images != 64
    helper.recall()
    assert helper.images == 64


def test_no_search_where_it_would_not_pay(tmp_path: Path) -> None:
    tried: list[int] = []
    sizes(tmp_path).search(100, machine(1.0, 1000, tried))
    sizes(tmp_path, given=7).search(MANY, machine(1.0, 1000, tried))
    sizes(tmp_path).search(MANY)  # on a CPU
    assert tried == []
    assert not (tmp_path / "s.zarr.batch.json").exists()


def test_memory_has_the_last_word_over_what_was_found_and_asked_for(tmp_path: Path) -> None:
    chosen = sizes(tmp_path)
    chosen.search(MANY, machine(1000.0, 100))
    assert chosen.halve()
    assert chosen.images == sizes(tmp_path).images == sizes(tmp_path, given=200).images == 32
    assert sizes(tmp_path, given=5).images == 5
    single = sizes(tmp_path, given=1)
    assert not single.halve()


@given(st.integers(1, 3000), st.integers(1, 300))
def test_batches_of_a_shard_are_as_few_and_as_equal_as_can_be(rows: int, most: int) -> None:
    images = evenly(most, rows)
    batches = -(-rows // images)
    assert 1 <= images <= most
    assert batches == -(-rows // most)
    assert images * batches - rows < batches  # copies that fill up: less than one a batch
    assert evenly(images, rows) == images  # so what is remembered may be either


@pytest.mark.parametrize(("shard_rows", "images"), [(409, 205), (256, 256), (257, 129), (25, 25), (1, 1), (65536, 256)])
def test_a_full_shard_makes_equal_batches(tmp_path: Path, shard_rows: int, images: int) -> None:
    chosen = sizes(tmp_path)
    chosen.fit(shard_rows)
    assert (chosen.most, chosen.images) == (256, images)


@pytest.mark.parametrize(
    ("shard_rows", "tried", "images"),
    [(409, [59, 103, 205], 205), (25, [25], 25), (100, [50, 100], 100), (65536, [64, 128, 256], 256)],
)
def test_the_search_tries_the_batches_of_a_full_shard(
    tmp_path: Path, shard_rows: int, tried: list[int], images: int
) -> None:
    found: list[int] = []
    chosen = sizes(tmp_path)
    chosen.fit(shard_rows)
    chosen.search(MANY, machine(1000.0, 1000, found))
    assert (found, chosen.images) == (tried, images)
    later = sizes(tmp_path)
    later.fit(shard_rows)
    assert later.images == images


def test_what_an_older_version_remembers_is_a_bound(tmp_path: Path) -> None:
    sizes(tmp_path).search(MANY, machine(1000.0, 1000))
    assert json.loads((tmp_path / "s.zarr.batch.json").read_text())["chosen"] == 256  # as it was without shards
    again = sizes(tmp_path)
    again.fit(409)
    assert again.images == 205


def test_a_part_of_a_shard_is_halved_not_the_bound(tmp_path: Path) -> None:
    chosen = sizes(tmp_path, given=200)
    chosen.fit(25)
    taken = [chosen.images]
    while chosen.halve():
        taken.append(chosen.images)
    assert taken == [25, 13, 7, 4, 2, 1]
    assert sizes(tmp_path).images == 1


def test_a_node_without_enough_memory_forgets_nothing_that_was_found(tmp_path: Path) -> None:
    source, paint = pictures(2), Paint(limit=40)
    contents = Contents(paint.fingerprint(), paint.taps, {})
    job = Job(source, cast("Plain", paint), contents, (), 1, "cpu", None, False)
    alone = BatchSize(cast("Encoder", paint.build(None, "cpu")), None, tmp_path / "s.zarr.batch.json")
    alone.search(MANY, machine(1000.0, 100))
    known = (tmp_path / "s.zarr.batch.json").read_text()
    indices, names, digests = Rows(scan(source.dataset(), memory_of(tmp_path / "s.zarr"))).samples_of([0, 1])
    lowered = NodeEncoder(job)(Part(0, 0, indices, names, digests, images=64, memory=known))
    assert alone.halve()
    assert isinstance(lowered, Size)
    assert (lowered.images, lowered.memory) == (32, (tmp_path / "s.zarr.batch.json").read_text())
    assert json.loads(lowered.memory)["chosen"] == 64
    asked = NodeEncoder(job)(SizeFor(MANY, 8, lowered.memory))
    assert isinstance(asked, Size)
    assert (asked.images, asked.memory) == (32, lowered.memory)


@pytest.mark.parametrize("spoilt", ["", "[]", "{}", '{"device": "cpu", "limit": "many"}'])
def test_a_spoilt_memory_is_as_good_as_none(tmp_path: Path, spoilt: str) -> None:
    expected = sizes(tmp_path).images
    (tmp_path / "s.zarr.batch.json").write_text(spoilt)
    assert sizes(tmp_path).images == expected


def test_smaller_inputs_take_as_many_more_as_they_have_fewer_pixels(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    for side, images in ((1536, 1), (1024, 1), (512, 4), (256, 16), (16, batch_size.LARGEST_BATCH)):
        encoder.input_px = side
        assert sizes(tmp_path, encoder=encoder).images == images


def test_a_larger_input_takes_fewer_on_a_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CountingEncoder()
    monkeypatch.setattr(encoder, "device", torch.device("cuda"))
    for side, images in ((2048, 4), (1536, 7), (1024, 16), (512, 64), (256, 256)):
        encoder.input_px = side
        assert sizes(tmp_path, encoder=encoder).images == images


@pytest.mark.parametrize(("side_px", "images"), [(1536, 8_889), (1024, 20_000), (512, 80_000)])
def test_a_search_begins_with_as_many_pixels_whatever_the_input(tmp_path: Path, side_px: int, images: int) -> None:
    tried: list[int] = []
    encoder = CountingEncoder()
    encoder.input_px = side_px
    chosen = sizes(tmp_path, encoder=encoder)
    chosen.search(images - 1, machine(1.0, 1000, tried))
    assert not tried
    chosen.search(images, machine(1.0, 1000, tried))
    assert tried


def test_the_file_says_what_it_is_about(tmp_path: Path) -> None:
    chosen = sizes(tmp_path)
    chosen.search(MANY, machine(1000.0, 100))
    assert json.loads((tmp_path / "s.zarr.batch.json").read_text()).keys() == {"device", "encoder", "chosen", "limit"}
