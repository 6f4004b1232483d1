"""Where a classifier looks, as arrays: the gates of its taps, and Grad-CAM of its last stage.

A map stays on the grid that it was computed on, a few cells a side, until it is laid over an image: ten thousand images
with five gates of 16 x 16 cells are 51 MB, and at 224 px they would be 10 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.model.backbones import Tokens
from pipeline.model.classifier import Classifier
from pipeline.model.clip_backbone import ClipBackbone
from pipeline.model.geometry import sample_gate
from pipeline.model.slca import Standardise
from pipeline.model.tasks import Head, losses, probabilities
from pipeline.model.uses import OWN, Seen
from pipeline.progress import Progress, silent
from pipeline.train.feeding.feed import Feed
from pipeline.train.forward import outputs

MEAN = "mean of the gates"
GRAD_CAM = "Grad-CAM"
_AT_ONCE = 256  # maps laid over images at a time

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class CoarseMaps:
    """One map per sample, on the grid it was computed on.

    Attributes:
        values: (n, 1, h, w) float32 on the CPU.
        extents: (n, 2) float32, the part of the grid's height and width that is image; None where all of it is.
    """

    values: Tensor
    extents: Tensor | None

    def lay(self, positions: Tensor, size: tuple[int, int]) -> Tensor:
        """Lay the maps of samples (B,) over their images, padding cropped: (B, height, width)."""
        extents = None if self.extents is None else self.extents[positions]
        return sample_gate(self.values[positions], None, extents, size)[:, 0]


@dataclass(frozen=True)
class Heat:
    """What a classifier said about the samples of a feed, and where it looked.

    A gate A (C_stage, h, w) has a map for every channel of its stage. What is shown is their mean, which is ours: it
    says how much of the stage is let through at a place, and is blind to channels that disagree. Taking the mean before
    the map is resized is the same as after, for both are linear.

    Attributes:
        probabilities: (n, K) float64.
        gates: By gate, `"TAP → STAGE"`, its mean over channels, in (0, 1).
        grad_cam: Grad-CAM (see `grad_cam`) of the likeliest class, not negative.
    """

    probabilities: npt.NDArray[np.float64]
    gates: Mapping[str, CoarseMaps]
    grad_cam: CoarseMaps

    @property
    def names(self) -> tuple[str, ...]:
        """The maps in the order to show them: gates, their mean where there are several, Grad-CAM."""
        mean = (MEAN,) if len(self.gates) > 1 else ()
        return (*self.gates, *mean, GRAD_CAM)

    def lay(self, name: str, positions: Sequence[int], size: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Lay one map over the images of samples.

        Args:
            name: One of `names`.
            positions: The B samples.
            size: (height, width) of the result; any shape covers the whole image.

        Returns:
            (B, height, width).
        """
        at = torch.as_tensor(positions)
        if name == GRAD_CAM:
            laid = self.grad_cam.lay(at, size)
        elif name == MEAN:
            laid = torch.stack([gate.lay(at, size) for gate in self.gates.values()]).mean(dim=0)
        else:
            laid = self.gates[name].lay(at, size)
        values: npt.NDArray[np.float32] = laid.numpy()
        return values

    def range(self, name: str) -> tuple[float, float]:
        """Find the lowest and the highest value of a map over the images of all samples, on its own grid."""
        maps = [self.grad_cam] if name == GRAD_CAM else [*self.gates.values()] if name == MEAN else [self.gates[name]]
        height, width = (max(one.values.shape[axis] for one in maps) for axis in (-2, -1))
        count = len(self.probabilities)
        low, high = np.inf, -np.inf
        for start in range(0, count, _AT_ONCE):
            laid = self.lay(name, range(start, min(start + _AT_ONCE, count)), (height, width))
            low, high = min(low, float(laid.min())), max(high, float(laid.max()))
        return low, high


def look(
    classifier: Classifier,
    head: Head,
    feed: Feed,
    *,
    batch_size: int = 64,
    precision: str = "float32",
    progress: Progress = silent,
) -> Heat:
    """Score every sample of a feed without augmentation, and keep where the classifier looked.

    Args:
        classifier: Gated or plain; its probabilities are those of `infer`.
        head: What its outputs mean.
        feed: The samples.
        batch_size: Samples at a time.
        precision: As in training.
        progress: Called after each batch.
    """
    classifier.eval()
    if not len(classifier.backbone.stages):
        msg = (
            f"The image tower of {classifier.options.backbone!r} is not cut into stages here, so there is no last map "
            f"for Grad-CAM: explain needs another backbone."
        )
        raise ConfigError(msg)
    names = [f"{tap} → {stage}" for tap, stage in classifier.options.gates]
    said: list[npt.NDArray[np.float64]] = []
    cams: list[Tensor] = []
    gates: list[list[Tensor]] = [[] for _ in names]
    visible: list[list[Tensor | None]] = [[] for _ in names]
    with _watched(classifier) as seen:
        for batch in feed.batches(torch.split(torch.arange(len(feed)), batch_size)):
            with torch.no_grad():
                p = probabilities(head, outputs(classifier, batch, precision).cpu().double())
            said.append(p.numpy())
            for number in range(len(names)):
                gate, extents = seen.gates[number]
                gates[number].append(gate.float().mean(dim=1, keepdim=True).cpu())
                visible[number].append(None if extents is None else extents.cpu())
            assert seen.last_stage is not None
            net = partial(_head, classifier, seen.last_stage, Seen(batch.features, batch.extents))
            cams.append(grad_cam(net, head, _map_of(seen.last_stage), p.argmax(dim=1)).cpu())
            progress("look", sum(map(len, said)), len(feed))
    return Heat(
        np.concatenate(said),
        {name: CoarseMaps(torch.cat(gates[i]), _joined(visible[i])) for i, name in enumerate(names)},
        CoarseMaps(torch.cat(cams), None),
    )


