"""Backbones are the libraries' own, bit for bit; gates sit where they are told to and learn."""

from __future__ import annotations

from types import NoneType

import pytest
import safetensors.torch
import torch
import torchvision.models
from torch import nn

from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.backbones import BACKBONES, STAGES, build_backbone
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.geometry import identity
from pipeline.model.slca import Standardise
from pipeline.model.uses import Seen
from pipeline.weights import download_imagenet, imagenet_file, read_weights

ALL = ModelOptions().gates
TAPS = {tap: (6, 8, 8) for tap, _ in ALL}
SMALL = ("resnet18", "resnet50", "swin_t", "swin_v2_t", "convnext_tiny", "efficientnet_v2_s", "resnext50_32x4d")


def features_of(batch):
    return {tap: torch.randn(batch, *shape) for tap, shape in TAPS.items()}


@pytest.mark.parametrize("name", SMALL)
def test_without_gates_the_classifier_is_torchvisions_bit_for_bit(name):
    torch.manual_seed(0)
    expected = torchvision.models.get_model(name, weights=None, num_classes=4)
    torch.manual_seed(0)
    classifier = Classifier(ModelOptions(backbone=name, gates=()), {}, outputs=4)
    images = torch.randn(2, 3, 64, 64)
    for training in (False, True):  # in training: batch statistics, dropout and stochastic depth too
        expected.train(training)
        classifier.train(training)
        torch.manual_seed(1)
        wanted = expected(images)
        torch.manual_seed(1)
        assert torch.equal(classifier(images, {}), wanted)
    gradients = []
    for net, output in ((expected, wanted), (classifier, classifier.eval()(images, {}))):
        net.eval()
        (net(images) if net is expected else output).square().sum().backward()
        gradients.append(sorted(p.grad.abs().sum().item() for p in net.parameters()))
    assert gradients[0] == gradients[1]


def test_every_name_builds_into_a_stem_and_four_stages():
    small = [name for name in BACKBONES if not name.endswith(("_l", "_large", "_b", "_base", "101_32x8d", "101_64x4d"))]
    for name in small:
        backbone = build_backbone(name, outputs=3)
        assert len(backbone.stages) == len(STAGES) == len(backbone.widths)
        assert backbone.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_resnet_152_has_the_published_widths_and_about_one_percent_of_slca():
    taps = {"patch": (1280, 16, 16), "early": (1280, 16, 16), "middle": (1280, 16, 16), "late": (1280, 16, 16)}
    classifier = Classifier(ModelOptions(backbone="resnet152"), taps | {"neck": (256, 16, 16)}, outputs=7)
    assert classifier.backbone.widths == (64, 256, 512, 1024, 2048)
    counts = classifier.parameter_counts()
    assert counts["trainable"] == counts["backbone"] + counts["slca"]
    assert 0.5e6 < counts["slca"] < 0.7e6
    assert 0.009 < counts["slca"] / counts["backbone"] < 0.012


def test_the_variant_for_28_px_keeps_small_images_large():
    backbone = build_backbone("resnet18_28", outputs=2)
    sizes = []
    x = torch.zeros(1, 3, 28, 28)
    for stage in backbone.stages:
        x = stage(x)
        sizes.append(x.shape[-1])
    assert sizes == [28, 28, 14, 7, 4]


@pytest.mark.parametrize("name", ["resnet18", "swin_v2_t"])
def test_gradients_reach_every_slca_parameter(name):
    torch.manual_seed(0)
    classifier = Classifier(ModelOptions(backbone=name), TAPS, outputs=3)
    affine = identity(2, torch.device("cpu")) * 0.9
    extents = torch.tensor([[0.5, 1.0], [1.0, 1.0]])
    logits = classifier(torch.randn(2, 3, 64, 64), features_of(2), extents, affine)
    logits.square().sum().backward()
    for key, parameter in classifier.gates.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_a_gate_changes_its_own_stage_and_none_before():
    torch.manual_seed(0)
    plain = Classifier(ModelOptions(gates=()), {}, outputs=3).eval()
    gated = Classifier(ModelOptions(gates=(("neck", "stage2"),)), TAPS, outputs=3).eval()
    gated.backbone.load_state_dict(plain.backbone.state_dict())
    seen = {"plain": [], "gated": []}
    for name, classifier in (("plain", plain), ("gated", gated)):
        for stage in classifier.backbone.stages:
            stage.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].clone()))
    images, features = torch.randn(2, 3, 64, 64), features_of(2)
    plain(images, {})
    gated(images, features)
    equal = [torch.equal(a, b) for a, b in zip(seen["plain"], seen["gated"], strict=True)]
    assert equal == [True, True, True, False, False]  # inputs of stem, 1, 2, 3, 4


