"""The examples of the pages: Python runs, and every command line that they show is one that the commands know."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipeline.cli import cli
from tests.cli.conftest import environment, prepared, trained

__all__ = ["prepared", "trained"]

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), ROOT / "cache/FORMAT.md"])
SHELL = ("", "bash", "sh", "shell", "console")
BEFORE = re.compile(r"^\s*(\$ )?(pip install uv && )?((uv run|[A-Z_]+=\S+|torchrun .*? -m|python -m) )*")


def blocks(page: Path, languages: tuple[str, ...]) -> list[str]:
    """The fenced blocks of a page, in their order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


WITH_PYTHON = [page for page in PAGES if blocks(page, ("python",))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, trained: Path, tmp_path: Path) -> None:
    for name in ("data", "features", "weights", "runs"):
        shutil.copytree(trained / name, tmp_path / name)
    (tmp_path / "page.py").write_text("\n".join(blocks(page, ("python",))))
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


OF_TODAY = [page for page in PAGES if page.name != "results.md"]  # whose figures are of the code of their time


@pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: page.name)
def test_the_files_of_the_code_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text())
    assert [name for name in named if not ((ROOT / name).is_file() or (ROOT / "pipeline" / name).is_file())] == []


def test_some_page_has_python() -> None:
    assert "python.md" in {page.name for page in WITH_PYTHON}


def command_lines(page: Path) -> Iterator[str]:
    """What a page has a reader type, without what stands beside it to explain."""
    for block in blocks(page, SHELL):
        for line in block.replace("\\\n", " ").splitlines():
            typed = re.sub(
                r"^\s*(\$ )?(pip install uv && )?((uv run|[A-Z_]+=\S+|torchrun .*? -m|python -m) )*", "", line
            )
            if typed.startswith("pipeline "):
                yield re.split(r" {2,}| #", typed)[0].strip()
    for span in re.findall(r"`(pipeline [a-z][^`]*)`", page.read_text()):
        yield " ".join(span.split())


def commands_in(line: str) -> Iterator[tuple[list[str], bool]]:
    """The words of each command of a line, and whether it stands there with all that it needs."""
    first, *others = line.split(" | ")
    yield shlex.split(first)[1:], not others
    for other in others:
        group = shlex.split(first)[1:2] if shlex.split(first)[1] == "store" else []
        yield [*group, *shlex.split(other)], False


LINES = sorted({(page.name, line) for page in PAGES for line in command_lines(page)})


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: str(value)[:70])
def test_a_command_line_of_a_page_is_understood(page: str, line: str) -> None:
    for words, _ in commands_in(line):
        understand(words)


def understand(words: list[str]) -> None:
    """Fail where there is no such command, or it knows no such option; arguments may be left out in running text."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"`{command.name}` has no command {words[0]!r}"
        command, words = found, words[1:]
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    options |= dict.fromkeys(("-h", "--help"))
    if command is cli:
        options |= dict.fromkeys(("--version",))
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in options, f"`{command.name}` has no option {word!r}"


def test_options_that_do_not_exist_are_noticed() -> None:
    understand(["store", "push", "A", "B", "--pseudonymise", "KEY"])
    for words in (["store", "send"], ["train", "--faster"], ["study", "--set", "a=1", "--flods=5"]):
        with pytest.raises(AssertionError):
            understand(words)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_the_examples_of_a_commands_help_are_understood(command: str) -> None:
    found = cli.commands[command]
    inner = found.commands.values() if isinstance(found, click.Group) else [found]
    for one in inner:
        for line in re.findall(r"^ +(pipeline .*)$", one.epilog or "", re.MULTILINE):
            understand(shlex.split(line)[1:])


CODE = sorted([*ROOT.glob("cache/**/*.py"), *ROOT.glob("pipeline/**/*.py")])
WITH_EXAMPLES = [path for path in CODE if re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_of_a_docstring_run(path: Path) -> None:
    import doctest
    import importlib

    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.FAIL_FAST)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_door_has_the_names_that_its_page_has() -> None:
    import pipeline

    shown = set()
    for block in blocks(ROOT / "docs/python.md", ("python",)):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pipeline":
                shown.add(node.attr)
    assert shown == set(pipeline.__all__) == {"FeatureDataset", "features", "gate"}
    assert set(pipeline.__all__) <= set(dir(pipeline))
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__
    with pytest.raises(AttributeError, match="'pipeline' has no attribute 'feature'"):
        _ = pipeline.feature


def test_the_door_opens_without_anything_heavy() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'zarr', 'h5py', 'pydantic', 'PIL', 'click'): sys.modules[name] = None\n"
        "import pipeline\n"
        "assert dir(pipeline)\n"
        "assert not [name for name in sys.modules if name.startswith(('pipeline.', 'cache'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