@torch.no_grad()
def untrained_gates(
    classifier: Classifier, feed: Feed, positions: Sequence[int], *, seeds: Sequence[int], batch_size: int = 64
) -> list[dict[str, CoarseMaps]]:
    """Compute the gates of stored taps as if training had just begun: the same layers, newly drawn from seeds.

    What these show is in the features, not in what the gates have learned.

    Args:
        classifier: A trained one.
        feed: The samples, of which the features are read once and no image.
        positions: Those to compute the gates of.
        seeds: Of the draws.
        batch_size: Samples at a time.

    Returns:
        For each seed the maps of the positions, by gate.
    """
    pairs = enumerate(classifier.options.gates)
    stored = [(number, tap, f"{tap} → {stage}") for number, (tap, stage) in pairs if tap != OWN]
    if not stored:
        return []
    drawn = [_newly_drawn(classifier, feed, seed) for seed in seeds]
    taps = tuple(dict.fromkeys(tap for _, tap, _ in stored))
    gates: list[dict[str, list[Tensor]]] = [{name: [] for _, _, name in stored} for _ in drawn]
    visible: dict[str, list[Tensor | None]] = {name: [] for _, _, name in stored}
    for part in torch.split(torch.as_tensor(positions), batch_size):
        features, extents = feed.stored(part, taps)
        for number, tap, name in stored:
            for fresh, into in zip(drawn, gates, strict=True):
                gate, shown = fresh[number](features[tap], extents)
                into[name].append(gate.mean(dim=1, keepdim=True).cpu())
            visible[name].append(None if shown is None else shown.cpu())  # the same whatever was drawn
    return [
        {name: CoarseMaps(torch.cat(maps), _joined(visible[name])) for name, maps in found.items()} for found in gates
    ]


def _newly_drawn(classifier: Classifier, feed: Feed, seed: int) -> nn.ModuleList:
    """The gates that the classifier would have begun with, had it been built from this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options, backbone = replace(classifier.options, weights="none"), classifier.backbone
        built = backbone.architecture if isinstance(backbone, ClipBackbone) else None
        fresh = Classifier(options, classifier.taps, feed.classes, architecture=built).gates.to(feed.device)
    for mine, theirs in zip(fresh, classifier.gates, strict=True):
        if isinstance(mine.norm, Standardise):  # which knew the features' scale before the training
            mine.norm.load_state_dict(theirs.norm.state_dict())  # type: ignore[union-attr]
    return fresh


def grad_cam(net: Callable[[Tensor], Tensor], head: Head, last_stage: Tensor, classes: Tensor) -> Tensor:
    """Find the places of the last stage that speak for a class: gradient-weighted class activation mapping.

    With the maps x_k (h, w) that the classifier's head sees and y the score of the class,

        CAM = relu(sum over k of a_k x_k),  a_k = mean over the places (i, j) of dy / dx_k(i, j)

    Source: Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization", ICCV
    2017. Ours: x is taken behind the last gate, which is what the head sees; a grade of the continuation head has no
    score of its own, so y is its log-probability there, and the class's output elsewhere.

    Args:
        net: From the last stage to the outputs, (B, C, h, w) to (B, outputs).
        head: What the outputs mean.
        last_stage: x (B, C, h, w).
        classes: (B,) int64.

    Returns:
        (B, 1, h, w) float32, not negative; zero throughout where nothing speaks for the class.
    """
    with torch.enable_grad():
        x = last_stage.detach().float().requires_grad_()
        outputs = net(x).float()
        scores = -losses(head, outputs, classes) if head == "continuation" else outputs.gather(1, classes[:, None])
        (gradient,) = torch.autograd.grad(scores.sum(), x)
    weights = gradient.mean(dim=(-2, -1), keepdim=True)
    return torch.relu((weights * x.detach()).sum(dim=1, keepdim=True))


@dataclass
class _Seen:
    """What went through a classifier: each gate with the part of its grid that is image, and what the head saw."""

    gates: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    last_stage: Tensor | Tokens | None = None


@contextmanager
def _watched(classifier: Classifier) -> Iterator[_Seen]:
    """Keep what passes the gates and reaches the head, until the block ends."""
    seen = _Seen()

    def watch(number: int) -> Any:
        def keep(module: nn.Module, given: Any, gate: tuple[Tensor, Tensor | None]) -> None:
            seen.gates[number] = gate

        return keep

    def keep_last(module: nn.Module, given: tuple[Tensor | Tokens, ...]) -> None:
        seen.last_stage = given[0]

    handles = [slca.register_forward_hook(watch(number)) for number, slca in enumerate(classifier.gates)]
    handles.append(classifier.backbone.head[0].register_forward_pre_hook(keep_last))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _map_of(last_stage: Tensor | Tokens) -> Tensor:
    return last_stage.map if isinstance(last_stage, Tokens) else last_stage


def _head(classifier: Classifier, last_stage: Tensor | Tokens, seen: Seen, x: Tensor) -> Tensor:
    """What the head makes of another map than the last stage's, beside the same class token."""
    return classifier.head(last_stage._replace(map=x) if isinstance(last_stage, Tokens) else x, seen)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None
