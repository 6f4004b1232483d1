"""Texts of a CLIP: the prompts of classes, the tokenizer, and what the text tower makes of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.clip.files import folder_of
from pipeline.clip.library import first_line, import_open_clip, offline
from pipeline.clip.names import CLIP, DEMO, FOLDER
from pipeline.clip.towers import DEMO_CONTEXT, DEMO_WORDS, architecture, build
from pipeline.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, and prompts can be refused without it
    from torch import Tensor

TEMPLATE = "This is a photo of {class}"


def prompts(
    classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,), words: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], ...]:
    """Write the texts of each class: every template with the class's words, its own name where it has none.

    Args:
        classes: Names of the classes.
        templates: Sentences with `{class}` in them.
        words: What to call a class, by its name.

    Raises:
        ConfigError: There is no template, one lacks `{class}` or has other braces, or the words are of no class.
    """
    if not templates:
        msg = f"There is no template for the prompts: give at least one, such as {TEMPLATE!r}."
        raise ConfigError(msg)
    for template in templates:
        if "{class}" not in template:
            msg = f"The template {template!r} has no {{class}} in it: write it where the class goes, as in {TEMPLATE!r}"
            raise ConfigError(msg)
        if other := [place for place in re.findall(r"\{[^{}]*\}", template) if place != "{class}"]:
            msg = f"The template {template!r} has {other[0]} in it, and only {{class}} is filled in: write it without."
            raise ConfigError(msg)
    for name, said in (words or {}).items():
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.0)
            msg = (
                f"There are words for a class {name!r}, and the data set's classes are "
                f"{', '.join(map(repr, classes))}: did you mean {near[0]!r}?"
            )
            raise ConfigError(msg)
        if not said.strip():
            msg = f"The words for the class {name!r} are empty: write what the images show, or leave the class out."
            raise ConfigError(msg)
    called = [(words or {}).get(name, name) for name in classes]
    return tuple(tuple(template.replace("{class}", name) for template in templates) for name in called)


def tokenizer(name: str) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer of a model: texts to (n, context length) int64.

    Raises:
        ConfigError: There is no such name, or its tokenizer is not here.
    """
    open_clip = import_open_clip()
    if name == DEMO:
        return _demo_tokenizer(open_clip)
    folder = folder_of(name)
    wanted = name.removeprefix(CLIP) if folder is None else f"{FOLDER}{folder}"
    try:
        with offline():
            found: Callable[[Sequence[str]], Tensor] = open_clip.get_tokenizer(wanted)
    except (OSError, ValueError) as error:
        msg = (
            f"The tokenizer of {name!r} is not here ({first_line(error)}): `pipeline prepare` fetches it; "
            f"without a network copy its files {'into ' + repr(str(folder)) if folder else 'to the cache of the hub'}."
        )
        raise ConfigError(msg) from error
    return found


def encode_classes(model: Any, tokens: Tensor, classes: int) -> Tensor:
    """Embed classes: the mean of the unit embeddings of each one's prompts, of length one again.

    Args:
        model: Of `build`.
        tokens: (classes * templates, context length), the prompts of a class one after the other.
        classes: How many there are.

    Returns:
        (classes, E), differentiable in the text tower.
    """
    from torch.nn import functional as F

    each = F.normalize(model.encode_text(tokens), dim=-1)
    mean: Tensor = F.normalize(each.view(classes, -1, each.shape[-1]).mean(dim=1), dim=-1)
    return mean


def class_features(name: str, file: Path, prompts: Sequence[Sequence[str]]) -> tuple[Tensor, float]:
    """Embed the prompts of classes with the text tower of a file of weights.

    Args:
        name: See `pipeline.clip.names`.
        file: Weights of both towers.
        prompts: Texts of each class, as `prompts` writes them; each class has as many.

    Returns:
        (classes, E) of length one, and the temperature exp(s) that image features are compared with them by.

    Raises:
        ConfigError: There is no such name, or its tokenizer is not here.
        CheckpointError: The file is of another model.
    """
    import torch

    model = build(architecture(name), file)
    with torch.no_grad():
        found = encode_classes(model, tokenizer(name)([text for texts in prompts for text in texts]), len(prompts))
        scale = float(model.logit_scale.exp())
    return found, scale


def _demo_tokenizer(open_clip: ModuleType) -> Callable[[Sequence[str]], Tensor]:
    """CLIP's own tokenizer with its 49,408 words folded into the miniature's few, which may let two words be one."""
    whole = open_clip.SimpleTokenizer(context_length=DEMO_CONTEXT)
    first, last = whole.all_special_ids  # the text's start, and its end, which must stay the largest number

    def tokenize(texts: Sequence[str]) -> Tensor:
        ids: Tensor = whole(list(texts))
        folded = 1 + ids % (DEMO_WORDS - 3)
        folded[ids == 0] = 0
        folded[ids == first] = DEMO_WORDS - 2
        folded[ids == last] = DEMO_WORDS - 1
        return folded

    return tokenize
