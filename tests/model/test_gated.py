"""Gates on a classifier of one's own: the same numbers as the project's classifier, and the classifier untouched."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision.models
from torch import nn

import pipeline
from pipeline.errors import ConfigError
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.geometry import sample_gate
from pipeline.model.slca import factor, integrate, spread

TAPS = {"early": (6, 8, 8), "neck": (5, 4, 4)}
STAGES = {  # what the project calls a stage, by what the library calls it
    "resnet18": {"stage1": "layer1", "stage3": "layer3", "stage4": "layer4"},
    "swin_t": {"stage1": "features.1", "stage3": "features.5", "stage4": "features.7"},
}
GATES = [("early", "stage1"), ("neck", "stage3"), ("neck", "stage4"), ("early", "stage4")]


class Own(nn.Module):
    """A classifier that nobody has heard of, for grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {"one": nn.Conv2d(1, 7, 3), "two": nn.Sequential(nn.BatchNorm2d(7), nn.ReLU(inplace=True))}
        )
        self.head = nn.Linear(7, 3)

    def forward(self, images):
        return self.head(self.body["two"](self.body["one"](images)).mean(dim=(-2, -1)))


def batch(count=3, side=64):
    torch.manual_seed(2)
    features = {tap: torch.randn(count, *shape) for tap, shape in TAPS.items()}
    return torch.randn(count, 3, side, side), features


def placed(count=3):
    """Extents and affine maps, different for each image."""
    extents = torch.tensor([[1.0, 0.6], [0.5, 1.0], [1.0, 1.0]])[:count]
    turned = torch.tensor([[-1.0, 0.0, 0.1], [0.0, 0.8, -0.2]]).repeat(count, 1, 1)
    return extents, turned


@pytest.mark.parametrize(("name", "moved"), [("resnet18", False), ("resnet18", True), ("swin_t", True)])
def test_it_computes_what_the_projects_classifier_does(name, moved):
    options = ModelOptions(backbone=name, gates=tuple(GATES), reduction=2)
    torch.manual_seed(1)
    wanted = Classifier(options, TAPS, outputs=4).eval()
    torch.manual_seed(1)
    backbone = torchvision.models.get_model(name, weights=None, num_classes=4)
    gates = [(tap, STAGES[name][stage]) for tap, stage in GATES]
    net = pipeline.gate(backbone, gates, TAPS, example=torch.zeros(1, 3, 64, 64), reduction=2).eval()
    net.gates.load_state_dict(wanted.gates.state_dict())
    images, features = batch()
    place = placed() if moved else (None, None)
    ours, theirs = net(images, features, *place), wanted(images, features, *place)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(ours, backbone(images), atol=1e-4)
    gradients = []
    for model in (net, wanted):
        model(images, features, *place).square().sum().backward()
        gradients.append([p.grad for p in model.gates.parameters()])
    for mine, other in zip(*gradients, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_any_module_is_gated_as_the_equation_says():
    torch.manual_seed(0)
    own = Own().eval()
    net = pipeline.gate(
        own, [("neck", "body.one")], {"neck": (5, 4, 4)}, example=torch.zeros(1, 1, 20, 20), reduction=1
    )
    net.eval()
    images, neck = torch.randn(2, 1, 20, 20), torch.randn(2, 5, 4, 4)
    x = own.body["one"](images)
    attention, visible = net.gates[0](neck, None)
    part, added = factor(attention)
    by_hand = integrate(x, sample_gate(part, None, visible, (18, 18)), added)
    torch.testing.assert_close(net(images, {"neck": neck}), own.head(own.body["two"](by_hand).mean(dim=(-2, -1))))


def test_the_classifier_alone_is_what_it_was():
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18(num_classes=2)
    before = copy.deepcopy(backbone)
    net = pipeline.gate(backbone, [("neck", "layer4")], TAPS)
    assert all(module.training for module in backbone.modules())
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in before.state_dict().items())
    images, features = batch()
    net(images, features)
    before(images)  # the same running means
    assert torch.equal(backbone.eval()(images), before.eval()(images))


