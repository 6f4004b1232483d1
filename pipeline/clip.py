"""CLIP by name: what a name means, where its weights lie, its two towers and its tokenizer; `open_clip` builds them.

A name is `clip:` and one of open_clip's, such as `clip:ViT-B-32`; `clip:hf-hub:OWNER/NAME` for a model on the hub, such
as BiomedCLIP; `clip:local-dir:FOLDER` for the files of such a model; or `clip:demo`, the miniature. Nothing is
downloaded but by `download`. open_clip, an extra, is imported when the first model is asked for.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.download import TIMEOUT_SECONDS, fetch
from pipeline.errors import CheckpointError, ConfigError, needs_extra
from pipeline.progress import Progress, silent

if TYPE_CHECKING:  # torch takes seconds to import, and a name can be refused without it
    from torch import Tensor, nn

CLIP = "clip:"  # what the names begin with
DEMO = "clip:demo"
TEMPLATE = "This is a photo of {class}"
OWN = "own"  # the weights that lie beside a model's own configuration, in its folder or on the hub
_HUB, _FOLDER = "hf-hub:", "local-dir:"
_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "merges.txt",
              "vocab.json", "spiece.model", "tokenizer.model")  # fmt: skip
_TEXT_CONFIG = Path("text", "config.json")  # of a text tower that transformers builds; elsewhere on the hub

# The miniature: a CLIP in open_clip's own layout, small enough to be trained on two cores while one waits. Its image
# tower is a ResNet: a ViT of that size had learnt nothing of outlines when this told them apart (zero-shot AUC .53 and
# .79 after 80 steps of training on the demo's kind of images).
_DEMO_WORDS = 2048
_DEMO: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": _DEMO_WORDS, "width": 64, "heads": 2, "layers": 2},
}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}  # where only images are encoded


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a CLIP and to feed it images; plain values, so that a trained model can record it.

    Attributes:
        config: Arguments of open_clip's model.
        mean: Of red, green and blue in 0..1, which its images are centred by.
        std: What they are divided by then.
    """

    config: Mapping[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def image_px(self) -> int:
        """Side of the image that its image tower was made for."""
        size = self.config["vision_cfg"].get("image_size", 224)
        return int(size if isinstance(size, int) else size[0])

    def of_images(self) -> Architecture:
        """The same without its text tower: what a model needs that knows the embeddings of its classes."""
        kept = {key: value for key, value in self.config.items() if key not in ("text_cfg", "multimodal_cfg")}
        return Architecture({**kept, "text_cfg": dict(_NO_TEXT)}, self.mean, self.std)


def read_architecture(values: Mapping[str, Any]) -> Architecture:
    """Undo what JSON does to an architecture.

    Raises:
        KeyError: It is none.
    """
    mean, std = ((float(of[0]), float(of[1]), float(of[2])) for of in (values["mean"], values["std"]))
    return Architecture(values["config"], mean, std)


def is_clip(name: str) -> bool:
    """Whether a name means a CLIP."""
    return name.startswith(CLIP)


def without_folder(name: str) -> str:
    """A name that tells nobody where its folder lies; any other name as it is."""
    folder = name.removeprefix(CLIP + _FOLDER)
    return name if folder == name else f"{CLIP}{_FOLDER}{Path(folder).name}"


def names() -> list[str]:
    """The names that need no folder and no hub.

    Raises:
        ConfigError: open_clip is not installed.
    """
    return [DEMO, *(CLIP + name for name in import_open_clip().list_models())]


def tags(name: str) -> list[str]:
    """The published weights of a model, by the names that open_clip has for them.

    Raises:
        ConfigError: open_clip is not installed.
    """
    return list(import_open_clip().list_pretrained_tags_by_model(name.removeprefix(CLIP)))


def architecture(name: str, weights: str | Path = "none") -> Architecture:
    """Say what a name means: the towers, and how their images are scaled.

    Args:
        name: See the module.
        weights: A tag of `tags`, which may want another activation or another scale; anything else leaves both.

    Raises:
        ConfigError: There is no such name, or open_clip is not installed.
        CheckpointError: The folder of the model lacks its configuration.
    """
    open_clip = import_open_clip()
    mean, std = tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD)
    folder = _folder(name)
    if name == DEMO:
        return Architecture(copy.deepcopy(_DEMO), mean, std)
    if folder is not None:
        said = _read_config(name, folder)
        scale = said.get("preprocess_cfg", {})
        return Architecture(said["model_cfg"], tuple(scale.get("mean", mean)), tuple(scale.get("std", std)))
    config = open_clip.get_model_config(name.removeprefix(CLIP)) if is_clip(name) else None
    if config is None:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.3)
        msg = (
            f"There is no CLIP {name!r}: the nearest are {', '.join(near)}; `clip:hf-hub:OWNER/NAME` and "
            f"`clip:local-dir:FOLDER` are others."
        )
        raise ConfigError(msg)
    published = [open_clip.get_pretrained_cfg(name.removeprefix(CLIP), tag) for tag in tags(name)]
    if str(weights) in tags(name):
        published = [open_clip.get_pretrained_cfg(name.removeprefix(CLIP), str(weights))]
        if published[0].get("quick_gelu"):
            config["quick_gelu"] = True  # a model of this name without it would compute other features
    scales = {(tuple(of["mean"]), tuple(of["std"])) for of in published}
    if len(scales) == 1:  # that of these weights, or of all that were published for the name
        ((mean, std),) = scales
    return Architecture(config, mean, std)


