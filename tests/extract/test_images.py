"""Images beside the features: the pixels that stage two would make of the files, and a store of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cache
from pipeline.extract.repair import repair

from .fakes import CountingEncoder, as_encoder
from .pictures import Pictures
from .test_extract import run


def noise(count: int = 11) -> Pictures:
    """Images of many shapes; one occurs twice."""
    random = np.random.default_rng(0)
    shapes = [(8, 8), (30, 20), (20, 30), (16, 16)]
    images = {f"{i:03d}.png": random.integers(0, 256, (*shapes[i % 4], 3), np.uint8) for i in range(count)}
    images["twin.png"] = images["001.png"]
    return Pictures(images)


class AnyShape(CountingEncoder):
    """Takes images of any shape for their first pixel."""

    def prepare(self, image):
        return super().prepare(np.ascontiguousarray(np.broadcast_to(image[:1, :1], (8, 8, 3))))


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_each_row_has_its_image_resized(tmp_path: Path, suffix: str) -> None:
    source, path = noise(), tmp_path / f"s.{suffix}"
    report = run(source, AnyShape(limit=3), path, image_px=16)  # in batches that are halved on the way
    assert report.encoded == 11
    with cache.open_store(path) as store:
        assert store.taps["image"] == cache.TapSpec(3, 16, 16, "uint8")
        read = store.read(range(12))
    for row, image in enumerate(source.images.values()):
        assert isinstance(image, np.ndarray)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        expected = F.interpolate(pixels, size=(16, 16), mode="bilinear", antialias=True)[0]
        assert torch.equal(torch.from_numpy(read["image"][row]), expected)
        assert (read["neck"][row] == image[0, 0, 0]).all()


def test_the_fingerprint_tells_the_side(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    run(noise(), AnyShape(), path)
    with cache.open_store(path) as store:
        assert "image" not in store.fingerprint.fields
        assert cache.info(path).format_version == cache.FORMAT_VERSION - 1
    with pytest.raises(cache.FingerprintMismatchError, match="image"):
        run(noise(), AnyShape(), path, image_px=16)
    run(noise(), AnyShape(), path, image_px=16, replace=True)
    with pytest.raises(cache.FingerprintMismatchError, match=r"image\.side_px is 16 there and 24 here"):
        run(noise(), AnyShape(), path, image_px=24)
    again = noise()
    assert run(again, AnyShape(), path, image_px=16).reused == 12
    assert not again.reads


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_repair_restores_images(tmp_path: Path, suffix: str) -> None:
    source, path = noise(), tmp_path / f"s.{suffix}"
    run(source, AnyShape(), path, image_px=16)
    with cache.open_store(path) as store:
        needle = store.read([5], ["image"])["image"].tobytes()
    file = path if path.is_file() else path / "image" / "c.0.0.0.0"
    sound = file.read_bytes()
    at = sound.index(needle)
    file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    report = repair(source.dataset(), as_encoder(AnyShape()), path, reading={})
    assert report.encoded == 1
    assert file.read_bytes() == sound
    assert cache.verify(path) == ()


def test_progress_counts_the_bytes_of_images(tmp_path: Path) -> None:
    said = []

    def listen(task, done, total, **info):
        if task == "encode":
            said.append(info["mib"])

    run(noise(4), AnyShape(), tmp_path / "s.zarr", image_px=16, progress=listen)
    mib = ((2 * 4 * 4 + 1 * 2 * 2) * 2 + 3 * 16 * 16) / 2**20
    assert said[-1] == f"{4 * mib:.4g}/{4 * mib:.4g}"
