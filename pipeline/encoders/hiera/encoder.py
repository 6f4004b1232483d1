"""SAM 2's image encoder for stage one: weights and modules from transformers, computed depth by depth.

The arithmetic is that of `transformers.Sam2VisionModel`, which is the oracle of the tests. What differs: nothing after
the deepest tap is computed, nor the levels of the neck that no tap is, nor its position encodings; padding tokens of
windows are not projected; and sums of blocks stay float32 at any precision. Feature maps are (B, h, w, C) throughout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.encoders.checkpoint import require_same, shapes_of
from pipeline.encoders.frozen import FrozenEncoder
from pipeline.encoders.hiera.files import CONFIG_FILE, absent, weights_file
from pipeline.encoders.hiera.masks import finer_maps, load_everything
from pipeline.encoders.hiera.recipe import HIERAS, Hiera
from pipeline.encoders.layers import attend, cast_products, convolve, join, layer_norm, linear, partition
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.recipe import Recipe
from pipeline.encoders.untrained import count, draw, write_whole
from pipeline.encoders.weight_files import weights_sha256
from pipeline.errors import CheckpointError, from_extra
from pipeline.weights import read_weights

_PREFIX = "vision_encoder."  # of the image encoder's tensors in a whole SAM 2


def build(recipe: Recipe, checkpoint: Path | None, device: str) -> HieraEncoder:
    """Load an encoder onto a device; see `family.build_encoder`.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: A file is missing or not of this encoder.
    """
    if checkpoint is None:
        message = f"{recipe.architecture.name} needs weights: set encoder.checkpoint"
        raise CheckpointError(message)
    file, hiera = weights_file(recipe.architecture.name, checkpoint), recipe.architecture
    assert isinstance(hiera, Hiera)
    if not file.is_file():
        raise CheckpointError(absent(hiera.name, checkpoint))
    everything = load_everything(recipe, file)
    return HieraEncoder(recipe, load_vision(hiera, file), weights_sha256(file), everything).to(device).eval()


def write_untrained(name: str, path: Path, generator: torch.Generator) -> int:
    """Write the two files of a vision encoder; see `family.write_untrained_encoder`."""
    vision, file = new_vision(HIERAS[name]), weights_file(name, path)
    draw(vision, generator)
    write_whole(
        file.with_name(CONFIG_FILE), lambda to: to.write(json.dumps(vision.config.to_dict(), indent=2).encode())
    )
    write_whole(file, lambda to: to.write(safetensors.torch.save(vision.state_dict())))
    return count(vision)


class HieraEncoder(FrozenEncoder):
    """SAM 2's image encoder with taps and a local average for each, frozen."""

    def __init__(self, recipe: Recipe, vision: nn.Module, digest: str, everything: Everything | None = None) -> None:
        """Make an encoder of a `transformers.Sam2VisionModel` with its weights.

        Args:
            recipe: What is computed, and how.
            vision: Changed in place to fit the recipe.
            digest: Of the file that the weights came from.
            everything: What finds masks, where they are asked for.
        """
        super().__init__(recipe, digest, everything)
        self.register_buffer("position", position(vision, recipe.input_px // recipe.architecture.stride_px(0)))
        cast_products(vision, getattr(torch, recipe.precision))
        self.vision = vision

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Maps at each depth; see `FrozenEncoder`."""
        return feature_maps(self.vision, images, self.get_buffer("position"))

    @property
    def mask_depths(self) -> tuple[int, ...]:
        """Ends of the first two stages, whose finer maps go into the masks, and the neck."""
        depths = self._recipe.architecture.named_depths
        assert isinstance(self._recipe.architecture, Hiera)
        return self._recipe.architecture.blocks[0], depths["early"], depths["neck"]

    def find_masks(self, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Masks of one image; see `FrozenEncoder.find_masks`."""
        assert self.everything is not None
        first, second, neck = maps
        masks: tuple[Tensor, Tensor] = self.everything(neck, size, finer_maps(self.vision, first[None], second[None]))
        return masks


def feature_maps(vision: Any, images: Tensor, position: Tensor) -> Iterator[Tensor]:
    """Compute the encoder depth by depth; what is not asked for is not computed.

    Args:
        vision: The `transformers.Sam2VisionModel`.
        images: float32 (B, 3, S, S), normalised.
        position: The position embedding of the grid, (1, S / 4, S / 4, C).

    Yields:
        float32 (B, h, w, C) after the position embedding, after each block, and after the neck.
    """
    x = convolve(vision.backbone.patch_embed.projection, images.permute(0, 2, 3, 1)).contiguous() + position
    yield x
    ends: list[Tensor] = []  # of the stages so far
    for number, block in enumerate(vision.backbone.blocks):
        x = run_block(block, x)
        yield x
        if number in vision.backbone.stage_ends:
            ends = [*ends, x][-2:]  # the neck's coarsest level that SAM 2 uses needs the last two
    finer, coarsest = ends
    lateral = [convolve(layer, end).float() for layer, end in zip(vision.neck.convs, (coarsest, finer), strict=False)]
    yield lateral[1] + lateral[0].repeat_interleave(2, 1).repeat_interleave(2, 2)


def run_block(block: Any, x: Tensor) -> Tensor:
    """One block: attention and a two-layer perceptron, each added to its input in float32.

    The first block of a later stage has more channels and halves the grid, by the maximum of four cells.
    """
    normed = layer_norm(block.layer_norm1, x)
    if block.dim != block.dim_out:
        x = _halved(linear(block.proj, normed)) if block.query_stride else linear(block.proj, normed)
    x = x.float() + _attention(block, normed)
    hidden = F.gelu(linear(block.mlp.proj_in, layer_norm(block.layer_norm2, x)))
    return x + linear(block.mlp.proj_out, hidden)


def _attention(block: Any, x: Tensor) -> Tensor:
    """Multi-head attention over the grid or within windows: (B, h, w, C) to the same, or to a grid of half the side."""
    attn, window, (rows, columns) = block.attn, block.window_size, x.shape[1:3]
    qkv = linear(attn.qkv, x)
    if window > 0:  # a padding token is zero, so its query, key and value are the bias alone
        qkv, windows = partition(qkv, window, attn.qkv.bias)
    count, h, w, _ = qkv.shape
    q, k, v = qkv.view(count, h * w, 3, -1).unbind(2)
    if block.query_stride:
        q = _halved(q.reshape(count, h, w, -1))
        (h, w), (rows, columns) = q.shape[1:3], (rows // 2, columns // 2)
    heads = [t.reshape(count, -1, attn.num_attention_heads, q.shape[-1] // attn.num_attention_heads) for t in (q, k, v)]
    q, k, v = (t.transpose(1, 2) for t in heads)
    out = attend(q, k, v).transpose(1, 2).reshape(count, h, w, -1)
    if window > 0:
        out = join(out, windows)[:, :rows, :columns]
    return linear(attn.proj, out)


def _halved(x: Tensor) -> Tensor:
    """Maximum over 2 x 2 cells: (B, h, w, C) to (B, h / 2, w / 2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def position(vision: Any, grid: int) -> Tensor:
    """The position embedding of a grid: one part stretched over it, another repeated in every window.

    Args:
        vision: The `transformers.Sam2VisionModel`.
        grid: Cells along each side, a multiple of the first stage's window.

    Returns:
        float32 (1, grid, grid, C).
    """
    stretched = F.interpolate(vision.backbone.pos_embed, (grid, grid), mode="bicubic")
    repeats = grid // vision.backbone.pos_embed_window.shape[-1]
    whole: Tensor = stretched + vision.backbone.pos_embed_window.repeat(1, 1, repeats, repeats)
    return whole.permute(0, 2, 3, 1).contiguous()


def load_vision(architecture: Hiera, file: Path) -> nn.Module:
    """Fill transformers' module from the two files of a whole SAM 2, or of its vision encoder alone.

    Args:
        architecture: What they must be of.
        file: The `model.safetensors`, with `config.json` beside it.

    Returns:
        A `transformers.Sam2VisionModel` in float32 on the CPU, in evaluation mode, without gradients.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: A file is missing or of another encoder.
    """
    vision = new_vision(architecture)
    _require_geometry(file.with_name(CONFIG_FILE), architecture, vision.config)
    state = read_weights(file)
    if any(key.startswith(_PREFIX) for key in state):
        state = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    require_same(file, architecture.name, shapes_of(state), shapes_of(vision.state_dict()))
    vision.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    frozen: nn.Module = vision.eval().requires_grad_(False)
    return frozen


def new_vision(architecture: Hiera) -> Any:
    """A `transformers.Sam2VisionModel`, its parameters shapes only (on the `meta` device).

    Raises:
        ConfigError: transformers is not installed.
    """
    with from_extra(f"the encoder {architecture.name!r}", "sam2"):
        from transformers import Sam2VisionConfig, Sam2VisionModel
    with torch.device("meta"):
        return Sam2VisionModel(Sam2VisionConfig(**architecture.settings))


def _require_geometry(file: Path, architecture: Hiera, wanted: Any) -> None:
    """Refuse a folder whose `config.json` describes another encoder, and say which.

    Args:
        file: The `config.json`.
        architecture: What it must describe.
        wanted: Its `Sam2VisionConfig`.

    Raises:
        CheckpointError: The file is missing, no configuration of SAM 2, or another encoder's.
    """
    found = _read_config(file, type(wanted))
    told, asked = _numbers(found), _numbers(wanted)
    differing = [f"{key} is {told[key]!r} instead of {value!r}" for key, value in asked.items() if told[key] != value]
    if differing:
        names = [name for name, other in HIERAS.items() if _numbers(type(wanted)(**other.settings)) == told]
        looks = f"this looks like {' or '.join(names)}" if names else f"this looks like none of {', '.join(HIERAS)}"
        message = f"{file}: not of {architecture.name}: {'; '.join(differing[:3])}; {looks}"
        raise CheckpointError(message)


def _read_config(file: Path, kind: type[Any]) -> Any:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        vision = said.get("vision_config", said if said.get("model_type") == kind.model_type else None)
        if not isinstance(vision, Mapping):
            message = f"its model_type is {said.get('model_type')!r}"
            raise ValueError(message)
        return kind.from_dict(dict(vision))
    except FileNotFoundError:
        problem = f"there is none beside the weights; put the {CONFIG_FILE} there that came with them"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = f"no configuration of SAM 2 as transformers saves it ({error})"
    message = f"{file}: {problem}"
    raise CheckpointError(message)


def _numbers(config: Any) -> dict[str, Any]:
    """What of a configuration changes the arithmetic."""
    backbone, neck = config.backbone_config, ("fpn_hidden_size", "fpn_kernel_size", "fpn_top_down_levels")
    within = (
        "hidden_size", "blocks_per_stage", "embed_dim_per_stage", "num_attention_heads_per_stage", "query_stride",
        "window_size_per_stage", "window_positional_embedding_background_size", "global_attention_blocks",
        "num_query_pool_stages", "patch_kernel_size", "patch_stride", "patch_padding", "mlp_ratio", "hidden_act",
        "layer_norm_eps",
    )  # fmt: skip
    values = {key: getattr(backbone, key) for key in within} | {key: getattr(config, key) for key in neck}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