def resizing(name: str) -> dict[str, str]:
    """Say how open_clip brings an image to a model's size: `interpolation`, and which side `resize_mode` fits.

    Raises:
        ConfigError: There is no such name, or open_clip is not installed.
        CheckpointError: The folder of the model lacks its configuration.
    """
    keys = {"interpolation": "bicubic", "resize_mode": "shortest"}
    folder = _folder(name)
    if folder is not None:
        said = _read_config(name, folder).get("preprocess_cfg", {})
        return {key: said.get(key, usual) for key, usual in keys.items()}
    if name == DEMO:
        return keys
    open_clip = import_open_clip()
    published = [open_clip.get_pretrained_cfg(name.removeprefix(CLIP), tag) for tag in tags(name)]
    found = {key: {of[key] for of in published} for key in keys}
    return {key: values.pop() if len(values) == 1 else keys[key] for key, values in found.items()}


def build(wanted: Architecture, weights: Path | None = None, *, image_px: int | None = None, text: bool = True) -> Any:
    """Build a CLIP, in float32, on the CPU and in evaluation mode.

    Args:
        wanted: What to build.
        weights: A file in open_clip's layout; None draws them from torch's seed.
        image_px: Side of the square images; position embeddings are resampled to it. None is the tower's own.
        text: Whether the text tower is needed; without it nothing but `visual` and the temperature mean anything.

    Returns:
        open_clip's model: `encode_image`, `encode_text`, `logit_scale`, `visual`.

    Raises:
        ConfigError: open_clip or what a tower needs is not installed, or the tower takes no image of this side.
        CheckpointError: The file is not there, or of another model.
    """
    open_clip = import_open_clip()
    config = copy.deepcopy(dict((wanted if text else wanted.of_images()).config))
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if image_px is not None and image_px != wanted.image_px:
        _check_side(image_px, wanted.image_px, vision, trained=weights is not None)
        vision["image_size"] = image_px
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        with offline():
            model = kind(**config)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        msg = f"open_clip cannot build this CLIP: {_first_line(error)}"
        raise ConfigError(msg) from error
    if weights is not None:
        _load(open_clip, model, weights)
    if "timm_model_name" in vision and image_px not in (None, wanted.image_px):
        model.visual.set_input_size(image_px)
    return model.float().eval()


