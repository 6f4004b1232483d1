"""SAM 2's encoder gives the features of transformers' own module, and says which files it wants where."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from pipeline.encoders import (
    build_encoder,
    fetch_weights,
    layers,
    make_recipe,
    weights_file,
    weights_sha256,
    write_untrained_encoder,
)
from pipeline.encoders.family import SAM_2
from pipeline.encoders.hiera import encoder as hiera
from pipeline.encoders.hiera.recipe import HIERAS, Hiera
from pipeline.encoders.preprocessing import normalise
from pipeline.encoders.recipe import Recipe
from pipeline.errors import CheckpointError, ConfigError, DataError
from tests.encoders.seeded import image_like, relative_error

SMALL = Hiera(
    "sam2_test", width=16, heads=1, blocks=(1, 2, 3, 2), global_blocks=(4,), background=5, neck=24, input_px=256
)
TAPS = ("patch", "early", "middle", "late", "neck", "block:3")
WHOLE = dict.fromkeys(TAPS, 1)  # no pool


def randomise(module: torch.nn.Module) -> None:
    """Give every parameter values under which it changes the output."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 or "pos_embed" in name:
            parameter.data = 0.1 * noise + float("norm" in name and name.endswith("weight"))
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small SAM 2 as transformers saves it."""
    model = transformers.Sam2Model(transformers.Sam2Config(vision_config=SMALL.settings))
    randomise(model)
    path = tmp_path_factory.mktemp("sam2")
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def official(folder: Path) -> Any:
    """transformers' own reading of the folder."""
    return transformers.Sam2Model.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()


@contextmanager
def hooked(vision: Any) -> Iterator[dict[str, Tensor]]:
    """Collect what flows between the official module's parts, as (B, C, h, w)."""
    seen: dict[str, Tensor] = {}
    blocks = vision.backbone.blocks
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(patch=inputs[0].permute(0, 3, 1, 2)))]
    for number, block in enumerate(blocks):

        def keep(_: object, __: object, out: Tensor, name: str = f"block:{number}") -> None:
            seen[name] = out.permute(0, 3, 1, 2)

        hooks.append(block.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def normalised(pixels: Tensor) -> Tensor:
    return normalise(pixels, torch.tensor([pixels.shape[2:]] * len(pixels)), "sam2")


@torch.no_grad()
def expected(official: Any, images: Tensor) -> dict[str, Tensor]:
    with hooked(official.vision_encoder) as seen:
        out = official.vision_encoder(images)
    stages = {"early": "block:2", "middle": "block:5", "late": "block:7"}
    return {**seen, **{tap: seen[block] for tap, block in stages.items()}, "neck": out.fpn_hidden_states[-1]}


def build(folder: Path, taps: tuple[str, ...] = TAPS, **change: Any) -> hiera.HieraEncoder:
    arguments = {"input_px": 256, "pool": dict.fromkeys(taps, 1), "preprocessing": "sam2", **change}
    recipe = Recipe(SMALL, taps, **arguments)
    return hiera.build(recipe, folder, "cpu")


def batch(encoder: hiera.HieraEncoder, count: int = 2) -> tuple[Tensor, Tensor]:
    prepared = [encoder.prepare(image_like(90, 60 + 40 * seed, seed)) for seed in range(count)]
    return torch.stack([one.pixels for one in prepared]), torch.tensor([one.size for one in prepared])


@pytest.mark.parametrize("shape", [(100, 150), (300, 120), (256, 256), (1, 700), (500, 256)])
def test_pixels_are_those_of_the_official_processor_bit_for_bit(folder: Path, shape: tuple[int, int]) -> None:
    image = image_like(*shape)
    image.flags.writeable = False  # as decoders give it
    kind = getattr(transformers, "Sam2ImageProcessor", None) or transformers.Sam2ImageProcessorFast  # before 5
    processor = kind(size={"height": 256, "width": 256})
    prepared = build(folder).prepare(image)
    assert prepared.size == (256, 256)  # squeezed, so that every cell is image
    theirs = processor(image.copy(), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert torch.equal(normalised(prepared.pixels[None]), theirs)


@pytest.mark.parametrize("input_px", [256, 160])  # windows that divide the grids, and some that do not
@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 3e-3)])
def test_taps_are_the_hidden_states_of_the_official_module(
    folder: Path, official: Any, input_px: int, precision: str, error: float
) -> None:
    encoder = build(folder, input_px=input_px, precision=precision)
    pixels, sizes = batch(encoder)
    features = encoder.encode(pixels, sizes)
    wanted = expected(official, normalised(pixels))
    assert list(features) == list(encoder.taps) == list(TAPS)
    for tap, found in features.items():
        assert found.shape == (2, *encoder.taps[tap]) == wanted[tap].shape
        assert relative_error(found, wanted[tap]) <= error, tap