def test_it_may_start_as_the_classifier_alone():
    backbone = torchvision.models.resnet18(num_classes=2).eval()
    net = pipeline.gate(backbone, [("neck", "layer2"), ("own", "layer4")], TAPS, identity_start=True).eval()
    images, features = batch()
    assert torch.equal(net(images, features), backbone(images))
    assert set(net.taps) == {"neck"}


def test_it_is_copied_and_saved_like_any_module(tmp_path):
    backbone = torchvision.models.resnet18(num_classes=2)
    net = pipeline.gate(backbone, [("neck", "layer4")], TAPS).eval()
    images, features = batch()
    said = net(images, features)
    twin = copy.deepcopy(net)
    torch.nn.init.zeros_(net.gates[0].excite.weight)
    assert torch.equal(twin(images, features), said)
    torch.save(twin.state_dict(), tmp_path / "net.pth")
    net.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    assert torch.equal(net(images, features), said)
    names = {f"backbone.{name}" for name in backbone.state_dict()}
    assert {name for name in twin.state_dict() if not name.startswith("gates.")} == names


def test_gates_that_have_seen_features_know_their_scale():
    torch.manual_seed(0)
    taps = {"neck": (16, 8, 8)}
    net = pipeline.gate(torchvision.models.resnet18(), [("neck", "layer3")], taps)
    features = {"neck": 0.01 * torch.randn(20, 16, 8, 8) + 3}
    before = spread(net.gates[0](features["neck"])[0], None).mean()
    after = spread(net.fit(features).gates[0](features["neck"])[0], None).mean()
    assert before < 0.01
    assert after > 0.05


def test_gates_can_be_looked_at():
    net = pipeline.gate(torchvision.models.resnet18(), [("neck", "layer3"), ("own", "layer4")], TAPS)
    (maps,) = net.gate_maps(batch()[1], None, (32, 48))
    assert maps.shape == (3, 256, 32, 48)
    assert 0 < maps.min() < maps.max() < 1


def test_shapes_are_taken_from_whatever_has_one():
    net = pipeline.gate(torchvision.models.resnet18(), [("neck", "layer4")], {"neck": torch.zeros(5, 4, 4)})
    assert net.taps == {"neck": (5, 4, 4)}


@pytest.mark.parametrize(
    ("gates", "taps", "said"),
    [
        ([], TAPS, "at least one and each once"),
        ([("neck", "layer4")] * 2, TAPS, "each once"),
        ([("neck", "layer5")], TAPS, "no module 'layer5'.*'layer"),
        ([("neck", "")], TAPS, "no module ''"),
        ([("late", "layer4")], TAPS, "reads the tap 'late', and there are 'early', 'neck'"),
        ([("neck", "layer4")], {"neck": (2, 5, 4, 4)}, r"shape \(2, 5, 4, 4\): give \(C, h, w\)"),
        ([("neck", "fc")], TAPS, r"'fc' puts out \(1, 1000\) and no map"),
    ],
    ids=str,
)
def test_gates_that_cannot_be_are_refused(gates, taps, said):
    with pytest.raises(ConfigError, match=said):
        pipeline.gate(torchvision.models.resnet18(), gates, taps)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"mix": "add"}, "mix of the gates is 'add': choose one of 'residual', 'multiply'"),
        ({"norm": "batch"}, "'batch'"),
    ],
)
def test_an_unknown_option_is_refused(option, said):
    with pytest.raises(ConfigError, match=said):
        pipeline.gate(torchvision.models.resnet18(), [("neck", "layer3")], {"neck": (8, 4, 4)}, **option)


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (3, 8, 4, 4), (2, 8, 4)])
def test_features_of_other_images_or_channels_are_told(shape):
    net = pipeline.gate(torchvision.models.resnet18(), [("neck", "layer3")], {"neck": (8, 4, 4)})
    with pytest.raises(ConfigError, match=r"'neck' has the shape .* give that of these 2 images, \(2, 8, 4, 4\)"):
        net(torch.zeros(2, 3, 64, 64), {"neck": torch.zeros(shape)})


def test_a_missing_tap_is_named():
    net = pipeline.gate(torchvision.models.resnet18(), [("neck", "layer4")], TAPS)
    images, features = batch()
    with pytest.raises(ConfigError, match="the tap 'neck', and the features have 'early'"):
        net(images, {"early": features["early"]})
