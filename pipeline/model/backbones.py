"""Backbones of torchvision and timm, each cut into a stem, four stages and a head: the places where gates can sit.

The cut rearranges the library's own modules and computes what the library computes, bit for bit. Weights are read from
a file before the cut, under the library's own names, and nothing is downloaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.weights import TIMM, imagenet_file, import_timm, load_weights

STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of values in 0..1, red green blue; torchvision's and timm's own
IMAGENET_STD = (0.229, 0.224, 0.225)

NONE = "none"  # the name of no backbone at all: a linear layer on what the uses of taps give it

Parts = tuple[list[nn.Module], nn.Sequential]  # the modules of STAGES, each (B, C, H, W) to (B, C', H', W'), the head


class Tokens(NamedTuple):
    """A stage's output where some of it belongs to no place, as a transformer's class token does.

    Attributes:
        map: (B, C, h, w), what gates act on.
        beside: (B, n, C), the other tokens.
    """

    map: Tensor
    beside: Tensor


class Backbone(nn.Module):
    """A classifier that can be entered between its stages.

    Args:
        name: As in `BACKBONES`.
        parts: The stages and the head.
        side_px: Of an image that the widths are measured with; None is one that every backbone here takes.
        mean: Of red, green and blue in 0..1, by which `standardise` centres images.
        std: What it divides them by then.

    Attributes:
        stages: The five modules of `STAGES`, each (B, C, H, W) to (B, C', H', W'), or to `Tokens` and from them.
        head: The last stage's output to (B, outputs); its last layer is linear (CLIP's has a cosine), and what that
            reads is the embedding.
        widths: Channels after each of `STAGES`.
    """

    def __init__(
        self,
        name: str,
        parts: Parts,
        *,
        side_px: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.name, self.mean, self.std = name, tuple(mean), tuple(std)
        self._side_px = side_px or (224 if name.startswith(TIMM) else 64)  # some of timm's take no other size
        stages, self.head = parts
        self.stages = nn.ModuleList(stages)
        self.widths = self._measure_widths()

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (B, 3, H, W) as the uncut model does: (B, outputs)."""
        for stage in self.stages:
            images = stage(images)
        return self.classify(self.embed(images))

    def standardise(self, images: Tensor) -> Tensor:
        """Scale grey levels (B, 3, H, W) float32 in 0..255 as the first weights expect them."""
        return standardise(images, self.mean, self.std)

    def frozen_parts(self, names: Sequence[str]) -> list[nn.Module]:
        """The modules of named stages, which are to stay as they are; `"backbone"` names all but the head."""
        wanted = STAGES if "backbone" in names else names
        return [part for name, part in zip(STAGES, self.stages, strict=False) if name in wanted]

    def text_parameters(self) -> Iterable[nn.Parameter]:
        """Those of a text tower that trains."""
        return ()

    def plain_state(self) -> dict[str, Tensor]:
        """What a finished model keeps, by name."""
        return self.state_dict()

    def embed(self, x: Tensor | Tokens) -> Tensor:
        """Turn the last stage's output (B, C_4, H, W) into the embedding (B, E): the head but for its last layer."""
        for layer in _layers(self.head)[:-1]:
            x = layer(x)
        assert isinstance(x, Tensor)
        return x

    def classify(self, embedding: Tensor) -> Tensor:
        """Turn an embedding, with what stands beside it, into outputs: (B, E + beside) to (B, outputs)."""
        outputs: Tensor = _layers(self.head)[-1](embedding)
        return outputs

    @torch.no_grad()
    def _measure_widths(self) -> tuple[int, ...]:
        training = self.training
        self.eval()
        x: Any = torch.zeros(1, 3, self._side_px, self._side_px)
        widths = []
        for stage in self.stages:
            x = stage(x)
            widths.append((x.map if isinstance(x, Tokens) else x).shape[1])
        self.train(training)
        return tuple(widths)


