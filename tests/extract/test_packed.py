"""Stage one into int8 and bfloat16: the store that a conversion of the plain one gives, and whose numbers predict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import cache
from pipeline.extract.extract import extract
from pipeline.extract.plan import Contents
from pipeline.extract.repair import repair
from pipeline.stages import stores
from tests.extract.fakes import CountingEncoder, as_encoder
from tests.extract.pictures import Pictures, pictures

READING = {"version": 1}


class Uneven(CountingEncoder):
    """Maps whose cells differ, so that rounding shows."""

    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        found = super().encode(pixels, sizes, torch.float32)
        return {
            tap: (value * torch.linspace(-1.3, 1, value[0].numel()).reshape(value[0].shape)).to(dtype)
            for tap, value in found.items()
        }


def made(path: Path, dtype: str, images: Pictures, poison: int = -1) -> Path:
    encoder = as_encoder(Uneven(poison=poison))
    extract(images.dataset(), encoder, path, reading=READING, dtype=dtype, batch_size=4)
    return path


@pytest.mark.parametrize(("packed", "plain"), [("int8", "float16"), ("bfloat16", "float32")])
def test_an_extraction_is_the_conversion_of_the_plain_one(packed: str, plain: str, tmp_path: Path) -> None:
    images = pictures(9)
    direct = made(tmp_path / "direct.zarr", packed, images)
    source = made(tmp_path / "plain.zarr", plain, images)
    report = stores.convert(source, tmp_path / "converted.zarr", lambda *args, **more: None, dtype=packed)
    assert cache.info(direct).version == cache.info(tmp_path / "converted.zarr").version
    assert report["rounding_error"] == cache.info(direct).rounding
    assert cache.info(direct).fingerprint.fields["dtype"] == packed
    sizes = Contents({}, Uneven().taps, READING, packed).row_bytes
    assert sizes == sum(array.row_bytes for array in cache.open_store(direct).arrays.values())


def test_a_conversion_back_is_told_from_the_original(tmp_path: Path) -> None:
    source = made(tmp_path / "plain.zarr", "float16", pictures(5))
    whole, back = tmp_path / "whole.h5", tmp_path / "back.zarr"
    stores.convert(source, whole, lambda *args, **more: None, dtype="int8")
    stores.convert(whole, back, lambda *args, **more: None, dtype="float16")
    (difference,) = cache.info(source).fingerprint.differences(cache.info(back).fingerprint)
    assert (difference.field, difference.ours, difference.theirs) == ("dtype", "float16", "float16 of int8")
    numbers = cache.open_store(whole).read(range(5))
    for tap, values in cache.open_store(back).read(range(5)).items():
        np.testing.assert_array_equal(values, numbers[tap])


def test_damaged_scales_are_encoded_again(tmp_path: Path) -> None:
    images = pictures(6)
    path = made(tmp_path / "store.zarr", "int8", images, poison=3)
    assert cache.open_store(path).set_aside.keys() == {"003.png"}
    before = cache.info(path).version
    (file,) = (path / "neck.scale").glob("c.*")
    content = bytearray(file.read_bytes())
    content[1] ^= 1
    file.write_bytes(content)
    assert cache.verify(path)
    report = repair(images.dataset(), as_encoder(Uneven(poison=3)), path, reading=READING, batch_size=4)
    assert (report.encoded, cache.info(path).version, cache.verify(path)) == (1, before, ())


def test_a_small_first_tap_does_not_hide_what_the_store_was_made_as(tmp_path: Path) -> None:
    """Maps of few cells stay float16 in an int8 store."""

    class Small(Uneven):
        def __init__(self) -> None:
            super().__init__()
            self.taps = {"embedding": (9, 1, 1), "neck": (2, 4, 4)}

    images, path = pictures(6), tmp_path / "store.zarr"
    extract(images.dataset(), as_encoder(Small()), path, reading=READING, dtype="int8", batch_size=4)
    assert cache.open_store(path).taps["embedding"].dtype == "float16"
    before = cache.info(path).version
    (file,) = (path / "neck").glob("c.*")
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    report = repair(images.dataset(), as_encoder(Small()), path, reading=READING, batch_size=4)
    assert (report.encoded, cache.info(path).version) == (1, before)


def test_a_converted_store_is_repaired_by_converting_again(tmp_path: Path) -> None:
    images = pictures(5)
    source, back = made(tmp_path / "plain.zarr", "int8", images), tmp_path / "back.zarr"
    stores.convert(source, back, lambda *args, **more: None, dtype="float16")
    (file,) = (back / "neck").glob("c.*")
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    with pytest.raises(cache.StoreError, match="features are float16 of int8, which no encoder gives; repair"):
        repair(images.dataset(), as_encoder(Uneven()), back, reading=READING, batch_size=4)
