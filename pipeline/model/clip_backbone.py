"""CLIP as a backbone: its image tower in stages, and as its head the cosine with the prompts of the classes.

The tower's patches become the stem, its blocks the four stages, and its last block belongs to the head: what a gate
does to the last map must still reach the class token. The text tower is asked once and left behind where it does not
train; a finished model holds the embeddings of its classes instead, and needs neither words nor `open_clip`'s weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import clip
from pipeline.errors import ConfigError, from_extra
from pipeline.model.backbones import STAGES, Backbone, Parts, Tokens, zero_linear

_ADAPTER = "default"  # peft's name for the only one


@dataclass(frozen=True)
class ClipOptions:
    """What CLIP is asked, and how much of its image tower may move.

    Attributes:
        templates: Sentences with `{class}` in them; the embeddings of several are averaged.
        words: Pairs (class, what to call it); a class without any goes by its name.
        lora: Rank of the low-rank adapters on the linear layers of the image tower's blocks, which then train instead
            of the tower; 0 for none.
    """

    templates: tuple[str, ...] = (clip.TEMPLATE,)
    words: tuple[tuple[str, str], ...] = ()
    lora: int = 0


class Prompts(nn.Module):
    """A text tower and the prompts that it reads.

    Args:
        model: open_clip's; what is not of its text tower is taken from it.
        tokens: (K * templates, context length), the prompts of a class one after the other.
        classes: K.
    """

    def __init__(self, model: Any, tokens: Tensor, classes: int) -> None:
        super().__init__()
        for part in ("visual", "logit_scale", "logit_bias", "text_decoder"):
            if hasattr(model, part):
                delattr(model, part)
        self.tower, self._classes = model, classes
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self) -> Tensor:
        """Embed the classes: (K, E), each of length one."""
        assert isinstance(self.tokens, Tensor)
        return clip.encode_classes(self.tower, self.tokens, self._classes)


class Cosine(nn.Module):
    """The head of CLIP: exp(s) cos(image, class) for each class, with the learned temperature s.

    Source: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021. Its
    bound of 100 on exp(s) is left out: fine-tuning hardly moves s, and some published weights lie above it.

    Args:
        classes: (K, E), the embedding of each class, of length one.
        scale: s.
        bias: Added to all logits, as SigLIP has it; None for none.
        beside: Numbers that are read beside the embedding (late fusion), by a linear layer that starts at zero.
        text: The text tower where it trains: asked at each step then, and once where the model is put to use.
    """

    def __init__(
        self, classes: Tensor, scale: Tensor, bias: Tensor | None, beside: int = 0, text: Prompts | None = None
    ) -> None:
        super().__init__()
        self.classes: Tensor
        self.register_buffer("classes", classes)
        self.logit_scale = nn.Parameter(scale.detach().clone())
        self.logit_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.beside = zero_linear(beside, len(classes)) if beside else None
        self.text = text

    def forward(self, embedding: Tensor) -> Tensor:
        """Compare image embeddings, and what stands beside them, (B, E + beside) with the classes: (B, K) float32."""
        classes = self.text() if self.text is not None and self.training else self.classes
        size = classes.shape[1]
        with torch.autocast(embedding.device.type, enabled=False):  # a temperature of 100 makes rounding visible
            embedding = embedding.float()
            images = F.normalize(embedding[:, :size], dim=-1)
            logits: Tensor = self.logit_scale.exp() * images @ classes.float().T
            if self.logit_bias is not None:
                logits = logits + self.logit_bias
            return logits if self.beside is None else logits + self.beside(embedding[:, size:])

    def train(self, mode: bool = True) -> Cosine:
        """Switch between training and use."""
        super().train(mode)
        if not mode and self.text is not None:
            with torch.no_grad():
                self.classes.copy_(self.text())
        return self


class ClipBackbone(Backbone):
    """An image tower in stages with the cosine as its head.

    Attributes:
        architecture: What the towers are built from.
        prompts: Texts of each class; empty where the model was built to be loaded.
    """

    def __init__(
        self,
        name: str,
        parts: Parts,
        image_px: int,
        architecture: clip.Architecture,
        prompts: Mapping[str, Sequence[str]],
    ) -> None:
        super().__init__(name, parts, side_px=image_px, mean=architecture.mean, std=architecture.std)
        self.architecture, self.prompts = architecture, dict(prompts)

    def frozen_parts(self, names: Sequence[str]) -> list[nn.Module]:
        """The modules of named stages; `"backbone"` is the whole image tower, which leaves the temperature."""
        if "backbone" in names:
            return [*self.stages, *self.head[:-1]]
        if names and not len(self.stages):
            msg = (
                f"freeze names {names[0]!r}, and the image tower of {self.name!r} is not cut into stages here: freeze "
                f"'backbone', which is all of it."
            )
            raise ConfigError(msg)
        return super().frozen_parts(names)

    def text_parameters(self) -> Iterable[nn.Parameter]:
        """Those of the text tower where it trains."""
        text = self.head[-1].text
        return text.parameters() if isinstance(text, Prompts) else ()

    def plain_state(self) -> dict[str, Tensor]:
        """What a finished model keeps: adapters added to the weights that they adapt, and no text tower."""
        state = {key: value for key, value in self.state_dict().items() if not key.startswith("head.1.text.")}
        for name, module in self.named_modules():
            adapted = f"{name}.base_layer.weight"
            if f"{name}.lora_A.{_ADAPTER}.weight" in state:
                added: Any = module.get_delta_weight(_ADAPTER)
                state[adapted] = state[adapted] + added.detach()
        return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


def build_clip(
    name: str,
    outputs: int,
    weights: str,
    options: ClipOptions,
    *,
    image_px: int,
    classes: Sequence[str] | None = None,
    architecture: clip.Architecture | None = None,
    beside: int = 0,
    trains_text: bool = False,
) -> ClipBackbone:
    """Build a CLIP as a backbone.

    Args:
        name: Of `pipeline.clip`.
        outputs: Numbers per image: K.
        weights: See `pipeline.clip.weights_file`.
        options: What it is asked.
        image_px: Side of its images; position embeddings are resampled to it.
        classes: Names of the classes; None builds an image tower for weights that are to be loaded, without adapters
            and with nothing known of the classes.
        architecture: What it is built from; None is what the name means.
        beside: Numbers that the head reads beside the embedding.
        trains_text: Keep the text tower, which trains.

    Raises:
        ConfigError: There is no such CLIP, an extra is not installed, or a class, a template or the side does not fit.
        CheckpointError: The weights are not there, or another model's.
    """
    asked = None if classes is None else clip.prompts(classes, options.templates, dict(options.words))
    if asked is not None and len(asked) != outputs:
        msg = (
            f"The head of {name!r} compares with {len(asked)} classes, and this task's head puts out {outputs} "
            f"numbers: set train.loss to 'cross_entropy' for grades, or choose another backbone."
        )
        raise ConfigError(msg)
    wanted = architecture or clip.architecture(name, weights)
    file = clip.present_weights(name, weights)
    model = clip.build(wanted, file, image_px=image_px, text=asked is not None)
    stages, rest = _cut(model.visual)
    text, embedded = None, torch.zeros(outputs, int(wanted.config["embed_dim"]))
    scale, bias = model.logit_scale, getattr(model, "logit_bias", None)
    if asked is not None:
        tokens = clip.tokenizer(name)([prompt for of_class in asked for prompt in of_class])
        text = Prompts(model, tokens, outputs)
        with torch.no_grad():
            embedded = text()
        if options.lora:
            _adapt(name, [*stages, rest], options.lora)
    head = nn.Sequential(rest, Cosine(embedded, scale, bias, beside, text if trains_text else None))
    return ClipBackbone(name, (stages, head), image_px, wanted, dict(zip(classes or (), asked or (), strict=True)))


def _adapt(name: str, tower: list[nn.Module], rank: int) -> None:
    """Put low-rank adapters on the linear layers of an image tower's blocks, and let nothing else of it train.

    Their scale is one (peft's alpha is the rank); on which layers they lie is ours.

    Raises:
        ConfigError: peft is not installed, or the tower has no such blocks.
    """
    with from_extra("model.clip.lora", "clip"):
        import peft
    whole = nn.ModuleList(tower)
    layers = [key for key, module in whole.named_modules() if ".block" in key and isinstance(module, nn.Linear)]
    if not layers:
        msg = f"model.clip.lora is {rank}, and the image tower of {name!r} has no transformer blocks here: set it to 0."
        raise ConfigError(msg)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), whole)


def _cut(visual: Any) -> tuple[list[nn.Module], nn.Module]:
    """Cut an image tower into the five stages and the rest of it; without stages where it is of another kind."""
    kind = type(visual).__name__
    if kind == "ModifiedResNet":
        stem = nn.Sequential(
            visual.conv1, visual.bn1, visual.act1, visual.conv2, visual.bn2, visual.act2, visual.conv3, visual.bn3,
            visual.act3, visual.avgpool,
        )  # fmt: skip
        return [stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4], visual.attnpool
    if kind == "VisionTransformer" and visual.attn_pool is None and visual.pool_type in ("tok", "avg"):
        blocks = list(visual.transformer.resblocks)
        for block in blocks:
            if isinstance(block.attn, nn.MultiheadAttention):
                block.attn = _Attention(block.attn)
        if len(blocks) >= len(STAGES):
            return [_Patches(visual), *_grouped(blocks[:-1])], _Rest(visual, blocks[-1])
    if kind == "TimmModel" and type(visual.trunk).__name__ == "VisionTransformer":
        blocks = list(visual.trunk.blocks)
        if len(blocks) >= len(STAGES):
            return [_TimmPatches(visual.trunk), *_grouped(blocks[:-1])], _TimmRest(visual, blocks[-1])
    return [], _Uncut(visual)


def _grouped(blocks: list[nn.Module]) -> list[nn.Module]:
    """Share blocks out among four stages, the first of which take what does not divide."""
    count = len(STAGES) - 1
    ends = [-(-len(blocks) * (number + 1) // count) for number in range(count)]
    return [_Blocks(blocks[start:end]) for start, end in zip((0, *ends[:-1]), ends, strict=True)]


class _Attention(nn.Module):
    """torch's attention of a sequence to itself as two linear layers, which take adapters and can be exported."""

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = whole.num_heads
        self.qkv = nn.Linear(whole.embed_dim, 3 * whole.embed_dim, device="meta")
        self.qkv.weight, self.qkv.bias = whole.in_proj_weight, whole.in_proj_bias
        self.proj = nn.Linear(whole.embed_dim, whole.embed_dim, device="meta")
        self.proj.weight, self.proj.bias = whole.out_proj.weight, whole.out_proj.bias

    def forward(self, x: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, None]:
        """Attend within (B, n, C), whatever else torch's own would be given; the second is the weights, not kept."""
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, n, d) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def _as_row(tokens: Tokens) -> Tensor:
    """Lay all tokens in a row, those of no place first: (B, n + h w, C)."""
    return torch.cat((tokens.beside, tokens.map.flatten(2).transpose(1, 2)), dim=1)