def build_backbone(name: str, outputs: int, weights: str | Path = "none", *, beside: int = 0) -> Backbone:
    """Build a backbone with a head of `outputs` numbers.

    Args:
        name: One of `BACKBONES`; `timm:` and a model of the timm extra that offers `features_only`; or `none`.
        outputs: Numbers per image; a head of another size in the weights is left out and starts anew.
        weights: `"none"` for a random start, `"imagenet"` for the library's own file, or a local file in the library's
            key layout (`.safetensors`, or a `.pth` without code).
        beside: Numbers that the head reads beside the embedding. Their weights start at zero: so does the classifier,
            as if they were not there.

    Raises:
        ConfigError: No such backbone, or ImageNet weights that are not there.
        CheckpointError: The file is not of this backbone.
    """
    if name == NONE:
        return Backbone(name, ([], nn.Sequential(zero_linear(beside, outputs))))
    if name.startswith(TIMM):
        net, cut = _build_timm(name, outputs)
    elif name in BACKBONES:
        net, cut = _build_torchvision(name, outputs)
    else:
        msg = (
            f"There is no backbone {name!r}: choose one of {', '.join(BACKBONES)}, 'timm:NAME' (an extra), or 'none' "
            f"for a classifier of features alone."
        )
        raise ConfigError(msg)
    if str(weights) == "imagenet":
        weights = imagenet_file(name)
        if not weights.is_file():
            msg = (
                f"The ImageNet weights of {name!r} are not at {str(weights)!r}: `pipeline prepare` downloads them; "
                f"without a network, copy the file there or set weights to 'none' or to a local file."
            )
            raise ConfigError(msg)
    if str(weights) != "none":
        load_weights(net, Path(weights))
    stages, head = cut(net)
    if beside:
        _widen(head, beside)
    return Backbone(name, (stages, head))


