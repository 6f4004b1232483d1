"""The miniature CLIP learns words of generated images, the same each time, and captions say what is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import clip, data, encoders
from pipeline.data.layouts.demo_captions import caption
from pipeline.errors import CheckpointError

NAMES = data.DEMO_CLASSES


@pytest.fixture(scope="module")
def captioned():
    return data.captioned_arrays(40, 64, 1)


def test_captions_name_the_outline_and_the_place_that_a_turned_image_shows():
    lesion = np.zeros((60, 60), bool)
    lesion[5:15, 40:50] = True
    image = np.where(lesion, 20, 200).astype(np.uint8)
    said = {caption(image, lesion, "spiked", np.random.default_rng(seed)) for seed in range(200)}
    assert all(any(word in text for word in ("spiked", "spiculated", "star-shaped")) for text in said)
    assert "This is a photo of spiked" in said
    places = {text for text in said if any(word in text for word in ("upper", "lower", "middle"))}
    assert places
    assert all("upper right" in text for text in places)
    assert any("small" in text for text in said)
    assert not any("large" in text for text in said)
    assert any("very dark" in text for text in said)
    turned = caption(np.rot90(image, 2), np.rot90(lesion, 2), "round", np.random.default_rng(3))
    assert "right" not in turned


def test_the_same_seed_draws_the_same_images_and_words_and_another_draws_others(captioned):
    images, captions, labels = captioned
    again, texts, _ = data.captioned_arrays(40, 64, 1)
    assert np.array_equal(images, again)
    assert captions == texts
    assert images.shape == (80, 64, 64)
    assert len(set(captions)) > 20
    assert (labels[::2] == labels[1::2]).all()
    assert data.captioned_arrays(40, 64, 2)[1] != captions


def train(captioned, path, steps, seed=0):
    images, captions, _ = captioned
    held_out, _, labels = data.demo_arrays(30, 64, seed=9)
    return encoders.train_demo_clip(images, captions, held_out, labels, NAMES, path, seed=seed, steps=steps)


def test_training_is_the_same_each_time_and_its_file_is_open_clips(captioned, tmp_path):
    report = train(captioned, tmp_path / "a.safetensors", 3)
    train(captioned, tmp_path / "b.safetensors", 3)
    train(captioned, tmp_path / "c.safetensors", 3, seed=1)
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert report.steps == 3
    assert report.parameters == sum(p.numel() for p in clip.build(clip.architecture(clip.DEMO)).parameters())
    encoder = encoders.build_encoder(clip.DEMO, checkpoint=tmp_path / "a.safetensors", taps=["embedding"])
    assert encoder.taps["embedding"] == (64, 1, 1)


def test_it_learns_to_match(captioned, tmp_path):
    seen = []
    images, captions, _ = captioned
    held_out, _, labels = data.demo_arrays(6, 64, seed=9)
    encoders.train_demo_clip(
        images, captions, held_out, labels, NAMES, tmp_path / "a.safetensors", steps=24,
        progress=lambda task, done, total, **info: seen.append(info["loss"]),
    )  # fmt: skip
    assert len(seen) == 24
    assert np.mean(seen[-4:]) < 0.8 * np.mean(seen[:4])
    assert torch.isfinite(torch.tensor(seen)).all()


def test_texts_of_classes_come_from_the_same_file(captioned, tmp_path):
    train(captioned, tmp_path / "a.safetensors", 1)
    asked = clip.prompts(NAMES, ("a {class} lesion", "{class}"), {"spiked": "star-shaped"})
    classes, scale = clip.class_features(clip.DEMO, tmp_path / "a.safetensors", asked)
    model = clip.build(clip.architecture(clip.DEMO), tmp_path / "a.safetensors")
    tokens = clip.tokenizer(clip.DEMO)(["a star-shaped lesion", "star-shaped"])
    with torch.no_grad():
        each = torch.nn.functional.normalize(model.encode_text(tokens), dim=1).mean(dim=0)
        torch.testing.assert_close(classes[2], each / each.norm())
        assert scale == pytest.approx(float(model.logit_scale.exp()))
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="of another model"):
        clip.class_features(clip.DEMO, tmp_path / "other.pt", asked)
