"""What is downloaded of a CLIP: published weights, a model's own files, a tokenizer; by `download` and nothing else."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from pathlib import Path

from pipeline.clip.files import CONFIG, OWN, TEXT_CONFIG, WEIGHTS, folder_of, hub_files, present_weights, published_file
from pipeline.clip.library import first_line, import_open_clip
from pipeline.clip.names import CLIP, DEMO, HUB, tags
from pipeline.clip.towers import architecture
from pipeline.download import TIMEOUT_SECONDS, fetch
from pipeline.errors import CheckpointError
from pipeline.progress import Progress, silent

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "merges.txt",
              "vocab.json", "spiece.model", "tokenizer.model")  # fmt: skip


def download(name: str, weights: str | Path, *, progress: Progress = silent) -> Path | None:
    """Have what a name and its weights need: the published file, and for a model on the hub its configuration too.

    The hub says the SHA-256 of its large files, and some addresses carry one; it is checked.

    Raises:
        ConfigError: There are no such weights for the name.
        CheckpointError: They cannot be fetched (the message says which file to put where), or have another digest.
    """
    folder = folder_of(name)
    if name.startswith(CLIP + HUB):
        assert folder is not None
        _fetch_folder(name.removeprefix(CLIP + HUB), folder, weights, progress)
    else:
        if folder is None and name != DEMO and str(weights) in tags(name):
            _fetch_published(name, str(weights), progress)
        _fetch_words(name)
    return present_weights(name, weights)


def _fetch_published(name: str, tag: str, progress: Progress) -> None:
    """Fetch the weights of a tag from the hub, unless they are there."""
    place = published_file(name, tag)
    if place.is_file():
        return
    repository, files = hub_files(name, tag)
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
            f"The tokenizer of {name!r} cannot be fetched ({first_line(error)}): copy the files of "
            f"{text['hf_tokenizer_name']!r} to the cache of the hub on this machine (huggingface_hub says where)."
        )
        raise CheckpointError(msg) from error


def _fetch_folder(repository: str, folder: Path, weights: str | Path, progress: Progress) -> None:
    """Fetch what a model on the hub consists of, unless it is there."""
    if not (folder / CONFIG).is_file():
        for file in _TOKENIZER:
            _fetch(repository, file, folder / file, progress)
        if not _fetch(repository, CONFIG, folder / CONFIG, progress):
            msg = f"{repository!r} on the hub has no {CONFIG}, so it is no model of open_clip: choose another."
            raise CheckpointError(msg)
    text = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_cfg", {}).get("text_cfg", {})
    if "hf_model_name" in text and not (folder / TEXT_CONFIG).is_file():
        _fetch(text["hf_model_name"], "config.json", folder / TEXT_CONFIG, progress)
    if str(weights) != OWN or any((folder / file).is_file() for file in WEIGHTS):
        return
    if not any(_fetch(repository, file, folder / file, progress) for file in WEIGHTS):
        msg = f"{repository!r} on the hub has no weights under a name that open_clip knows ({', '.join(WEIGHTS)})."
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
        msg = f"{url} cannot be downloaded ({first_line(error)}); fetch that file elsewhere and put it at {place}"
        raise CheckpointError(msg) from error
    digest = known.etag or ""
    if len(digest) == 64:  # a large file; of a small one the hub says git's own digest
        fetch(url, place, digest=f"sha256:{digest}", error=CheckpointError, progress=progress)
        return True
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            content = answer.read()
    except OSError as error:
        msg = f"{url} cannot be downloaded ({first_line(error)}); fetch that file elsewhere and put it at {place}"
        raise CheckpointError(msg) from error
    if digest not in ("", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()):
        msg = f"{url}: what came has another digest than the hub says; run the command again"
        raise CheckpointError(msg)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(place.name + ".part")
    part.write_bytes(content)
    part.replace(place)
    return True
