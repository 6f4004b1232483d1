"""CLIP as a backbone against open_clip itself; adapters, text tower and gates on its blocks."""

from __future__ import annotations

import copy
import json

import open_clip
import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline import clip
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.backbones import STAGES, standardise
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.clip_backbone import ClipOptions, Prompts

CLASSES = ("round", "lobed", "spiked")
TEXTS = [f"This is a photo of {name}" for name in CLASSES]
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))


SMALL = {"embed_dim": 64, "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2}}
VIT = {"image_size": 64, "patch_size": 8, "width": 96, "head_width": 32, "layers": 6}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """open_clip's own model of a small transformer, and its name, which is that of its folder."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**SMALL, "vision_cfg": VIT}}))
    name = f"clip:local-dir:{folder}"
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model, name


def build(miniature, *, gates=(), taps=None, trains_text=False, image_px=64, fuse=(), **asked):
    options = ModelOptions(
        backbone=miniature[1], weights="own", image_px=image_px, gates=gates, fuse=fuse, clip=ClipOptions(**asked),
    )  # fmt: skip
    return Classifier(options, taps or {}, len(CLASSES), classes=CLASSES, trains_text=trains_text)


def loaded(classifier):
    """A classifier as it is read from a finished run, which knows no texts."""
    backbone = classifier.backbone
    built = clip.read_architecture(json.loads(json.dumps({
        "config": backbone.architecture.of_images().config, "mean": backbone.mean, "std": backbone.std,
    })))  # fmt: skip
    options = ModelOptions(**{**vars(classifier.options), "weights": "none"})
    fresh = Classifier(options, classifier.taps, len(CLASSES), architecture=built).eval()
    fresh.load_state_dict(classifier.plain_state())
    return fresh


@torch.no_grad()
def test_it_says_what_open_clip_says(miniature):
    model, name = miniature
    classifier = build(miniature).eval()
    tokens = open_clip.get_tokenizer(name.removeprefix("clip:"))(TEXTS)
    torch.testing.assert_close(classifier(IMAGES, {}), model.get_logits(IMAGES, tokens)[0])
    features, texts, scale = model(IMAGES, tokens)
    torch.testing.assert_close(classifier(IMAGES, {}), scale * features @ texts.T)
    torch.testing.assert_close(classifier.backbone(IMAGES), classifier(IMAGES, {}))


@torch.no_grad()
def test_several_templates_are_averaged_and_words_stand_for_a_class(miniature):
    model, name = miniature
    templates = ("This is a photo of {class}", "an ultrasound of {class}")
    classifier = build(miniature, templates=templates, words=(("spiked", "a spiked lesion"),)).eval()
    tokenize = clip.tokenizer(name)
    called = ("round", "lobed", "a spiked lesion")
    expected = []
    for name in called:
        each = model.encode_text(tokenize([text.replace("{class}", name) for text in templates]), normalize=True)
        mean = each.sum(dim=0)
        expected.append(mean / mean.norm())
    images = model.encode_image(IMAGES, normalize=True)
    torch.testing.assert_close(classifier(IMAGES, {}), model.logit_scale.exp() * images @ torch.stack(expected).T)
    assert classifier.backbone.prompts["spiked"] == ("This is a photo of a spiked lesion",
                                                    "an ultrasound of a spiked lesion")  # fmt: skip


TOWERS = {
    "the mean of the patches": VIT | {"pool_type": "avg", "final_ln_after_pool": True},
    "layer scale and no first norm": VIT | {"ls_init_value": 0.1, "no_ln_pre": True},
    "blocks of another kind": VIT | {"qk_norm": True, "scale_attn": True},
    "a ResNet": {"image_size": 64, "width": 16, "layers": [1, 1, 1, 1]},
    "a transformer of timm": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"},
}


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
@torch.no_grad()
def test_each_kind_of_tower_is_cut_without_changing_what_it_computes(tower):
    from pipeline.model.clip_backbone import _cut

    torch.manual_seed(3)
    wanted = clip.Architecture({**SMALL, "vision_cfg": tower}, (0.5,) * 3, (0.5,) * 3)
    whole = clip.build(wanted).visual
    images = torch.randn(2, 3, wanted.image_px, wanted.image_px)
    expected = whole(images)
    stages, rest = _cut(copy.deepcopy(whole))
    assert len(stages) == len(STAGES)
    x = images
    for stage in stages:
        x = stage(x)
    torch.testing.assert_close(rest(x), expected)
    parameters = sum(p.numel() for part in (*stages, rest) for p in part.parameters())
    assert parameters == sum(p.numel() for p in whole.parameters())


@torch.no_grad()
def test_another_kind_of_tower_stays_whole_and_refuses_gates_and_stages(miniature):
    tower = {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    wanted = clip.Architecture({**SMALL, "vision_cfg": tower}, (0.5,) * 3, (0.5,) * 3)
    options = ModelOptions(backbone="clip:demo", image_px=64, gates=())
    classifier = Classifier(options, {}, 2, architecture=wanted).eval()
    assert classifier(IMAGES, {}).shape == (4, 2)
    with pytest.raises(ConfigError, match="not cut into stages"):
        classifier.backbone.frozen_parts(("stem",))
    assert sum(1 for part in classifier.backbone.frozen_parts(("backbone",)) for _ in part.parameters()) > 10
    gated = ModelOptions(backbone="clip:demo", image_px=64, gates=(("own", "stage1"),))
    with pytest.raises(ConfigError, match="no place to sit on: leave them out"):
        Classifier(gated, {}, 2, architecture=wanted)


def test_images_are_scaled_as_the_tower_was_trained(miniature):
    classifier = build(miniature)
    grey = torch.full((1, 3, 2, 2), 255 * 0.5)
    wanted = (0.5 - torch.tensor(open_clip.OPENAI_DATASET_MEAN)) / torch.tensor(open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(classifier.backbone.standardise(grey)[0, :, 0, 0], wanted)
    plain = Classifier(ModelOptions(gates=()), {}, 2)
    assert torch.equal(plain.backbone.standardise(grey), standardise(grey))
    assert clip.architecture("clip:ViT-B-16-SigLIP").mean == (0.5, 0.5, 0.5)


@torch.no_grad()
def test_another_side_resamples_the_positions_as_open_clip_does(miniature):
    classifier = build(miniature, image_px=96).eval()
    _, name = miniature
    model = open_clip.create_model(name.removeprefix("clip:"), force_image_size=96).eval()
    images = torch.randn(2, 3, 96, 96)
    expected = model.get_logits(images, clip.tokenizer(name)(TEXTS))[0]
    torch.testing.assert_close(classifier(images, {}), expected)
    with pytest.raises(ConfigError, match="image_px is 100, and this CLIP reads patches of 8 px: take 96 or 104"):
        build(miniature, image_px=100)


def test_a_text_tower_that_trains_is_asked_at_each_step_and_once_in_use(miniature):
    frozen, training = build(miniature), build(miniature, trains_text=True)
    asked = []
    text = training.backbone.head[-1].text
    assert isinstance(text, Prompts)
    text.register_forward_hook(lambda *_: asked.append(1))
    training.train()
    loss = training(IMAGES, {})
    assert len(asked) == 1
    torch.testing.assert_close(loss, frozen.train()(IMAGES, {}))
    loss.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in text.tower.transformer.parameters() if p.ndim > 1)
    with torch.no_grad():
        for parameter in text.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    expected = training(IMAGES, {})  # not from memory
    asked.clear()
    training.eval()
    assert len(asked) == 1
    torch.testing.assert_close(training(IMAGES, {}), expected)
    torch.testing.assert_close(training(IMAGES, {}), expected)
    assert len(asked) == 1
    assert not torch.allclose(expected, frozen(IMAGES, {}), atol=1e-3)
    assert not any("text" in key for key in training.plain_state())
    torch.testing.assert_close(loaded(training)(IMAGES, {}), expected)


def test_a_frozen_text_tower_leaves_its_embeddings_and_nothing_else(miniature):
    classifier = build(miniature).eval()
    keys = classifier.state_dict().keys()
    assert "backbone.head.1.classes" in keys
    assert not any("token_embedding" in key for key in keys)
    model, _ = miniature
    assert sum(p.numel() for p in classifier.parameters()) == sum(p.numel() for p in model.visual.parameters()) + 1


def test_adapters_train_alone_and_are_added_to_the_weights(miniature):
    torch.manual_seed(1)
    classifier = build(miniature, lora=2)
    plain = build(miniature).eval()
    torch.testing.assert_close(classifier.eval()(IMAGES, {}), plain(IMAGES, {}))  # they start at nothing
    learns = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert {name for name in learns if "lora_" not in name} == {"backbone.head.1.logit_scale"}
    assert sum("attn.qkv.lora_A" in name for name in learns) == 6
    assert sum("mlp.c_proj.lora_B" in name for name in learns) == 6
    optimiser = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.05)
    classifier.train()
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(classifier(IMAGES, {}), torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()
    said = classifier.eval()(IMAGES, {})
    assert (said - plain(IMAGES, {})).abs().max() > 0.01
    state = classifier.plain_state()
    assert state.keys() == plain.state_dict().keys()
    fresh = loaded(classifier)
    torch.testing.assert_close(fresh(IMAGES, {}), said, atol=1e-4, rtol=1e-4)
    moved = [key for key in state if not torch.equal(state[key], plain.state_dict()[key])]
    assert all("qkv.weight" in key or "proj.weight" in key or "c_fc.weight" in key or "logit_scale" in key
               for key in moved)  # fmt: skip
    assert len(moved) == 6 * 4 + 1


def test_gates_sit_on_the_blocks_and_reach_the_class(miniature):
    gates = tuple(("own" if stage == "stem" else "neck", stage) for stage in STAGES)
    taps = {"neck": (6, 4, 4)}
    classifier = build(miniature, gates=gates, taps=taps).train()
    assert classifier.backbone.widths == (96,) * 5
    features = {"neck": torch.randn(4, 6, 4, 4)}
    classifier(IMAGES, features).square().sum().backward()
    for slca, (_, stage) in zip(classifier.gates, gates, strict=True):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in slca.parameters()), stage
    counts = classifier.flop_counts()
    assert counts["slca"] > 0
    start = build(miniature, gates=gates, taps=taps).eval()
    plain = build(miniature).eval()
    options = ModelOptions(**{**vars(start.options), "identity_start": True})
    same = Classifier(options, taps, 3, classes=CLASSES).eval()
    with torch.no_grad():
        assert torch.equal(same(IMAGES, features), plain(IMAGES, {}))
        assert not torch.allclose(start(IMAGES, features), plain(IMAGES, {}), atol=1e-3)


def test_pooled_features_stand_beside_the_cosine_and_start_at_nothing(miniature):
    taps = {"neck": (6, 4, 4)}
    fused, plain = build(miniature, fuse=("neck",), taps=taps).eval(), build(miniature).eval()
    features = {"neck": torch.randn(4, 6, 4, 4)}
    assert torch.equal(fused(IMAGES, features), plain(IMAGES, {}))
    linear = fused.backbone.head[-1].beside
    nn.init.normal_(linear.weight)
    assert not torch.allclose(fused(IMAGES, features), plain(IMAGES, {}))


def test_what_does_not_fit_is_said_at_once(miniature, tmp_path):
    with pytest.raises(ConfigError, match=r"words for a class 'spikey'.*did you mean 'spiked'\?"):
        build(miniature, words=(("spikey", "x"),))
    with pytest.raises(ConfigError, match=r"The template 'a photo' has no \{class\} in it"):
        build(miniature, templates=("a photo",))
    with pytest.raises(ConfigError, match=r"has \{modality\} in it, and only \{class\} is filled in"):
        build(miniature, templates=("{class} in {modality}",))
    with pytest.raises(ConfigError, match="no template"):
        build(miniature, templates=())
    with pytest.raises(ConfigError, match="The words for the class 'round' are empty"):
        build(miniature, words=(("round", " "),))
    options = ModelOptions(backbone=miniature[1], weights="own", image_px=64, gates=())
    with pytest.raises(ConfigError, match="compares with 3 classes, and this task's head puts out 2 numbers"):
        Classifier(options, {}, 2, classes=CLASSES)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"visual.conv1.weight": torch.zeros(96, 3, 4, 4)}, other)
    with pytest.raises(CheckpointError, match="is of another model"):
        Classifier(ModelOptions(**{**vars(options), "weights": str(other)}), {}, 3, classes=CLASSES)
    with pytest.raises(ConfigError, match=r"lora is 4, and the image tower of 'clip:demo' has no transformer blocks"):
        Classifier(
            ModelOptions(backbone="clip:demo", image_px=64, gates=(), clip=ClipOptions(lora=4)), {}, 3, classes=CLASSES
        )
    whole = clip.build(clip.architecture("clip:demo"))
    safetensors.torch.save_file(whole.state_dict(), other)
    resnet = ModelOptions(backbone="clip:demo", weights=str(other), image_px=96, gates=())
    with pytest.raises(ConfigError, match="image_px is 96, and this CLIP's ResNet has learnt positions for 64 px"):
        Classifier(resnet, {}, 3, classes=CLASSES)
