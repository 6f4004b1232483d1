"""What can go wrong outside the store, each with a message that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PipelineError(Exception):
    """Root of the errors that a person can act on; the command line prints it as one line.

    Attributes:
        exit_status: What the command returns to the shell (1 failed, 2 wrong use or config).
    """

    exit_status = 1


class ConfigError(PipelineError):
    """The configuration or the command line asks for something that does not exist."""

    exit_status = 2


class DataError(PipelineError):
    """A data set or one of its files is not what its layout promises."""


class UnreachableError(PipelineError):
    """A server with data does not answer or let us read. No image is to blame: the run stops, and may be continued."""


class CheckpointError(PipelineError):
    """A file of weights is missing, of another model, or not a checkpoint."""


class RunError(PipelineError):
    """A training run cannot start, continue or be read."""


class ClusterError(PipelineError):
    """A cluster is not there, has no room, or its nodes are not what work on them needs."""


class DamagedFileError(RunError, ValueError):
    """A file in a run is not what the command wrote that leaves it there."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file it was where the system refuses to write without a name: a full disk tells none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except RuntimeError as error:
        said = error.__context__
        if not isinstance(said, OSError):
            raise
        raise OSError(said.errno, said.strerror, str(path)) from error  # torch's writer had put it into other words


@contextmanager
def from_extra(what: str, extra: str) -> Iterator[None]:
    """Import inside the block what an extra brings.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(needs_extra(what, extra)) from error


def needs_extra(what: str, extra: str) -> str:
    """A message for what an extra would bring: the one form of this hint."""
    return (
        f"{what} needs the extra {extra!r}, which is not installed: pip install 'slca-pipeline[{extra}]' "
        f"(in a clone of the project: uv sync --extra {extra})"
    )