def _as_map(row: Tensor, beside: int, size: tuple[int, int]) -> Tokens:
    """Undo `_as_row`."""
    others, placed = row[:, :beside], row[:, beside:].transpose(1, 2)
    return Tokens(placed.reshape(placed.shape[0], placed.shape[1], *size), others)


class _Uncut(nn.Module):
    """An image tower of another kind, whole: images (B, 3, H, W) to (B, E)."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.tower = visual

    def forward(self, images: Tensor) -> Tensor:
        found: Any = self.tower(images)
        embedding: Tensor = found[0] if isinstance(found, tuple) else found  # CoCa's gives its tokens as well
        return embedding


class _Blocks(nn.Module):
    """Some of a transformer's blocks."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens: Tokens) -> Tokens:
        row = _as_row(tokens)
        for block in self.blocks:
            row = block(row)
        return _as_map(row, tokens.beside.shape[1], (tokens.map.shape[2], tokens.map.shape[3]))


class _Patches(nn.Module):
    """What open_clip's vision transformer does before its blocks."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.conv1, self.norm = visual.conv1, visual.ln_pre
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding

    def forward(self, images: Tensor) -> Tokens:
        patches = self.conv1(images)
        first = self.class_embedding.expand(len(patches), 1, -1)
        row = self.norm(_as_row(Tokens(patches, first)) + self.positional_embedding)
        return _as_map(row, 1, (patches.shape[2], patches.shape[3]))


class _Rest(nn.Module):
    """What it does after all blocks but one: the last one, pool and projection, to (B, E)."""

    def __init__(self, visual: Any, block: nn.Module) -> None:
        super().__init__()
        self.block, self.norm, self.proj = block, visual.ln_post, visual.proj
        self._mean, self._norm_last = visual.pool_type == "avg", visual.final_ln_after_pool

    def forward(self, tokens: Tokens) -> Tensor:
        row = self.block(_as_row(tokens))
        row = row if self._norm_last else self.norm(row)
        pooled: Tensor = row[:, 1:].mean(dim=1) if self._mean else row[:, 0]
        pooled = self.norm(pooled) if self._norm_last else pooled
        return pooled if self.proj is None else pooled @ self.proj


class _TimmPatches(nn.Module):
    """What timm's vision transformer does before its blocks."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = _without(trunk, "blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head")

    def forward(self, images: Tensor) -> Tokens:
        trunk: Any = self.trunk
        row = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))
        return _as_map(row, trunk.num_prefix_tokens, trunk.patch_embed.grid_size)


class _TimmRest(nn.Module):
    """What it does after all blocks but one, and open_clip's projection, to (B, E)."""

    def __init__(self, visual: Any, block: nn.Module) -> None:
        super().__init__()
        self.block, self.projection = block, visual.head
        self.trunk = _without(visual.trunk, "blocks", "patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre")

    def forward(self, tokens: Tokens) -> Tensor:
        trunk: Any = self.trunk
        embedding: Tensor = self.projection(trunk.forward_head(trunk.norm(self.block(_as_row(tokens)))))
        return embedding


def _without(trunk: Any, *parts: str) -> nn.Module:
    """A module like another one, which shares its parts but for some."""
    other: nn.Module = copy.copy(trunk)
    other._modules, other._parameters = dict(trunk._modules), dict(trunk._parameters)
    for part in parts:
        if part in other._modules or part in other._parameters:
            setattr(other, part, None)
    return other