@pytest.mark.parametrize("mix", ["residual", "multiply"])
def test_the_identity_start_is_the_plain_classifier_bit_for_bit(mix):
    torch.manual_seed(0)
    gated = Classifier(ModelOptions(mix=mix, identity_start=True), TAPS, outputs=3).eval()
    images = torch.randn(2, 3, 84, 84)  # stages of 21, 11, 6 and 3: bilinear weights that are no round numbers
    turned = identity(2, images.device) * 0.7
    assert torch.equal(gated(images, features_of(2), None, turned), gated.backbone(images))


@pytest.mark.parametrize(
    ("norm", "of_middle", "of_neck", "of_own"),
    [
        ("standardise", Standardise, Standardise, NoneType),
        ("layer", nn.LayerNorm, nn.LayerNorm, nn.LayerNorm),
        ("layer_on_blocks", nn.LayerNorm, NoneType, NoneType),
        ("none", NoneType, NoneType, NoneType),
    ],
)
def test_each_tap_gets_the_norm_that_the_options_name(norm, of_middle, of_neck, of_own):
    gates = (("middle", "stage1"), ("neck", "stage2"), ("own", "stage3"))
    classifier = Classifier(ModelOptions(gates=gates, norm=norm), TAPS, outputs=3)
    assert [type(gate.norm) for gate in classifier.gates] == [of_middle, of_neck, of_own]


def test_the_fit_scales_each_tap_by_itself():
    classifier = Classifier(ModelOptions(gates=(("middle", "stage1"), ("neck", "stage2"))), TAPS, outputs=3)
    features = features_of(8)
    features["neck"] = 0.09 * features["neck"] - 5
    halves = [Seen({tap: feature[part] for tap, feature in features.items()}) for part in (slice(4), slice(4, 8))]
    classifier.gates.fit(iter(halves))
    for tap, gate in zip(("middle", "neck"), classifier.gates, strict=True):
        cells = gate.norm(features[tap].flatten(2).transpose(1, 2))
        assert cells.mean().item() == pytest.approx(0, abs=1e-4)
        assert cells.std().item() == pytest.approx(1, abs=1e-2)


def test_one_pass_over_all_taps_gives_each_gate_what_a_pass_of_its_own_would():
    gates = (("middle", "stage1"), ("own", "stage2"), ("neck", "stage3"), ("middle", "stage4"))
    together, alone = (Classifier(ModelOptions(gates=gates, pool=2), TAPS, outputs=3).gates for _ in range(2))
    features, extents = features_of(9), torch.tensor([[1.0, 0.55]]).expand(9, 2)
    parts = [slice(4), slice(4, 8), slice(8, 9)]
    assert together.fitted == ("middle", "neck")
    together.fit(Seen({tap: features[tap][part] for tap in together.fitted}, extents[part]) for part in parts)
    for (tap, _), one, other in zip(gates, together, alone, strict=True):
        if tap != "own":
            other.fit((features[tap][part], extents[part]) for part in parts)
            assert torch.equal(one.norm.scale, other.norm.scale)
            assert torch.equal(one.norm.shift, other.norm.shift)
            assert other.norm.scale.std() > 0


def test_several_taps_on_one_stage_are_averaged():
    torch.manual_seed(0)
    both = Classifier(ModelOptions(gates=(("early", "stage4"), ("late", "stage4"))), TAPS, outputs=3).eval()
    images, features = torch.randn(2, 3, 64, 64), features_of(2)
    x = images
    for stage in both.backbone.stages:
        x = stage(x)
    size = x.shape[-2:]
    maps = both.gate_maps(features, None, tuple(size))
    expected = both.backbone.head(x * (1 + (maps[0] + maps[1]) / 2))
    torch.testing.assert_close(both(images, features), expected)


