"""A classifier as an ONNX file: images, features and extents in, probabilities out, and the same numbers as torch.

It is written at operator set 18, the lowest that torch's exporter speaks, for the sake of older runtimes. Standardising
the image and turning outputs into probabilities are part of the graph, so that nobody has to repeat them. The file is
stripped of what the exporter notes beside the graph: source lines and paths of the machine that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import records
from pipeline.errors import RunError, from_extra
from pipeline.mask_tap import is_masks, is_scores
from pipeline.model.classifier import Classifier
from pipeline.model.tasks import Head, probabilities
from pipeline.model.uses import Seen
from pipeline.train import trained_model

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
TOLERANCE = 1e-4  # of a probability, between this file and torch
_BATCHES = (1, 3)  # that the file is checked with; it was traced with another one


class Served(nn.Module):
    """A classifier as others call it: grey levels in, probabilities out.

    Args:
        classifier: In evaluation mode.
        head: What its outputs mean.

    Attributes:
        inputs: Names of what `forward` takes, in order: `images` (B, 3, S, S) float32, whole numbers in 0..255, where
            the classifier looks at any; where it reads stored taps `extents` (B, 2), the part of the features' grid
            that is image; and each tap.
    """

    def __init__(self, classifier: Classifier, head: Head) -> None:
        super().__init__()
        self.classifier, self.head = classifier, head
        seen = ("images",) if classifier.options.reads_images else ()
        self.inputs = (*seen, *(("extents",) if classifier.taps else ()), *classifier.taps)
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Give probabilities (B, K) float32."""
        images = inputs[0] if self.classifier.options.reads_images else None
        features = inputs[0 if images is None else 1 :]
        extents = features[0] if features else None
        maps = dict(zip(self.classifier.taps, features[1:], strict=True)) if features else {}
        sight = None if images is None else self.classifier.see(images, Seen(maps, extents))
        return probabilities(self.head, self.classifier(sight, maps, extents))

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Draw inputs of the right shapes from a seed."""
        random = torch.Generator().manual_seed(seed)
        side = self.classifier.options.image_px
        images: tuple[Tensor, ...] = ()
        if self.classifier.options.reads_images:
            images = (torch.randint(0, 256, (batch, 3, side, side), generator=random).float(),)
        if not self.classifier.taps:
            return images
        extents = 0.5 + 0.5 * torch.rand(batch, 2, generator=random)
        maps = (_drawn(tap, (batch, *shape), random) for tap, shape in self.classifier.taps.items())
        return *images, extents, *maps


def _drawn(tap: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Draw features; of masks squares of four cells with few ranks, and of their scores some in 0..1."""
    if is_masks(tap):
        coarse = torch.randint(-3, 4, (*shape[:2], *(-(-side // 4) for side in shape[2:])), generator=random)
        fine = coarse.clamp(min=0).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        return fine[:, :, : shape[2], : shape[3]].to(torch.uint8)
    draw = torch.rand if is_scores(tap) else torch.randn
    return draw(shape, generator=random)


def write_onnx(folder: Path, path: Path) -> dict[str, Any]:
    """Write the classifier of a run as ONNX, and check the file against torch.

    Args:
        folder: The run.
        path: The file.

    Returns:
        JSON values: `opset`; `inputs`, by name their shapes, B the number of images; `largest_difference` of a
        probability to torch's.

    Raises:
        ConfigError: The extra `onnx` is not installed.
        RunError: The classifier holds something that ONNX has no word for, or the file computes other numbers.
    """
    classifier, description = trained_model.load_classifier(folder)
    served = Served(classifier, description.head)
    content = _exported(served, folder)
    difference = _largest_difference(served, content)
    if not difference <= TOLERANCE:
        msg = (
            f"The ONNX file of {str(folder)!r} gives probabilities that differ from torch's by {difference:.2g}, more "
            f"than {TOLERANCE:g}: it is not written; leave out --onnx, or try another version of torch."
        )
        raise RunError(msg)
    with records.replacing(path) as file:
        file.write(content)
    shapes = {name: ["B", *value.shape[1:]] for name, value in zip(served.inputs, served.example(1), strict=True)}
    return {"opset": OPSET, "inputs": shapes, "largest_difference": difference}


def _exported(served: Served, folder: Path) -> bytes:
    """The file as bytes; any number of images."""
    with from_extra("Writing ONNX", "onnx"):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    inputs = served.example(2)
    free = {0: torch.export.Dim("batch", min=1)}
    sizes = ((free,) * len(inputs),)
    try:
        # strict: sizes that the code reads with `len` stay free, where a looser trace would freeze them without a word
        program = torch.export.export(served, inputs, dynamic_shapes=sizes, strict=True)
        written = torch.onnx.export(
            program,
            input_names=list(served.inputs),
            output_names=["probabilities"],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert written is not None
        model = written.model_proto
    except Exception as error:  # of many kinds: tracer, decomposition, translation
        first = str(error).strip().splitlines()[0]
        backbone = served.classifier.options.backbone
        msg = f"The {backbone} in {str(folder)!r} cannot be written as ONNX ({first}): export it without --onnx."
        raise RunError(msg) from error
    _strip(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _strip(model: ModelProto) -> None:
    """Take away what tells of the machine, and call the free size `batch`."""
    graphs = [model.graph]
    parts: list[Any] = [model, model.graph, *model.functions]
    for function in model.functions:
        parts += [*function.node, *function.value_info]
    while graphs:
        graph = graphs.pop()
        parts += [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
        graphs += [held.g for node in graph.node for held in node.attribute if held.HasField("g")]
        _name_batch((*graph.input, *graph.output, *graph.value_info))
    for part in parts:
        part.ClearField("doc_string")
        if "metadata_props" in part.DESCRIPTOR.fields_by_name:
            part.ClearField("metadata_props")


def _name_batch(values: Iterable[Any]) -> None:
    for value in values:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param.isidentifier():
                size.dim_param = "batch"


@torch.no_grad()
def _largest_difference(served: Served, content: bytes) -> float:
    """How far probabilities are from torch's, at most, over a few batches."""
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    differences = []
    for batch in _BATCHES:
        inputs = served.example(batch, seed=batch)
        named = {name: value.numpy() for name, value in zip(served.inputs, inputs, strict=True)}
        differences.append(np.abs(session.run(None, named)[0] - served(*inputs).numpy()).max())
    return float(np.max(differences))
