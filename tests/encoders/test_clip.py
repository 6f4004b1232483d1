"""CLIP's image towers as encoders: open_clip's own transform and `encode_image` are the oracle, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from pipeline import clip, encoders
from pipeline.encoders.clip.recipe import tower_named
from pipeline.errors import CheckpointError, ConfigError, DataError

VIT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 5},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
MAPS = ("patch", "early", "middle", "late", "neck", "block:1", "embedding")


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> tuple[str, Path]:
    """A small ViT in a folder of its own, with colours of its own, and its weights."""
    folder = tmp_path_factory.mktemp("vit")
    scale = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": VIT, "preprocess_cfg": scale}))
    name = f"clip:local-dir:{folder}"
    assert encoders.write_untrained_encoder(name, folder / "open_clip_model.safetensors", seed=1) > 10_000
    return name, Path("own")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[str, Path]:
    file = tmp_path_factory.mktemp("demo") / "clip_demo.safetensors"
    encoders.write_untrained_encoder("clip:demo", file, seed=3)
    return "clip:demo", file


def build(named: tuple[str, Path], taps=("embedding",), **options) -> encoders.Encoder:
    return encoders.build_encoder(
        named[0], checkpoint=encoders.present_weights(*named), taps=taps, **{"pool": None, **options}
    )


def official(named: tuple[str, Path], mode: str, side: int | None = None):
    """open_clip's model and its own transform."""
    wanted = clip.architecture(named[0])
    model = clip.build(wanted, encoders.weights_file(*named), image_px=side)
    how = clip.resizing(named[0])["interpolation"]
    transform = open_clip.image_transform(
        side or wanted.image_px, is_train=False, mean=wanted.mean, std=wanted.std, interpolation=how, resize_mode=mode
    )
    return model, transform


def images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def encode(encoder: encoders.Encoder, of: list[np.ndarray]) -> dict[str, torch.Tensor]:
    prepared = [encoder.prepare(image) for image in of]
    return encoder.encode(torch.stack([p.pixels for p in prepared]), torch.tensor([p.size for p in prepared]))


@pytest.mark.parametrize("which", ["vit", "demo"])
@pytest.mark.parametrize(("preprocessing", "mode"), [(None, "shortest"), ("clip_whole", "squash")])
def test_image_features_are_those_of_open_clip_bit_for_bit(which, preprocessing, mode, request):
    named = request.getfixturevalue(which)
    encoder, (model, transform) = build(named, preprocessing=preprocessing), official(named, mode)
    of = images((90, 131), (64, 64), (200, 33))
    expected = torch.stack([transform(Image.fromarray(image)) for image in of])
    found = encode(encoder, of)["embedding"]
    assert encoder.taps["embedding"] == found.shape[1:] == (model.visual.output_dim, 1, 1)
    with torch.no_grad():
        assert torch.equal(found.flatten(1), model.encode_image(expected))
    assert not torch.allclose(found.norm(dim=1), torch.ones(3, 1, 1))  # as they are: no length is taken away


def test_maps_of_a_vit_are_its_blocks(vit):
    encoder, (model, transform) = build(vit, MAPS, preprocessing="clip_whole"), official(vit, "squash")
    (image,) = images((40, 70))
    found = encode(encoder, [image])
    kept = {}
    for number, block in enumerate(model.visual.transformer.resblocks):
        block.register_forward_hook(lambda _, __, out, number=number: kept.__setitem__(number, out[:, 1:]))
    with torch.no_grad():
        model.encode_image(transform(Image.fromarray(image))[None])
    for tap, number in {"early": 1, "middle": 2, "late": 4, "block:1": 1}.items():
        assert torch.equal(found[tap], kept[number].transpose(1, 2).unflatten(2, (4, 4))), tap
    assert {tap: map.shape[1:] for tap, map in found.items()} == dict(encoder.taps)
    assert encoder.taps["neck"] == (24, 4, 4)
    with torch.no_grad():
        last = model.visual.ln_post(kept[4]) @ model.visual.proj
    torch.testing.assert_close(found["neck"], last.transpose(1, 2).unflatten(2, (4, 4)))


def test_another_side_and_a_turned_view_are_open_clips_too(vit):
    encoder, (model, transform) = (
        build(vit, ("embedding", "embedding@hflip"), input_px=48),
        official(vit, "shortest", 48),
    )
    (image,) = images((60, 60))
    found = encode(encoder, [image])
    turned = transform(Image.fromarray(image)).flip(2)
    with torch.no_grad():
        assert torch.equal(found["embedding@hflip"].flatten(1), model.encode_image(turned[None]))


