"""SLCA on a classifier of one's own: gates on any of its modules, by name, with nothing of it changed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.model.slca import Mix, Norm
from pipeline.model.uses import OWN, Gates, Seen, Shape


def gate(
    backbone: nn.Module,
    gates: Sequence[tuple[str, str]],
    taps: Mapping[str, Any],
    *,
    example: Tensor | None = None,
    mix: Mix = "residual",
    norm: Norm = "standardise",
    pool: int = 1,
    reduction: int = 16,
    identity_start: bool = False,
) -> Gated:
    """Put SLCA's gates on the named modules of a classifier.

    >>> import torch, torchvision
    >>> backbone = torchvision.models.resnet18(num_classes=2)
    >>> net = gate(backbone, [("neck", "layer3"), ("neck", "layer4")], taps={"neck": (256, 4, 4)})
    >>> net(torch.zeros(5, 3, 64, 64), {"neck": torch.zeros(5, 256, 4, 4)}).shape
    torch.Size([5, 2])

    Args:
        backbone: Takes images alone. It is gated from within, so its weights keep their names below `backbone.`; called
            by itself it is what it was.
        gates: Pairs (tap, module); the tap `"own"` is the module's own output. A module is named as by
            `named_modules()` and puts out one map (B, C, H, W), or (B, H, W, C) as torchvision's Swin does. The gates
            of several taps on one module are averaged.
        taps: By name, (C, h, w) of each tap, or anything with such a `shape`: `store.taps`, or what
            `pipeline.features` gives.
        example: Images (B, 3, H, W) to measure the modules by; one black image of 224 px if not given.
        mix: `"residual"` for x + x * A, `"multiply"` for x * A.
        norm: What features go through before a gate's layers: `"standardise"` scales each channel by what
            `Gated.fit` has seen, `"layer"` is LayerNorm over channels, `"layer_on_blocks"` that on block taps only.
        pool: SLCA's k, in cells of the taps' grid: 1 where they are pooled already, as stores of this project are.
        reduction: SLCA's r.
        identity_start: Start as the classifier alone, bit for bit.

    Raises:
        ConfigError: There is no such module or tap, a module puts out no map, or an option is impossible.
    """
    pairs = tuple((tap, module) for tap, module in gates)
    shapes = _shapes(pairs, taps)
    outputs = _outputs(backbone, tuple(dict.fromkeys(module for _, module in pairs)), example)
    widths = {name: shape[3 if _channels_last(shape) else 1] for name, shape in outputs.items()}
    gated = Gates(
        pairs,
        shapes,
        widths,
        mix=mix,
        norm=norm,
        identity_start=identity_start,
        pool=pool,
        reduction=reduction,
    )
    return Gated(backbone, gated, shapes, {name: _channels_last(shape) for name, shape in outputs.items()})


class Gated(nn.Module):
    """A classifier with gates on some of its modules; `gate` makes it.

    Attributes:
        backbone: The classifier.
        gates: One `SLCA` per pair.
        taps: (C, h, w) of each tap that the gates read.
    """

    def __init__(
        self, backbone: nn.Module, gates: Gates, taps: Mapping[str, Shape], channels_last: Mapping[str, bool]
    ) -> None:
        super().__init__()
        self.backbone, self.gates, self.taps = backbone, gates, dict(taps)
        self._seen: Seen | None = None  # while a batch is classified
        modules = dict(backbone.named_modules())
        for name, is_last in channels_last.items():
            modules[name].register_forward_hook(partial(self._on_output, name, is_last))

    def forward(
        self,
        images: Tensor,
        features: Mapping[str, Tensor],
        extents: Tensor | None = None,
        affine: Tensor | None = None,
    ) -> Any:
        """Classify images.

        Args:
            images: (B, 3, H, W) as the backbone wants them; drawn through `affine` already.
            features: Tap to (B, C, h, w), of the images before `affine`; others than the gates read are passed over.
            extents: (B, 2) float32, the part of the features' grid that is image; None where all of it is.
            affine: (B, 2, 3) float32, the map that the images went through, result to raw image, in [-1, 1] from edge
                to edge (`pipeline.model.geometry.sample_image` draws them); None for none.

        Returns:
            What the backbone puts out.

        Raises:
            ConfigError: A tap that the gates read is not among the features, or they are of other images or channels.
        """
        absent = [tap for tap in self.taps if tap not in features]
        if absent:
            msg = f"The gates read the tap {absent[0]!r}, and the features have {_listed(features)}: give it, too."
            raise ConfigError(msg)
        for tap, (channels, h, w) in self.taps.items():
            if features[tap].shape[:2] != (len(images), channels) or features[tap].ndim != 4:
                msg = (
                    f"The feature of the tap {tap!r} has the shape {tuple(features[tap].shape)}: give that of these "
                    f"{len(images)} images, {(len(images), channels, h, w)}."
                )
                raise ConfigError(msg)
        self._seen = Seen(features, extents, affine)
        try:
            return self.backbone(images)
        finally:
            self._seen = None

    def fit(self, features: Mapping[str, Tensor], extents: Tensor | None = None) -> Gated:
        """Let the gates see features of training images, once before the training, so that they know their scale.

        Gates that have not seen any take features as they are, and may start flat.

        Args:
            features: Tap to (B, C, h, w); a few hundred images are enough.
            extents: (B, 2) float32, the part of the features' grid that is image; None where all of it is.

        Returns:
            This classifier.
        """
        self.gates.fit([Seen(features, extents)])
        return self

    def gate_maps(self, features: Mapping[str, Tensor], extents: Tensor | None, size: tuple[int, int]) -> list[Tensor]:
        """Compute the gates of stored taps over the images, to be looked at: (B, C, height, width) for each pair."""
        return self.gates.maps(Seen(features, extents), size)

    def _on_output(self, name: str, is_last: bool, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Gate what a module puts out while this classifier classifies; at any other time leave it."""
        if self._seen is None:
            return output
        if is_last:
            return self.gates.on_stage(name, output.permute(0, 3, 1, 2), self._seen).permute(0, 2, 3, 1)
        return self.gates.on_stage(name, output, self._seen)


