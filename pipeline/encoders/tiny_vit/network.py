"""TinyViT's image encoder (MobileSAM, LiteMedSAM), depth by depth, from the tensors of a checkpoint.

The arithmetic is that of the official code, which is the oracle of the tests; how it is computed differs. Batch norms
are folded into convolutions, and affine parts of layer norms and attention's scale into the linear layers behind them.
On a CPU a layer runs over a band of rows at a time, image by image, so that what is between its convolutions stays in
the cache: over whole maps of 256 x 256 cells and 256 channels they wait for memory several times as long as they
compute. Bands also make the bytes of an image's features independent of its batch. Linear layers are convolutions of
one cell, because oneDNN has GELU in the same kernel. Maps are (B, h, w, C); sums of blocks stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.encoders.layers import attend, join, partition, whole_float32
from pipeline.encoders.tiny_vit.recipe import TinyVit

State = Mapping[str, Tensor]
Terms = tuple[Tensor] | tuple[Tensor, Tensor]  # of a sum that is taken in float32

_CELLS = 8192  # of a band on a CPU: 8 MiB between the first layer's convolutions, in reach of a shared cache
_SCORES = 2**20  # of attention at a time on a CPU: 4 MiB
_EPSILON = 1e-5  # of batch norms and layer norms; the neck's is smaller
_NECK_EPSILON = 1e-6


class Convolution(nn.Module):
    """A convolution that keeps the grid but for its stride; of each channel alone where its weights have one each.

    The bias stays float32: rounded to bfloat16, folded batch norms alone would be a third of the features' error.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.channels, into, side, _ = weight.shape
        self.groups = self.channels if into == 1 else 1
        self.stride, self.reach = stride, side // 2

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """Apply it, and GELU if asked for: (B, h, w, C) of any type to (B, h', w', C') of the weights' type."""
        x = x.permute(0, 3, 1, 2).to(self.weight.dtype)
        stride, reach = [self.stride] * 2, [self.reach] * 2
        if _has_pointwise(x):
            name = "gelu" if gelu else "none"
            pointwise = torch.ops.mkldnn._convolution_pointwise
            y = pointwise(x, self.weight, self.bias, reach, stride, [1, 1], self.groups, name, [], "none")
        else:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            with whole_float32(x):
                y = F.conv2d(x, self.weight, bias, stride, reach, groups=self.groups)
            y = F.gelu(y) if gelu else y
        return cast(Tensor, y).permute(0, 2, 3, 1)

    def alone(self, x: Tensor) -> Terms:
        """Apply it, for a sum of nothing else."""
        return (self(x),)


def _has_pointwise(x: Tensor) -> bool:
    """Whether oneDNN convolves, with GELU in the same kernel: what torch's own compiler calls on a CPU.

    Without it, torch leaves convolutions of fewer than 16 images on one thread to a kernel that is twice as slow.
    """
    if x.dtype == torch.float16:  # which oneDNN convolves on few processors, and refuses on the others
        return False
    return x.is_cpu and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


class Network(nn.Module):
    """The image encoder, frozen."""

    def __init__(self, tiny: TinyVit, state: State, dtype: torch.dtype) -> None:
        """Make it of a checkpoint's tensors.

        Args:
            tiny: Its geometry.
            state: float32 tensors by their names in the image encoder, as `TinyVit.shapes` lists them.
            dtype: Of convolutions, linear layers and attention; biases and sums stay float32.
        """
        super().__init__()
        stride = 1 if tiny.patch_px == 1 else 2
        self.first, self.second = (_folded(state, f"patch_embed.seq.{place}", stride) for place in (0, 2))
        self.layers = nn.ModuleList(part for number in range(len(tiny.blocks)) for part in _layer(tiny, number, state))
        self.ends = _ends(tiny)
        self.narrow, self.smooth = (Convolution(state[f"neck.{place}.weight"], None) for place in (0, 2))
        self.norms = nn.ParameterList(
            nn.Parameter(state[f"neck.{place}.{part}"], requires_grad=False)
            for place in (1, 3)
            for part in ("weight", "bias")
        )
        for name, tensor in self.named_parameters():
            if name.endswith((".weight", ".pairs")):
                tensor.data = tensor.to(dtype)

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Compute depth by depth; what is not asked for is not computed.

        Args:
            images: float32 (B, 3, S, S), normalised and padded.

        Yields:
            float32 (B, h, w, C) after the patch embedding, after each layer, and after the neck.
        """
        x = _in_bands(self._embed, images.permute(0, 2, 3, 1), self.first, self.second)
        yield x
        for number, part in enumerate(self.layers, start=1):
            x = part(x)
            if number in self.ends:
                yield x
        for place, layer in enumerate((self.narrow, self.smooth)):
            x = _in_bands(layer.alone, x, layer)
            weight, bias = self.norms[2 * place], self.norms[2 * place + 1]
            x = F.layer_norm(x, weight.shape, weight, bias, _NECK_EPSILON)
        yield x

    def _embed(self, band: Tensor) -> Terms:
        return (self.second(self.first(band, gelu=True)),)


class Convolutions(nn.Module):
    """A block of the first layer: widen, convolve each channel, narrow, add."""

    def __init__(self, state: State, here: str) -> None:
        super().__init__()
        self.widen, self.within, self.narrow = (_folded(state, f"{here}.conv{place}") for place in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block: (B, h, w, C) to the same."""

        def run(band: Tensor) -> Terms:
            return self.narrow(self.within(self.widen(band, gelu=True), gelu=True)), band

        return _in_bands(run, x, self.widen, self.within, self.narrow, gelu=True)