def tokenizer(name: str) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer of a model: texts to (n, context length) int64.

    Raises:
        ConfigError: There is no such name, or its tokenizer is not here.
    """
    open_clip = import_open_clip()
    if name == DEMO:
        return _demo_tokenizer(open_clip)
    folder = _folder(name)
    wanted = name.removeprefix(CLIP) if folder is None else f"{_FOLDER}{folder}"
    try:
        with offline():
            found: Callable[[Sequence[str]], Tensor] = open_clip.get_tokenizer(wanted)
    except (OSError, ValueError) as error:
        msg = (
            f"The tokenizer of {name!r} is not here ({_first_line(error)}): `pipeline prepare` fetches it; "
            f"without a network copy its files {'into ' + repr(str(folder)) if folder else 'to the cache of the hub'}."
        )
        raise ConfigError(msg) from error
    return found


def prompts(
    classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,), words: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], ...]:
    """Write the texts of each class: every template with the class's words, its own name where it has none.

    Args:
        classes: Names of the classes.
        templates: Sentences with `{class}` in them.
        words: What to call a class, by its name.

    Raises:
        ConfigError: There is no template, one lacks `{class}`, or the words are of a class that there is not.
    """
    if not templates:
        msg = f"There is no template for the prompts: give at least one, such as {TEMPLATE!r}."
        raise ConfigError(msg)
    for template in templates:
        if "{class}" not in template:
            msg = f"The template {template!r} has no {{class}} in it: write it where the class goes, as in {TEMPLATE!r}"
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
        name: See the module.
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


def weights_file(name: str, weights: str | Path) -> Path | None:
    """The file that configured weights mean, there or not.

    Args:
        name: See the module.
        weights: `"none"`; a tag of `tags`; `"own"` for the file in the model's folder or on the hub; or a file.

    Returns:
        None for `"none"`.

    Raises:
        ConfigError: There are no such weights for the name.
    """
    if str(weights) == "none":
        return None
    folder = _folder(name)
    if str(weights) == OWN:
        if folder is None:
            msg = f"{name!r} has no weights of its own: name a file, or one of {_listed(name)}."
            raise ConfigError(msg)
        there = [folder / file for file in _WEIGHTS if (folder / file).is_file()]
        return there[0] if there else folder / _WEIGHTS[0]
    if folder is None and name != DEMO and str(weights) in tags(name):
        return _published_file(name, str(weights))
    path = Path(weights)
    if not path.exists() and path.suffix == "" and len(path.parts) == 1:
        msg = f"There are no weights {str(weights)!r} for {name!r}: name a file, 'none', or one of {_listed(name)}."
        raise ConfigError(msg)
    return path


def present_weights(name: str, weights: str | Path) -> Path | None:
    """The file that configured weights mean, which is there; None for `"none"`.

    Raises:
        ConfigError: There are no such weights for the name.
        CheckpointError: They are not here; the message says which file goes where.
    """
    file = weights_file(name, weights)
    if file is None or file.is_file():
        return file
    if str(weights) == OWN or str(weights) in tags(name):
        msg = (
            f"The weights {str(weights)!r} of {name!r} are not at {str(file)!r}: `pipeline prepare` downloads them; "
            f"without a network, put the file from {_source(name, str(weights))} there."
        )
    else:
        msg = f"There is no file of weights at {str(file)!r}: check the path."
    raise CheckpointError(msg)


def download(name: str, weights: str | Path, *, progress: Progress = silent) -> Path | None:
    """Have what a name and its weights need: the published file, and for a model on the hub its configuration too.

    The hub says the SHA-256 of its large files, and some addresses carry one; it is checked.

    Raises:
        ConfigError: There are no such weights for the name.
        CheckpointError: They cannot be fetched (the message says which file to put where), or have another digest.
    """
    folder = _folder(name)
    if name.startswith(CLIP + _HUB):
        assert folder is not None
        _fetch_folder(name.removeprefix(CLIP + _HUB), folder, weights, progress)
    else:
        if folder is None and name != DEMO and str(weights) in tags(name):
            _fetch_published(name, str(weights), progress)
        _fetch_words(name)
    return present_weights(name, weights)


def import_open_clip() -> ModuleType:
    """Import open_clip, which is an extra.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(needs_extra("A model named 'clip:...'", "clip")) from error
    module: ModuleType = open_clip
    return module