def _shapes(pairs: Sequence[tuple[str, str]], taps: Mapping[str, Any]) -> dict[str, Shape]:
    """(C, h, w) of each tap that the gates read."""
    if not pairs or len(set(pairs)) < len(pairs):
        msg = f"The gates are {list(pairs)!r}: give pairs (tap, module), at least one and each once."
        raise ConfigError(msg)
    found: dict[str, Shape] = {}
    for tap in dict.fromkeys(tap for tap, _ in pairs if tap != OWN):
        if tap not in taps:
            msg = f"A gate reads the tap {tap!r}, and there are {_listed(taps)}: choose one of these, or {OWN!r}."
            raise ConfigError(msg)
        shape = tuple(int(side) for side in getattr(taps[tap], "shape", taps[tap]))
        if len(shape) != 3:
            msg = f"The tap {tap!r} has the shape {shape}: give (C, h, w), the shape of one sample's feature."
            raise ConfigError(msg)
        found[tap] = shape
    return found


@torch.no_grad()
def _outputs(backbone: nn.Module, names: Sequence[str], example: Tensor | None) -> dict[str, tuple[int, ...]]:
    """Shape of what each named module puts out."""
    modules = dict(backbone.named_modules())
    for name in names:
        if not name or name not in modules:
            near = difflib.get_close_matches(name, modules, n=3)
            msg = f"The classifier has no module {name!r}: choose a name of `named_modules()`, such as {_listed(near)}."
            raise ConfigError(msg)
    found: dict[str, Any] = {}
    hooks = [modules[name].register_forward_hook(partial(_note, found, name)) for name in names]
    was_training = {module: module.training for module in backbone.modules()}
    backbone.eval()  # or the example would count in the running means of its batch norms
    try:
        backbone(_black(backbone) if example is None else example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    for name in names:
        if not (isinstance(found.get(name), Tensor) and found[name].ndim == 4):
            said = tuple(found[name].shape) if isinstance(found.get(name), Tensor) else type(found.get(name)).__name__
            msg = f"The module {name!r} puts out {said} and no map (B, C, H, W): put the gate on another one."
            raise ConfigError(msg)
    return {name: tuple(output.shape) for name, output in found.items()}


def _note(found: dict[str, Any], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    found[name] = output


def _black(backbone: nn.Module) -> Tensor:
    weight = next((p for p in backbone.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.zeros(1, 3, 224, 224, dtype=weight.dtype, device=weight.device)


def _channels_last(shape: tuple[int, ...]) -> bool:
    """Whether a map of a square image has its channels behind: (B, H, W, C)."""
    return shape[1] == shape[2] != shape[3]


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