def test_a_gate_of_the_classifiers_own_features_needs_no_store():
    torch.manual_seed(0)
    options = ModelOptions(gates=tuple(("own", stage) for stage in STAGES), pool=4)
    assert options.taps == ()
    classifier = Classifier(options, {}, outputs=3)
    classifier(torch.randn(2, 3, 64, 64), {}).square().sum().backward()
    assert all(parameter.grad is not None for parameter in classifier.gates.parameters())


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ((("neck", "stage5"),), "names no stage: choose one of stem, stage1"),
        ((("nekc", "stage1"),), "a tap that the store does not hold; it holds: patch, early"),
        ((("neck", "stage1"), ("neck", "stage1")), "name a pair twice"),
    ],
)
def test_impossible_gates_are_refused(gates, message):
    with pytest.raises(ConfigError, match=message):
        Classifier(ModelOptions(gates=gates), TAPS, outputs=3)


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no backbone 'resnet19': choose one of resnet18, "):
        build_backbone("resnet19", outputs=2)


def test_missing_imagenet_weights_say_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"resnet18-f37072fd.pth': `pipeline prepare` downloads them; without"):
        build_backbone("resnet18", outputs=2, weights="imagenet")
    with pytest.raises(ConfigError, match="no ImageNet weights for 'resnet18_28'"):
        build_backbone("resnet18_28", outputs=2, weights="imagenet")


def test_imagenet_weights_that_are_there_are_used_and_never_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    donor = torchvision.models.resnet18(weights=None)
    file = imagenet_file("resnet18")
    file.parent.mkdir()
    torch.save(donor.state_dict(), file)
    assert download_imagenet("resnet18") == file
    backbone = build_backbone("resnet18", outputs=2, weights="imagenet")
    assert torch.equal(backbone.stages[4][1].conv2.weight, donor.layer4[1].conv2.weight)
    assert backbone.head[-1].out_features == 2


def test_local_weights_load_with_their_head_if_it_fits(tmp_path):
    donor = torchvision.models.swin_t(weights=None, num_classes=5)
    file = tmp_path / "swin.safetensors"
    safetensors.torch.save_file(donor.state_dict(), file)
    backbone = build_backbone("swin_t", outputs=5, weights=file)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone.eval()(images), donor.eval()(images))
    assert build_backbone("swin_t", outputs=3, weights=file).head[-1].out_features == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), r"misses 1 tensors \('layer1.0.conv1.weight'\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"has unknown 1 tensors \('extra'\)"),
        (lambda state: state.update({"bn1.weight": torch.zeros(3)}), r"misshapes 1 tensors \('bn1.weight'\)"),
    ],
)
def test_weights_of_another_backbone_are_refused_by_tensor(tmp_path, spoil, message):
    state = torchvision.models.resnet18(weights=None).state_dict()
    spoil(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        build_backbone("resnet18", outputs=2, weights=tmp_path / "weights.pth")


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no file of weights"):
        read_weights(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    for name in ("text.pth", "text.safetensors", "code.pth"):
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            read_weights(tmp_path / name)
    with pytest.raises(CheckpointError, match="something other than a mapping"):
        read_weights(tmp_path / "numbers.pth")


@pytest.mark.parametrize("name", ["timm:seresnet50", "timm:convnextv2_nano", "timm:swin_tiny_patch4_window7_224"])
def test_backbones_of_timm_give_the_maps_that_timm_gives(name):
    timm = pytest.importorskip("timm", reason="the timm extra is not installed")
    torch.manual_seed(0)
    backbone = build_backbone(name, outputs=3).eval()
    torch.manual_seed(0)
    reference = timm.create_model(name.removeprefix("timm:"), pretrained=False, features_only=True).eval()
    images = torch.randn(1, 3, 224, 224)
    x = images
    for stage in backbone.stages:
        x = stage(x)
    last = reference(images)[-1]
    assert torch.equal(x, last if reference.output_fmt == "NCHW" else last.permute(0, 3, 1, 2))
    assert backbone(images).shape == (1, 3)