def test_the_strides_of_the_five_taps_are_4_8_16_32_and_16() -> None:
    for name, architecture in HIERAS.items():
        taps = ("patch", "early", "middle", "late", "neck")
        recipe = Recipe(architecture, taps, 1024, dict.fromkeys(taps, 1), preprocessing="sam2")
        widths = [architecture.width * factor for factor in (1, 2, 4, 8)]
        sides = zip(taps, [*widths, 256], (256, 128, 64, 32, 64), strict=True)
        assert recipe.shapes == {tap: (width, side, side) for tap, width, side in sides}, name
        pooled = make_recipe(name, taps, pool=None)
        assert {shape[1:] for shape in pooled.shapes.values()} == {(16, 16)}
        assert pooled.fingerprint("")["pool"] == {"patch": 16, "early": 8, "middle": 4, "late": 2, "neck": 4}


def test_a_pool_counts_cells_of_the_coarsest_grid_and_averages_the_others_in_proportion(folder: Path) -> None:
    whole, pooled = build(folder), build(folder, pool=2)
    pixels, sizes = batch(whole)
    for tap, found in pooled.encode(pixels, sizes).items():
        assert found.shape[2:] == (4, 4)
        by_hand = F.adaptive_avg_pool2d(whole.encode(pixels, sizes)[tap], 4)
        torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_image_gives_the_same_bits_at_every_place_of_a_batch(folder: Path, precision: str) -> None:
    encoder = build(folder, precision=precision)
    pixels, sizes = batch(encoder, 3)
    features = encoder.encode(pixels, sizes)
    for places in (1, 2):
        for tap, moved in encoder.encode(pixels.roll(places, 0), sizes).items():
            assert torch.equal(moved, features[tap].roll(places, 0)), tap


def test_more_windows_than_a_kernel_takes_go_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build(folder)
    pixels, sizes = batch(encoder)
    features = encoder.encode(pixels, sizes)
    monkeypatch.setattr(layers, "_MOST_WINDOWS", 3)
    for tap, found in encoder.encode(pixels, sizes).items():
        torch.testing.assert_close(found, features[tap])