@contextmanager
def offline() -> Iterator[None]:
    """Keep the hub's clients off the network until the block ends: they then read what is here already, or fail."""
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _store() -> Path:
    """Where published weights are kept for all projects: torch's own folder."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def _folder(name: str) -> Path | None:
    """The folder of a model that brings its own configuration, there or not; None for the others."""
    if name.startswith(CLIP + _FOLDER):
        return Path(name.removeprefix(CLIP + _FOLDER))
    if name.startswith(CLIP + _HUB):
        return _store() / f"clip-{name.removeprefix(CLIP + _HUB).replace('/', '--')}"
    return None


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    """Read what a folder says of its model; the text tower's own configuration is taken from beside it."""
    file = folder / _CONFIG
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        model, text = said["model_cfg"], said["model_cfg"]["text_cfg"]
        if not isinstance(model["vision_cfg"], dict) or not isinstance(model["embed_dim"], int):
            problem = "no configuration of a CLIP"
            raise ValueError(problem)
    except FileNotFoundError as error:
        what = (
            f"`pipeline prepare` fetches it; without a network, put the files of {name.removeprefix(CLIP + _HUB)!r} "
            f"there"
            if name.startswith(CLIP + _HUB)
            else "name a folder that open_clip or the hub wrote"
        )
        msg = f"{name!r} has no {_CONFIG} in {str(folder)!r}: {what}."
        raise CheckpointError(msg) from error
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{str(file)!r} cannot be read as the configuration of a CLIP ({error}): copy or download it again."
        raise CheckpointError(msg) from error
    if "hf_model_name" in text and (folder / _TEXT_CONFIG).is_file():
        text["hf_model_name"] = str((folder / _TEXT_CONFIG).parent)
    return dict(said)


def _check_side(image_px: int, own_px: int, vision: Mapping[str, Any], *, trained: bool) -> None:
    """Refuse a side of images that a tower cannot be stretched to."""
    patch = vision.get("patch_size", 16)
    if isinstance(vision.get("layers", 12), list):
        patch = 32  # a ResNet, whose last map is pooled with a position for each cell
        if trained:  # and nobody resamples those
            msg = f"image_px is {image_px}, and this CLIP's ResNet has learnt positions for {own_px} px: take {own_px}."
            raise ConfigError(msg)
    if isinstance(patch, int) and image_px % patch:
        below, above = image_px // patch * patch, (image_px // patch + 1) * patch
        near = f"{below} or {above}" if below else f"{above}"
        msg = f"image_px is {image_px}, and this CLIP reads patches of {patch} px: take {near}."
        raise ConfigError(msg)


def _load(open_clip: ModuleType, model: nn.Module, file: Path) -> None:
    """Load a file of weights, and nothing that runs."""
    from pipeline.weights import read_weights

    read_weights(file)  # says in our words what is wrong with a file; the pages stay in memory for what follows
    try:
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        said = str(error).splitlines()
        msg = f"{str(file)!r} is of another model ({' '.join(said[:2]).strip()[:200]}): name its own."
        raise CheckpointError(msg) from error


def _demo_tokenizer(open_clip: ModuleType) -> Callable[[Sequence[str]], Tensor]:
    """CLIP's own tokenizer with its 49,408 words folded into the miniature's few, which may let two words be one."""
    whole = open_clip.SimpleTokenizer(context_length=_DEMO["text_cfg"]["context_length"])
    first, last = whole.all_special_ids  # the text's start, and its end, which must stay the largest number

    def tokenize(texts: Sequence[str]) -> Tensor:
        ids: Tensor = whole(list(texts))
        folded = 1 + ids % (_DEMO_WORDS - 3)
        folded[ids == 0] = 0
        folded[ids == first] = _DEMO_WORDS - 2
        folded[ids == last] = _DEMO_WORDS - 1
        return folded

    return tokenize


def _listed(name: str) -> str:
    """The weights of a name that need no path, in a message."""
    return ", ".join([OWN] if _folder(name) is not None else [] if name == DEMO else tags(name)) or "none are published"


def _hub_files(name: str, tag: str) -> tuple[str, tuple[str, ...]]:
    """The repository on the hub and the names that published weights may have there, the best first."""
    if name.startswith(CLIP + _HUB):
        return name.removeprefix(CLIP + _HUB), _WEIGHTS
    said: str = import_open_clip().get_pretrained_cfg(name.removeprefix(CLIP), tag)["hf_hub"]
    owner_and_name, _, file = said.rpartition("/")
    return owner_and_name, (file,) if file else _WEIGHTS


def _published_file(name: str, tag: str) -> Path:
    """Where published weights are kept: under the suffix that is there, else that of the best."""
    _, files = _hub_files(name, tag)
    stem = f"clip-{name.removeprefix(CLIP).replace('/', '-')}-{tag}"
    places = [_store() / (stem + suffix) for suffix in dict.fromkeys(Path(file).suffix for file in files)]
    return next((place for place in places if place.is_file()), places[0])