def test_a_pool_leaves_the_image_feature_alone(vit):
    taps = encoders.make_recipe(vit[0], ("late", "embedding"), None, 2, "float32", "clip_whole").shapes
    assert dict(taps) == {"late": (32, 2, 2), "embedding": (24, 1, 1)}


def test_bfloat16_is_near_and_recorded(vit):
    exact, rough = build(vit), build(vit, precision="bfloat16")
    of = images((40, 40), (50, 41))
    a, b = (encode(encoder, of)["embedding"] for encoder in (exact, rough))
    assert not torch.equal(a, b)
    assert (a - b).norm() < 0.05 * a.norm()
    assert (exact.fingerprint()["precision"], rough.fingerprint()["precision"]) == ("float32", "bfloat16")


def test_the_fingerprint_has_all_that_the_features_depend_on(vit, demo):
    for named in (vit, demo):
        encoder = build(named)
        said = encoder.fingerprint()
        assert said == encoders.make_recipe(named[0], ("embedding",), None, None).fingerprint(
            encoders.weights_sha256(encoders.weights_file(*named))
        )
        assert said["preprocessing"].keys() == {"name", "version", "mean", "std", "interpolation", "resize_mode"}
    assert build(vit).fingerprint()["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert build(vit).fingerprint()["preprocessing"]["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("name", "steps"), [("clip:ViT-B-32", 12), ("clip:RN50", 0), ("clip:ViT-B-16-SigLIP", 0), ("clip:coca_ViT-B-32", 0)]
)
def test_every_kind_of_tower_has_its_image_feature_and_a_plain_vit_its_maps(name, steps):
    tower = tower_named(name)
    assert tower.steps == steps
    assert list(tower.named_depths)[-1] == "embedding"
    assert encoders.make_recipe(name, ("embedding",)).shapes["embedding"] == (tower.embedding, 1, 1)
    assert encoders.make_recipe(name, ("embedding",)).fingerprint("")["preprocessing"]["resize_mode"] == (
        "squash" if "SigLIP" in name else "shortest"
    )
    if steps:
        taps = ("patch", "early", "middle", "late", "neck")
        shapes = encoders.make_recipe(name, taps, preprocessing="clip_whole").shapes
        assert shapes["late"] == (768, 7, 7)
        assert (
            encoders.make_recipe(name, taps, preprocessing="clip_whole").fingerprint("")["taps"]["early"] == "block:3"
        )


def test_what_cannot_be_is_refused_with_the_remedy(vit, demo, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"'late' is a map.* set encoder.preprocessing to clip_whole"):
        encoders.make_recipe(vit[0], ("late",))
    with pytest.raises(ConfigError, match=r"clip:demo has no tap 'late'; valid taps: embedding$"):
        encoders.make_recipe("clip:demo", ("late",))
    with pytest.raises(ConfigError, match=r"no CLIP 'clip:ViT-B-33': the nearest are clip:ViT-B-32"):
        encoders.make_recipe("clip:ViT-B-33", ("embedding",))
    with pytest.raises(ConfigError, match=r"there is no encoder 'klip:demo'; .*clip:NAME.*did you mean 'clip:demo'"):
        encoders.family_of("klip:demo")
    with pytest.raises(CheckpointError, match=r"no file '.*none.safetensors': run `pipeline prepare`"):
        encoders.present_weights("clip:demo", tmp_path / "none.safetensors")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"The weights 'openai' of 'clip:ViT-B-32' are not at"):
        encoders.present_weights("clip:ViT-B-32", Path("openai"))
    with pytest.raises(CheckpointError, match=r"is of another model"):
        encoders.build_encoder("clip:demo", checkpoint=encoders.weights_file(*vit), taps=["embedding"])
    with pytest.raises(DataError, match=r"expected uint8"):
        build(demo).prepare(np.zeros((4, 4), np.uint8))


def test_published_weights_of_another_form_are_refused(demo, monkeypatch):
    mine, another = clip.architecture("clip:demo"), clip.architecture("clip:RN50")
    monkeypatch.setattr(clip, "tags", lambda name: ["openai", "laion"])
    monkeypatch.setattr(clip, "weights_file", lambda name, weights: demo[1] if weights == "openai" else Path("other"))
    monkeypatch.setattr(clip, "architecture", lambda name, weights="none": another if weights == "openai" else mine)
    with pytest.raises(
        ConfigError, match=r"the weights 'openai' want another form of 'clip:demo': set encoder.name to"
    ):
        encoders.build_encoder("clip:demo", checkpoint=demo[1], taps=["embedding"])