@pytest.mark.parametrize(
    ("taps", "blocks"), [(("patch",), 0), (("early", "patch"), 3), (("block:4",), 5), (("neck",), 8)]
)
def test_nothing_after_the_deepest_tap_is_computed(
    folder: Path, taps: tuple[str, ...], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    run_block = hiera.run_block
    monkeypatch.setattr(hiera, "run_block", lambda block, x: ran.append(block) or run_block(block, x))
    encoder = build(folder, taps)
    encoder.encode(*batch(encoder, 1))
    assert len(ran) == blocks


def test_a_view_is_the_encoding_of_the_turned_image(folder: Path) -> None:
    encoder = build(folder, ("neck", "neck@hflip", "early@rot90"))
    pixels, sizes = batch(encoder)
    features = encoder.encode(pixels, sizes)
    plain = build(folder, ("neck", "early"))
    assert torch.equal(features["neck@hflip"], plain.encode(pixels.flip(3), sizes)["neck"])
    assert torch.equal(features["early@rot90"], plain.encode(pixels.rot90(1, (2, 3)), sizes)["early"])


def test_the_fingerprint_names_everything_that_changes_the_numbers(folder: Path) -> None:
    encoder = build(folder, ("early", "neck@hflip"), pool=None)
    assert encoder.fingerprint() == {
        "encoder": "sam2_test",
        "weights_sha256": weights_sha256(folder / "model.safetensors"),
        "input_px": 256,
        "preprocessing": {"name": "sam2", "version": 1, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "precision": "float32",
        "taps": {"early": "block:2", "neck@hflip": "neck"},
        "views": {"neck@hflip": "hflip"},
        "pool": {"early": 2, "neck@hflip": 1},
        "arithmetic": 1,
    }


def test_the_family_lists_its_encoders_by_the_names_of_their_checkpoints() -> None:
    assert set(HIERAS) == set(SAM_2)
    assert weights_file("sam2_hiera_small", Path("facebook/sam2-hiera-small")).parts[:1] == ("facebook",)


def test_untrained_weights_are_drawn_from_a_seed_and_read_by_both(tmp_path: Path) -> None:
    name = "sam2.1_hiera_tiny"
    count = write_untrained_encoder(name, tmp_path / "a", seed=3)
    write_untrained_encoder(name, tmp_path / "b", seed=3)
    digests = [weights_sha256(weights_file(name, tmp_path / which)) for which in "ab"]
    assert digests[0] == digests[1]
    theirs = transformers.Sam2VisionModel.from_pretrained(tmp_path / "a", use_safetensors=True).eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    encoder = build_encoder(
        name, checkpoint=tmp_path / "a", taps=["late", "neck"], input_px=64, pool={"late": 1, "neck": 1}
    )
    pixels, sizes = encoder.prepare(image_like(64, 64)).pixels[None], torch.tensor([[64, 64]])
    with torch.no_grad():
        out = theirs(normalised(pixels))
    features = encoder.encode(pixels, sizes)
    assert relative_error(features["late"], out.last_hidden_state.permute(0, 3, 1, 2)) <= 1e-5
    assert relative_error(features["neck"], out.fpn_hidden_states[-1]) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"taps": ("deep",)}, "sam2.1_hiera_tiny has no tap 'deep'; valid taps: patch, early, middle, late, neck, and"),
        ({"taps": ("block:12",)}, "no tap 'block:12'.*block:0 to block:11"),
        ({"taps": ("neck@left",)}, "tap 'neck@left' has no view 'left'"),
        ({"taps": ()}, "expected at least one"),
        ({"input_px": 1000}, "an input of 1000 px does not divide into patches of 32 px; try 1024"),
        ({"pool": 3}, "a pool of 3 does not divide the 32x32 grid"),
        ({"precision": "float8"}, "there is no precision 'float8'"),
        ({"preprocessing": "medsam"}, "there is no preprocessing 'medsam'; valid: sam2"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused_with_what_it_can(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe("sam2.1_hiera_tiny", **{"taps": ("neck",), **arguments})


@pytest.mark.parametrize("shape", [(5, 5), (0, 5, 3), (5, 5, 4)])
def test_what_is_no_image_is_refused(folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected uint8|no pixel"):
        build(folder).prepare(np.zeros(shape, np.uint8))


def load(name: str, path: Path) -> None:
    build_encoder(name, checkpoint=path, taps=["neck"])


def test_a_folder_without_the_files_is_refused_with_what_goes_where(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        CheckpointError, match=r"no '.*model\.safetensors': put config\.json and model\.safetensors.*\.bin"
    ):
        load("sam2.1_hiera_tiny", tmp_path)


def test_weights_without_their_configuration_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"config\.json: there is none beside the weights"):
        load("sam2.1_hiera_tiny", tmp_path)
    for text in ("{", "[]", '{"model_type": "sam"}', '{"vision_config": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: no configuration of SAM 2"):
            load("sam2.1_hiera_tiny", tmp_path)


def test_another_encoders_folder_is_refused_with_its_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"not of sam2.1_hiera_tiny: hidden_size is 16 instead of 96.*like none of"
    ):
        load("sam2.1_hiera_tiny", folder)
    config = transformers.Sam2VisionConfig(**HIERAS["sam2_hiera_large"].settings)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"this looks like sam2.1_hiera_large or sam2_hiera_large"):
        load("sam2.1_hiera_tiny", tmp_path)


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["vision_encoder.neck.convs.1.bias"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not those of sam2_test: missing 1 \('neck\.convs\.1\.bias'\)"):
        build(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        build(tmp_path)


def test_a_name_on_the_hub_means_the_hubs_cache_and_fetches_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    named, short = Path("facebook/sam2.1-hiera-tiny"), Path("sam2.1_hiera_tiny")
    for checkpoint in (named, short):
        with pytest.raises(
            CheckpointError, match=r"or fetch 'facebook/sam2.1-hiera-tiny' from the Hugging Face hub with"
        ):
            load("sam2.1_hiera_tiny", checkpoint)
    snapshot = tmp_path / "models--facebook--sam2.1-hiera-tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--facebook--sam2.1-hiera-tiny" / "refs").mkdir()
    (tmp_path / "models--facebook--sam2.1-hiera-tiny" / "refs" / "main").write_text("abc")
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).write_bytes((folder / file).read_bytes())
    for checkpoint in (named, short):
        assert weights_file("sam2.1_hiera_tiny", checkpoint) == snapshot / "model.safetensors"
        assert fetch_weights("sam2.1_hiera_tiny", checkpoint) == snapshot / "model.safetensors"


def test_what_cannot_be_fetched_is_said_with_where_the_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_folder: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'facebook/sam2.1-hiera-tiny' cannot be fetched .*there is no") as error:
        fetch_weights("sam2.1_hiera_tiny", Path("sam2.1_hiera_tiny"))
    assert str(user_folder / "weights" / "sam2.1_hiera_tiny" / "model.safetensors") in str(error.value)


def test_an_encoders_own_name_is_a_folder_among_the_published_weights(folder: Path, user_folder: Path) -> None:
    place = user_folder / "weights" / "sam2.1_hiera_tiny"
    place.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (place / file).write_bytes((folder / file).read_bytes())
    assert weights_file("sam2.1_hiera_tiny", Path("sam2.1_hiera_tiny")) == place / "model.safetensors"


def test_no_torch_and_no_transformers_before_an_encoder_is_built(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline import encoders\n"
        "recipe = encoders.make_recipe('sam2.1_hiera_tiny', ('neck',))\n"
        f"file = encoders.weights_file('sam2.1_hiera_tiny', Path({str(folder)!r}))\n"
        "recipe.fingerprint(encoders.weights_sha256(file))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_without_the_extra_its_name_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="'sam2_test' needs the extra 'sam2'"):
        build(folder)


def test_a_folder_of_the_video_model_is_read_as_the_hub_has_it(tmp_path: Path, folder: Path, official: Any) -> None:
    config = transformers.Sam2VideoConfig(vision_config=SMALL.settings, memory_attention_num_layers=1)
    video = transformers.Sam2VideoModel(config)
    video.vision_encoder.load_state_dict(official.vision_encoder.state_dict())
    video.save_pretrained(tmp_path)
    encoder, whole = build(tmp_path), build(folder)
    for tap, found in encoder.encode(*batch(encoder)).items():
        assert torch.equal(found, whole.encode(*batch(whole))[tap])


def test_weights_of_the_vision_encoder_alone_do(folder: Path, tmp_path: Path, official: Any) -> None:
    official.vision_encoder.save_pretrained(tmp_path)
    encoder, whole = build(tmp_path), build(folder)
    for tap, found in encoder.encode(*batch(encoder)).items():
        assert torch.equal(found, whole.encode(*batch(whole))[tap])
    assert dataclasses.asdict(encoder._recipe) == dataclasses.asdict(whole._recipe)
