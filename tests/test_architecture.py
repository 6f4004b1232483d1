"""The rules of who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*ROOT.glob("cache/**/*.py"), *ROOT.glob("pipeline/**/*.py")])
ROOMS = {  # of `pipeline`: what each may import, beside what those may import; docs/design.md has the same table
    "config": (),
    "data": ("cache",),
    "clip": (),
    "cluster": (),
    "encoders": ("clip",),
    "extract": ("data", "encoders", "cluster", "cache"),
    "model": ("clip",),
    "train": ("data", "model", "cache"),
    "evaluate": ("train", "encoders"),
    "explain": ("evaluate",),
    "report": ("evaluate", "explain"),
    "study": ("train", "evaluate"),
    "stages": ("config", "extract", "report", "study"),
    "cli": ("stages",),
}
DOORS = {("train", "evaluate"): "pipeline.evaluate.metrics"}  # the scores on val that choose an epoch
BESIDE = {
    "__init__",
    "__main__",
    "errors",
    "progress",
    "url",
    "overlap",
    "process",
    "records",
    "download",
    "weights",
    "image_tap",
    "mask_tap",
}
CACHE_ROOMS = {
    "formats": (),
    "reading": ("formats",),
    "writing": ("reading",),
    "care": ("writing",),
    "sharing": ("care",),
}
CACHE_BESIDE = {
    "__init__",
    "errors",
    "fingerprint",
    "description",
    "index",
    "labels",
    "durable",
    "packing",
    "progress",
    "roundings",
}
ONLY_IN = {
    "zarr": ("cache/",),
    "h5py": ("cache/",),
    "segment_anything": ("pipeline/encoders/",),
    "open_clip": ("pipeline/clip/",),
    "ray": ("pipeline/cluster/",),
    "click": ("pipeline/cli/",),
    "rich": ("pipeline/cli/",),
    "pydantic": ("pipeline/config/", "pipeline/stages/study_plan.py"),
    "ruamel": ("pipeline/config/",),
    "pipeline.config": ("pipeline/config/", "pipeline/stages/", "pipeline/cli/"),
    "pipeline.stages": ("pipeline/stages/", "pipeline/cli/"),
    "pipeline.cli": ("pipeline/__main__.py", "pipeline/cli/"),
}
NEVER_IN = {
    "cache/": ("torch", "torchvision", "PIL", "pipeline", "sklearn", "matplotlib", "segment_anything"),
    "pipeline/config/": ("torch", "torchvision", "numpy"),
    "pipeline/data/layouts/": ("torch", "torchvision"),
    "pipeline/encoders/": ("cache",),
}


def below(room: str, rooms: dict[str, tuple[str, ...]]) -> set[str]:
    """The rooms that a room may import, directly or through others."""
    found = {room}
    for other in rooms.get(room, ()):
        found |= below(other, rooms)
    return found


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
def test_rooms_are_entered_one_way(path: Path) -> None:
    top, room = path.relative_to(ROOT).parts[:2]
    rooms, beside = (ROOMS, BESIDE) if top == "pipeline" else (CACHE_ROOMS, CACHE_BESIDE)
    named = room.removesuffix(".py")
    if "/golden/" in str(path):
        return
    assert named in rooms or named in beside, f"{named} is no room and does not belong to everybody"
    if named in rooms:
        allowed = below(named, rooms)
    else:
        allowed = {"cli"} if named == "__main__" else set(rooms) if named == "__init__" else set()
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "cache" and top == "pipeline" and named in rooms:
            assert "cache" in allowed or named == "cli", f"{path} imports {module}"
        if parts[0] != top or len(parts) < 2 or parts[1] not in rooms or parts[1] in allowed:
            continue
        door = DOORS.get((named, parts[1]))
        assert door is not None, f"{path}: {named} may import {sorted(allowed)}, and not {module}"
        assert door.startswith(module) or module.startswith(door), f"{path}: only {door}, and not {module}"


@pytest.mark.parametrize("room", [*(f"pipeline/{room}" for room in ROOMS), *(f"cache/{room}" for room in CACHE_ROOMS)])
def test_a_room_says_what_happens_there(room: str) -> None:
    says = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert says is not None
    assert "ay import" in says


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


def test_every_room_is_in_the_readme_and_in_the_docs() -> None:
    readme, design = (ROOT / "README.md").read_text(), (ROOT / "docs/design.md").read_text()
    for room in (*ROOMS, *CACHE_ROOMS):
        assert f"{room}/" in readme, f"the README's tree leaves out {room}"
        assert f"| `{room}/` |" in design, f"docs/design.md leaves out {room}"


def test_the_docs_have_the_table_of_this_test() -> None:
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs/design.md").read_text().splitlines()]
    table = {row[0].strip("`/"): row[-1] for row in rows if row[0].startswith("`") and row[0].endswith("/`")}
    for room, others in {**ROOMS, **CACHE_ROOMS}.items():
        assert table[room] == (", ".join(others) or "-"), f"docs/design.md, room {room}"


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "cache/FORMAT.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_of_the_docs_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name}: no {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {there.name} has no heading {anchor}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
