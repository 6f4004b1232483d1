"""open_clip, an extra, which builds the models: imported when the first is asked for, and kept off the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from pipeline.errors import from_extra


def import_open_clip() -> ModuleType:
    """Import open_clip, which is an extra.

    Raises:
        ConfigError: It is not installed.
    """
    with from_extra("A model named 'clip:...'", "clip"):
        import open_clip
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


def first_line(error: BaseException) -> str:
    """What an error of other people's software says first; its name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