def _source(name: str, tag: str) -> str:
    """Where somebody with a network finds published weights."""
    owner_and_name, files = _hub_files(name, tag)
    return f"https://huggingface.co/{owner_and_name} ({' or '.join(files[:3])})"


def _fetch_published(name: str, tag: str, progress: Progress) -> None:
    """Fetch the weights of a tag from the hub, unless they are there."""
    place = _published_file(name, tag)
    if place.is_file():
        return
    repository, files = _hub_files(name, tag)
    for file in files:
        if _fetch(repository, file, place.with_suffix(Path(file).suffix), progress):
            return
    msg = (
        f"The weights {tag!r} of {name!r} cannot be fetched: {repository!r} on the hub has none of {', '.join(files)}."
    )
    raise CheckpointError(msg)


def _fetch_words(name: str) -> None:
    """Let the hub's own clients fetch what a name needs besides: a tokenizer, a text tower's configuration."""
    text = architecture(name).config["text_cfg"]
    if name == DEMO or not text.get("hf_tokenizer_name"):
        return
    try:
        import_open_clip().get_tokenizer(name.removeprefix(CLIP))
        if "hf_model_name" in text:
            import transformers

            transformers.AutoConfig.from_pretrained(text["hf_model_name"])
    except (OSError, ValueError) as error:
        msg = (
            f"The tokenizer of {name!r} cannot be fetched ({_first_line(error)}): copy the files of "
            f"{text['hf_tokenizer_name']!r} to the cache of the hub on this machine (huggingface_hub says where)."
        )
        raise CheckpointError(msg) from error


def _fetch_folder(repository: str, folder: Path, weights: str | Path, progress: Progress) -> None:
    """Fetch what a model on the hub consists of, unless it is there."""
    if not (folder / _CONFIG).is_file():
        for file in _TOKENIZER:
            _fetch(repository, file, folder / file, progress)
        if not _fetch(repository, _CONFIG, folder / _CONFIG, progress):
            msg = f"{repository!r} on the hub has no {_CONFIG}, so it is no model of open_clip: choose another."
            raise CheckpointError(msg)
    text = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("model_cfg", {}).get("text_cfg", {})
    if "hf_model_name" in text and not (folder / _TEXT_CONFIG).is_file():
        _fetch(text["hf_model_name"], "config.json", folder / _TEXT_CONFIG, progress)
    if str(weights) != OWN or any((folder / file).is_file() for file in _WEIGHTS):
        return
    if not any(_fetch(repository, file, folder / file, progress) for file in _WEIGHTS):
        msg = f"{repository!r} on the hub has no weights under a name that open_clip knows ({', '.join(_WEIGHTS)})."
        raise CheckpointError(msg)


def _fetch(repository: str, file: str, place: Path, progress: Progress) -> bool:
    """Fetch one file of a repository on the hub unless it is there; returns whether the repository has it.

    Raises:
        CheckpointError: The hub cannot be reached, or what came has another digest.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    if place.is_file():
        return True
    url = hub.hf_hub_url(repository, file)
    try:
        known = hub.get_hf_file_metadata(url)
    except EntryNotFoundError:
        return False
    except Exception as error:  # the hub's client lets through whatever its HTTP library raises
        msg = f"{url} cannot be downloaded ({_first_line(error)}); fetch that file elsewhere and put it at {place}"
        raise CheckpointError(msg) from error
    digest = known.etag or ""
    if len(digest) == 64:  # a large file; of a small one the hub says git's own digest
        fetch(url, place, digest=f"sha256:{digest}", error=CheckpointError, progress=progress)
        return True
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            content = answer.read()
    except OSError as error:
        msg = f"{url} cannot be downloaded ({_first_line(error)}); fetch that file elsewhere and put it at {place}"
        raise CheckpointError(msg) from error
    if digest not in ("", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()):
        msg = f"{url}: what came has another digest than the hub says; run the command again"
        raise CheckpointError(msg)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(place.name + ".part")
    part.write_bytes(content)
    part.replace(place)
    return True


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