def standardise(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Scale grey levels (B, 3, H, W) float32 in 0..255 as first weights expect them: ImageNet's to about -2 to 2.6."""
    centre, spread = (  # copied without waiting for the device
        255 * torch.tensor(of, dtype=images.dtype)[:, None, None].to(images.device, non_blocking=True)
        for of in (mean, std)
    )
    return (images - centre) / spread


def _layers(head: nn.Sequential) -> list[nn.Module]:
    """The layers of a head one after the other, those of sequences inside it too; the last is linear."""
    layers: list[nn.Module] = []
    for layer in head:
        layers += _layers(layer) if isinstance(layer, nn.Sequential) else [layer]
    return layers


def _widen(head: nn.Sequential, beside: int) -> None:
    """Let the last layer of a head read more numbers, to which it gives no weight yet."""
    while isinstance(head[-1], nn.Sequential):
        head = head[-1]
    narrow = head[-1]
    assert isinstance(narrow, nn.Linear), "every backbone here ends in a linear layer"
    given = narrow.in_features
    wide = zero_linear(given + beside, narrow.out_features)
    with torch.no_grad():
        wide.weight[:, :given] = narrow.weight
        wide.bias.copy_(narrow.bias)
    head[-1] = wide


def zero_linear(given: int, outputs: int) -> nn.Linear:
    """Make a linear layer that starts at zero, and draws nothing from the seed of the others."""
    layer = nn.Linear(given, outputs, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _build_torchvision(name: str, outputs: int) -> tuple[Any, Callable[[Any], Parts]]:
    import torchvision.models  # takes longer to import than torch, so it waits for the first of its backbones

    net = torchvision.models.get_model(name.removesuffix("_28"), weights=None, num_classes=outputs)
    if name.endswith("_28"):
        _for_28_px(net)
    return net, BACKBONES[name]


def _for_28_px(net: Any) -> None:
    """Keep small images large: a 3 x 3 stem without stride and no max-pool, as MedMNIST's 28 px baselines have it."""
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()


class _Permute(nn.Module):
    """Reorder dimensions; without copying."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


_CHANNELS_FIRST = (0, 3, 1, 2)
_CHANNELS_LAST = (0, 2, 3, 1)


def _cut_resnet(net: Any) -> Parts:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return [stem, net.layer1, net.layer2, net.layer3, net.layer4], nn.Sequential(net.avgpool, nn.Flatten(), net.fc)


def _cut_features(net: Any, ends: tuple[int, ...], head: list[nn.Module]) -> Parts:
    """Cut `net.features` after the modules numbered `ends` (exclusive)."""
    starts = (0, *ends[:-1])
    return [net.features[start:end] for start, end in zip(starts, ends, strict=True)], nn.Sequential(*head)


def _cut_convnext(net: Any) -> Parts:
    return _cut_features(net, (1, 2, 4, 6, 8), [net.avgpool, net.classifier])


def _cut_efficientnet(net: Any) -> Parts:
    return _cut_features(net, (2, 3, 4, 6, len(net.features)), [net.avgpool, nn.Flatten(), net.classifier])


def _cut_swin(net: Any) -> Parts:
    """Cut a Swin, whose maps are (B, H, W, C), into stages that take and give (B, C, H, W)."""
    stages, _ = _cut_features(net, (1, 2, 4, 6, 8), [])
    head = nn.Sequential(_Permute(*_CHANNELS_LAST), net.norm, net.permute, net.avgpool, net.flatten, net.head)
    return _channels_first(stages), head


def _channels_first(stages: list[nn.Module]) -> list[nn.Module]:
    """Wrap stages that pass (B, H, W, C) to one another so that each takes and gives (B, C, H, W)."""
    into, out = _Permute(*_CHANNELS_LAST), _Permute(*_CHANNELS_FIRST)
    return [nn.Sequential(stages[0], out), *(nn.Sequential(into, stage, out) for stage in stages[1:])]


def _build_timm(name: str, outputs: int) -> tuple[Any, Callable[[Any], Parts]]:
    try:
        net = import_timm().create_model(name.removeprefix(TIMM), pretrained=False, features_only=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        msg = f"timm has no backbone {name.removeprefix(TIMM)!r} with features_only ({error}): choose another."
        raise ConfigError(msg) from error
    if not hasattr(net, "return_layers"):
        msg = f"timm's {name.removeprefix(TIMM)!r} is no plain row of modules to put gates between: choose another."
        raise ConfigError(msg)
    return net, partial(_cut_timm, outputs=outputs)


def _cut_timm(net: Any, outputs: int) -> Parts:
    """Cut a timm feature extractor at the maps it returns; the head is ours: the mean of the map, one linear layer."""
    names, modules = zip(*net.named_children(), strict=True)
    ends = [names.index(name) for name in net.return_layers]
    if len(ends) == len(STAGES) - 1:  # the stem's map is not among them
        ends.insert(0, ends[0] - 1)
    elif ends and isinstance(modules[ends[0] + 1], nn.MaxPool2d):  # it is, but before its pool
        ends[0] += 1
    if len(ends) != len(STAGES) or ends[0] < 0:
        msg = (
            f"This timm model returns {len(net.return_layers)} maps and not a stem's and four stages': choose another."
        )
        raise ConfigError(msg)
    starts = (0, *(end + 1 for end in ends[:-1]))
    stages: list[nn.Module] = [
        nn.Sequential(*modules[start : end + 1]) for start, end in zip(starts, ends, strict=True)
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(net.feature_info.channels()[-1], outputs))
    return (_channels_first(stages) if net.output_fmt == "NHWC" else stages), head


BACKBONES: dict[str, Callable[[Any], Parts]] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), _cut_resnet),
    **dict.fromkeys(("resnet18_28", "resnet50_28"), _cut_resnet),
    **dict.fromkeys(("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"), _cut_resnet),
    **dict.fromkeys(("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"), _cut_swin),
    **dict.fromkeys(("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"), _cut_convnext),
    **dict.fromkeys(("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"), _cut_efficientnet),
}
