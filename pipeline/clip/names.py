"""Names of CLIPs, and of the weights that are published for them.

A name is `clip:` and one of open_clip's, such as `clip:ViT-B-32`; `clip:hf-hub:OWNER/NAME` for a model on the hub, such
as BiomedCLIP; `clip:local-dir:FOLDER` for the files of such a model; or `clip:demo`, the miniature.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.clip.library import import_open_clip

CLIP = "clip:"  # what the names begin with
DEMO = "clip:demo"
HUB, FOLDER = "hf-hub:", "local-dir:"


def is_clip(name: str) -> bool:
    """Whether a name means a CLIP."""
    return name.startswith(CLIP)


def without_folder(name: str) -> str:
    """A name that tells nobody where its folder lies; any other name as it is."""
    folder = name.removeprefix(CLIP + FOLDER)
    return name if folder == name else f"{CLIP}{FOLDER}{Path(folder).name}"


def known() -> list[str]:
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
