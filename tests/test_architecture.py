"""The rules of who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*ROOT.glob("cache/**/*.py"), *ROOT.glob("pipeline/**/*.py")])
ONLY_IN = {
    "zarr": ("cache/",),
    "h5py": ("cache/",),
    "segment_anything": ("pipeline/encoders/",),
    "click": ("pipeline/cli/",),
    "rich": ("pipeline/cli/",),
    "pydantic": ("pipeline/config.py", "pipeline/config_check.py", "pipeline/study_config.py"),
    "ruamel": ("pipeline/config_file.py",),
    "pipeline.config_check": ("pipeline/config.py", "pipeline/study_config.py"),
    "pipeline.config_file": ("pipeline/config.py", "pipeline/study_config.py"),
    "pipeline.config": (
        "pipeline/agreement.py",
        "pipeline/arguments.py",
        "pipeline/inputs.py",
        "pipeline/prepare.py",
        "pipeline/shared.py",
        "pipeline/stages.py",
        "pipeline/stores.py",
        "pipeline/study_config.py",
        "pipeline/study_stage.py",
        "pipeline/cli/",
    ),
    "pipeline.study_config": ("pipeline/study_stage.py", "pipeline/cli/"),
    "pipeline.stages": ("pipeline/stores.py", "pipeline/study_stage.py", "pipeline/cli/"),
    "pipeline.cli": ("pipeline/__main__.py", "pipeline/cli/"),
}
NEVER_IN = {
    "cache/": ("torch", "torchvision", "PIL", "pipeline", "sklearn", "matplotlib", "segment_anything"),
    "pipeline/data/": ("torch", "torchvision", "cache", "pipeline.encoders", "pipeline.extract"),
    "pipeline/encoders/": ("cache", "pipeline.data", "pipeline.extract"),
}


def imports(path: Path) -> set[str]:
    """Names of all modules imported anywhere in a file, with every parent package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = str(path.relative_to(ROOT))
    found = imports(path)
    for module, places in ONLY_IN.items():
        if not here.startswith(places):
            assert module not in found, f"{here} imports {module}, which belongs to {places}"
    for place, modules in NEVER_IN.items():
        if here.startswith(place):
            assert not found & set(modules), f"{here} imports {found & set(modules)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_never_prints(path: Path) -> None:
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c, ast.Name) and c.id in {"print", "breakpoint"}]


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"], ["store", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    heavy = ("torch", "numpy", "zarr", "h5py", "pydantic")
    program = (
        "import sys\n"
        f"for name in {heavy!r}: sys.modules[name] = None\n"
        f"sys.argv = ['pipeline', *{arguments!r}]\n"
        "from pipeline.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_every_module_is_in_the_readme_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [path.name for path in MODULES if path.name != "__init__.py" and path.name not in readme]
    assert not missing
