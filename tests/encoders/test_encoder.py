"""What the encoder promises besides its numbers: shapes, identity, thrift, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache.care import convert
from pipeline.encoders import ARCHITECTURES, Encoder, build_encoder, weights_sha256
from pipeline.encoders.sam import vit as sam_vit
from pipeline.encoders.sam.encoder import compiles
from pipeline.errors import ConfigError
from tests.encoders.seeded import image_like

Build = Callable[..., Encoder]
CHANGES: list[dict[str, Any]] = [{"input_px": 512}, {"precision": "bfloat16"}, {"preprocessing": "medsam"}]


@pytest.fixture
def build(demo_checkpoint: Path) -> Build:
    def build(taps: tuple[str, ...] = ("neck",), **arguments: Any) -> Encoder:
        return build_encoder("sam_demo", checkpoint=demo_checkpoint, taps=taps, **arguments)

    return build


def ones(encoder: Encoder, count: int = 1) -> tuple[Tensor, Tensor]:
    side = encoder.input_px
    return torch.ones(count, 3, side, side, dtype=torch.uint8), torch.tensor([[side, side]] * count)


@pytest.mark.parametrize(("input_px", "pool"), [(None, 1), (None, 4), (128, 2), (512, 8)])
def test_shapes_are_known_before_running(build: Build, input_px: int | None, pool: int) -> None:
    encoder = build(("neck", "patch", "block:3@vflip"), input_px=input_px, pool=pool)
    features = encoder.encode(*ones(encoder, 2))
    assert list(features) == list(encoder.taps) == ["neck", "patch", "block:3@vflip"]
    for tap, shape in encoder.taps.items():
        assert features[tap].shape == (2, *shape)
        assert features[tap].dtype == torch.float32
        assert features[tap].is_contiguous()


@pytest.mark.parametrize(("taps", "blocks"), [(["patch"], 0), (["early", "patch"], 2), (["block:4"], 5), (["neck"], 6)])
def test_nothing_after_the_deepest_tap_is_computed(
    build: Build, taps: list[str], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    neck = sam_vit._neck
    monkeypatch.setattr(sam_vit, "_neck", lambda *a: ran.append("neck") or neck(*a))
    encoder = build(tuple(taps))

    def counted(block: nn.Module, x: Tensor) -> Tensor:
        ran.append("block")
        return sam_vit.run_block(block, x)

    encoder._run_block = counted
    encoder.encode(*ones(encoder))
    assert ran == ["block"] * blocks + ["neck"] * (taps == ["neck"])


def test_the_fingerprint_names_everything_that_changes_the_numbers(build: Build, demo_checkpoint: Path) -> None:
    encoder = build(("early", "neck"), pool=2)
    assert encoder.fingerprint() == {
        "encoder": "sam_demo",
        "weights_sha256": weights_sha256(demo_checkpoint),
        "input_px": 256,
        "preprocessing": {
            "name": "sam",
            "version": 1,
            "mean": [123.675, 116.28, 103.53],
            "std": [58.395, 57.12, 57.375],
        },
        "precision": "float32",
        "taps": {"early": "block:1", "neck": "neck"},
        "views": {},
        "pool": 2,
        "arithmetic": 3,
    }
    others = [build(("early", "neck"), pool=2, **change) for change in CHANGES]
    fingerprints = [json.dumps(e.fingerprint()) for e in (encoder, build(("early", "neck")), *others)]
    assert len(set(fingerprints)) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("input_px", "pool"), [(256, 8), (192, 12)])
def test_a_pool_is_that_of_a_store_made_coarser(build: Build, input_px: int, pool: int, dtype: torch.dtype) -> None:
    fine, coarse = (build(("early", "neck"), input_px=input_px, pool=cells) for cells in (1, pool))
    prepared = fine.prepare(image_like(50, 64, 0))
    batch = prepared.pixels[None], torch.tensor([prepared.size])
    maps = fine.encode(*batch, dtype)
    for tap, found in coarse.encode(*batch, dtype).items():
        assert found.dtype == dtype
        assert found.numpy().tobytes() == convert._pool(maps[tap].numpy(), pool).tobytes()
        torch.testing.assert_close(found.float(), F.avg_pool2d(maps[tap].float(), pool), rtol=2e-3, atol=2e-3)


def assert_same_bits_at_every_place(encoder: Encoder) -> None:
    prepared = [encoder.prepare(image_like(50 + 9 * seed, 64, seed)) for seed in range(6)]
    pixels, sizes = torch.stack([item.pixels for item in prepared]), torch.tensor([item.size for item in prepared])
    features = encoder.encode(pixels, sizes)
    for places in range(1, len(prepared)):
        moved = encoder.encode(pixels.roll(places, 0), sizes.roll(places, 0))
        for tap, feature in features.items():
            assert torch.equal(moved[tap], feature.roll(places, 0)), (tap, places)


@pytest.mark.parametrize("change", [{}, {"precision": "bfloat16"}, {"input_px": 208}], ids=str)
def test_an_image_gives_the_same_bits_at_every_place_of_a_batch(build: Build, change: dict[str, Any]) -> None:
    """Else a row that is encoded again, beside others, would not be the row that it was."""
    assert_same_bits_at_every_place(build(("early", "middle", "neck"), **change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: kernels differ from those of a CPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_and_so_it_does_on_a_gpu(build: Build, precision: str) -> None:
    encoder = build(("early", "middle", "neck"), precision=precision).cuda()
    encoder.compile_blocks()
    assert_same_bits_at_every_place(encoder)


def test_blocks_are_compiled_only_where_that_can_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, compilers = torch.device("cuda"), {"gcc": "/usr/bin/gcc"}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", compilers.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert compiles(gpu)
    assert not compiles(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not compiles(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    compilers.clear()
    assert not compiles(gpu)
    monkeypatch.setenv("CC", "icx")
    assert compiles(gpu)


def test_threads_prepare_what_one_thread_prepares(build: Build) -> None:
    encoder = build()
    images = [image_like(40 + seed, 60, seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(encoder.prepare, images))
    for image, prepared in zip(images, together, strict=True):
        alone = encoder.prepare(image)
        assert prepared.size == alone.size
        assert torch.equal(prepared.pixels, alone.pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"taps": ("deep",)},
            "sam_demo has no tap 'deep'; valid taps: patch, early, middle, late, neck, and block:0 to",
        ),
        ({"taps": ("block:6",)}, "no tap 'block:6'.*block:0 to block:5"),
        ({"taps": ("block:-1",)}, "no tap 'block:-1'"),
        ({"taps": ("neck@left",)}, "tap 'neck@left' has no view 'left'; valid views: rot90,"),
        ({"taps": ("neck@identity",)}, "or none at all"),
        ({"taps": ("neck@",)}, "has no view ''"),
        ({"taps": ()}, "expected at least one"),
        ({"taps": ("neck", "neck")}, "each once"),
        ({"pool": 3}, "a pool of 3 does not divide the 16x16 grid of sam_demo; valid: 1, 2, 4, 8, 16"),
        ({"pool": 0}, "a pool of 0 does not divide"),
        ({"input_px": 250}, "an input of 250 px does not divide into patches of 16 px; try 256"),
        ({"input_px": 0}, "an input of 0 px"),
        ({"preprocessing": "clip"}, "there is no preprocessing 'clip'; valid: sam, medsam"),
        ({"precision": "float8"}, "there is no precision 'float8'; valid: float32, bfloat16, float16"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused_with_what_it_can(
    build: Build, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**arguments)


def test_an_unknown_encoder_is_refused_with_the_known_ones(demo_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no encoder 'sam_vit_x'; valid encoders: " + ", ".join(ARCHITECTURES)):
        build_encoder("sam_vit_x", checkpoint=demo_checkpoint, taps=["neck"])