class Merging(nn.Module):
    """The step from a layer to the next: another width, and half the grid or the same."""

    def __init__(self, state: State, here: str, stride: int) -> None:
        super().__init__()
        self.first, self.last = (_folded(state, f"{here}.conv{place}") for place in (1, 3))
        self.within = _folded(state, f"{here}.conv2", stride)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the step: (B, h, w, C) to (B, h', w', C')."""

        def run(band: Tensor) -> Terms:
            return (self.last(self.within(self.first(band, gelu=True), gelu=True)),)

        return _in_bands(run, x, self.first, self.within, self.last)


class Block(nn.Module):
    """A block of a later layer: attention within windows, a convolution of each channel, a two-layer perceptron."""

    def __init__(self, state: State, here: str, heads: int, window: int) -> None:
        super().__init__()
        self.attention = Attention(state, f"{here}.attn", heads, window)
        self.local = _folded(state, f"{here}.local_conv")
        self.widen = _after_norm(state, f"{here}.mlp.norm", f"{here}.mlp.fc1")
        self.narrow = _linear(state[f"{here}.mlp.fc2.weight"], state[f"{here}.mlp.fc2.bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block: (B, h, w, C) to the same."""

        def rest(band: Tensor) -> Terms:
            local = self.local(band)
            return self.narrow(self.widen(_normalise(local), gelu=True)), local

        return _in_bands(rest, self.attention(x), self.local)


class Attention(nn.Module):
    """Multi-head attention within windows, added to its input.

    The grid is padded at the bottom and on the right to whole windows. A padding token is zero before and after the
    layer norm, so its query, key and value are the bias of the folded layer.

    Attributes:
        pairs: (1, heads, n, n), biases of a window's n cells, by the differences of their rows and columns.
    """

    def __init__(self, state: State, here: str, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = _after_norm(state, f"{here}.norm", f"{here}.qkv", heads)
        self.out = _linear(state[f"{here}.proj.weight"], state[f"{here}.proj.bias"])
        self.pairs = nn.Parameter(_pairs(state[f"{here}.attention_biases"], window), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute attention: (B, h, w, C) to the same."""
        return _in_bands(self._of_windows, x, rows=self.window)

    def _of_windows(self, x: Tensor) -> Terms:
        """Attention of whole rows of windows, of which the last may be cut off: (B, h, w, C) to what it is added to."""
        h, w, channels = x.shape[1:]
        normal = _normalise(x).to(self.qkv.weight.dtype)
        windows, grid = partition(normal, self.window, normal.new_zeros(channels))
        cells = windows.reshape(1, len(windows), -1, channels)
        qkv = self.qkv(cells).reshape(*cells.shape[1:3], 3, self.heads, -1)
        mixed = self._mix(qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(windows.shape)
        return self.out(join(mixed, grid)[:, :h, :w]), x

    def _mix(self, qkv: Tensor) -> Tensor:
        """Attention of each window by itself: (3, windows, heads, n, d) to (windows, heads, n, d).

        In bfloat16 on a CPU two products are faster than the kernel that does all in one, which works on small blocks;
        a few windows at a time, so that their scores stay in the cache.
        """
        _, windows, heads, n, d = qkv.shape
        if not qkv.is_cpu or qkv.dtype != torch.bfloat16:
            q, k, v = qkv
            return attend(q, k, v, self.pairs, scale=1.0)
        mixed = qkv.new_empty(windows, n, heads, d).transpose(1, 2)
        few = max(1, _SCORES // (heads * n**2))
        for first in range(0, windows, few):
            at = slice(first, first + few)
            q, k, v = qkv[:, at].contiguous()
            scores = (q @ k.mT).float().add_(self.pairs)
            mixed[at] = scores.softmax(-1).to(v.dtype) @ v
        return mixed


def _layer(tiny: TinyVit, number: int, state: State) -> Iterator[nn.Module]:
    """A layer: its blocks, and the step to the next one."""
    here = f"layers.{number}"
    for block in range(tiny.blocks[number]):
        if number == 0:
            yield Convolutions(state, f"{here}.blocks.{block}")
        else:
            yield Block(state, f"{here}.blocks.{block}", tiny.heads[number], tiny.windows[number])
    if number + 1 < len(tiny.blocks):
        yield Merging(state, f"{here}.downsample", tiny.stride_px(number + 1) // tiny.stride_px(number))


def _ends(tiny: TinyVit) -> set[int]:
    """How many parts have run at the end of each layer."""
    steps = [*(blocks + 1 for blocks in tiny.blocks[:-1]), tiny.blocks[-1]]
    return set(accumulate(steps))


def _linear(weight: Tensor, bias: Tensor) -> Convolution:
    """A linear layer as a convolution of one cell."""
    return Convolution(weight[:, :, None, None], bias)


def _folded(state: State, here: str, stride: int = 1) -> Convolution:
    """A convolution with the batch norm behind it."""
    scale = state[f"{here}.bn.weight"] / (state[f"{here}.bn.running_var"] + _EPSILON).sqrt()
    weight = state[f"{here}.c.weight"] * scale[:, None, None, None]
    return Convolution(weight, state[f"{here}.bn.bias"] - state[f"{here}.bn.running_mean"] * scale, stride)


def _after_norm(state: State, norm: str, linear: str, heads: int = 0) -> Convolution:
    """A linear layer with the affine part of the layer norm before it.

    Args:
        state: The checkpoint's tensors.
        norm: Name of the layer norm.
        linear: Name of the linear layer.
        heads: Of attention, if its queries, keys and values are what the layer makes: then they are put in that order
            (the official one is by head), and attention's scale goes into the queries.
    """
    weight = state[f"{linear}.weight"] * state[f"{norm}.weight"]
    bias = state[f"{linear}.bias"] + state[f"{linear}.weight"] @ state[f"{norm}.bias"]
    if heads:
        d = len(bias) // (3 * heads)
        order = torch.arange(len(bias)).view(heads, 3, d).transpose(0, 1).flatten()
        scale = torch.ones(3, heads * d)
        scale[0] = d**-0.5
        weight, bias = weight[order] * scale.view(-1, 1), bias[order] * scale.flatten()
    return _linear(weight, bias)


def _pairs(table: Tensor, window: int) -> Tensor:
    """Biases of all pairs of a window's cells, from those of (row difference, column difference), row by row.

    Args:
        table: (heads, window ** 2).
        window: Its side, cells.

    Returns:
        (1, heads, window ** 2, window ** 2).
    """
    at = torch.arange(window)
    apart = (at[:, None] - at).abs()
    places = apart[:, None, :, None] * window + apart[None, :, None, :]  # [row, column, row, column]
    return table[:, places.flatten()].view(1, len(table), window**2, window**2)


def _normalise(x: Tensor) -> Tensor:
    """Layer norm over channels, its affine part folded away."""
    return F.layer_norm(x, x.shape[-1:], None, None, _EPSILON)


def _in_bands(
    run: Callable[[Tensor], Terms], x: Tensor, *layers: Convolution, rows: int = 1, gelu: bool = False
) -> Tensor:
    """Run layers over bands of rows of each image on a CPU, over the whole elsewhere; the result is the same.

    Args:
        run: Convolutions, and what works cell by cell or within `rows` rows; gives the terms of its result.
        x: (B, h, w, C).
        layers: The convolutions, which tell how far a result reaches up and down, and its size; none keeps the size.
        rows: Bands begin at a multiple of it.
        gelu: Whether GELU is applied to the sum.

    Returns:
        float32 (B, h', w', C'), the sum of the terms.
    """
    halo, stride = 0, 1  # in rows of x
    for layer in layers:
        halo += layer.reach * stride
        stride *= layer.stride
    halo = -(-halo // stride) * stride  # so that a band's first row of results is a whole number of strides away
    batch, h, w, channels = x.shape
    step = max(rows, stride)
    images, height = (1, max(step, _CELLS // w // step * step)) if x.is_cpu else (batch, h)
    out = x.new_empty(batch, h // stride, w // stride, layers[-1].channels if layers else channels, dtype=torch.float32)
    for image in range(0, batch, images):
        at = slice(image, image + images)
        for top in range(0, h, height):
            above, end = min(halo, top), min(top + height, h)
            inside = slice(above // stride, (above + end - top) // stride)
            terms = [term[:, inside] for term in run(x[at, top - above : end + halo])]
            band = out[at, top // stride : end // stride]
            if len(terms) == 1:
                band.copy_(terms[0])
            else:
                torch.add(terms[0].float(), terms[1], out=band)
            if gelu:
                torch.ops.aten.gelu_(band)
    return out
