"""The rooms of the toolkit and the one way in which they may import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stabilitykit"

# A room may import those it names, and nothing else of the toolkit.
WATCHING = {"measure", "snapshot", "containers", "random_states", "config", "schema", "errors"}
MAY_IMPORT = {
    "errors": {"schema"},  # for annotations
    "schema": set(),
    "config": {"errors"},
    "measure": {"schema", "errors"},
    "random_states": set(),
    "containers": set(),
    "snapshot": {"containers", "random_states", "errors"},
    "record": {"schema", "errors"},
    "watch": WATCHING,
    "diagnose": {"measure", "snapshot", "containers", "schema", "errors"},
    "guards": {"snapshot", "containers", "random_states", "measure", "schema", "errors"},
    "monitor": {"diagnose", "record", "watch", *WATCHING},
    "integrations": {"monitor", "config", "schema", "errors"},
    "read": {"record", "schema", "errors"},
    "analyse": {"read", "schema", "errors"},
    "report": {"analyse", "read", "schema", "errors"},
    "cli": {"report", "analyse", "read", "record", "schema", "errors"},
    "__init__": None,  # the front door, lazily
    "__main__": {"cli"},
}
TORCH_FREE = ("errors", "schema", "config", "record", "read", "analyse", "report", "cli", "__init__", "__main__")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from ((name, id(node) not in inner) for name in names)


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "vendor" not in path.parts)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    allowed = MAY_IMPORT[room]

    used = {name.split(".")[1] for name, _ in imports(path) if name.startswith("stabilitykit.")}

    assert allowed is None or used - {room} <= allowed


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_toolkit_never_imports_its_workload_and_the_second_half_never_imports_torch(path: Path) -> None:
    modules = {name.split(".")[0] for name, _ in imports(path)}
    at_import = {name.split(".")[0] for name, outer in imports(path) if outer}

    assert not modules & {"trainers", "benchmarks", "tests"}
    if room_of(path) in TORCH_FREE:
        assert not at_import & {"torch", "torchvision"}


def test_there_is_no_cycle_between_rooms() -> None:
    edges = {room: set() for room in MAY_IMPORT}
    for path in files():
        if room_of(path) not in ("__init__", "errors"):  # errors names schema in annotations alone
            edges[room_of(path)] |= {
                name.split(".")[1] for name, _ in imports(path) if name.startswith("stabilitykit.")
            } - {room_of(path)}

    while free := {room for room, below in edges.items() if not below}:
        edges = {room: below - free for room, below in edges.items() if room not in free}

    assert not edges


@pytest.mark.parametrize(
    "module", ["stabilitykit", *(f"stabilitykit.{half}" for half in ("cli.main", "report", "read"))]
)
def test_importing_the_second_half_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert printed.strip() == "False"


def test_functions_stay_short_and_modules_readable() -> None:
    long = []
    for path in files():
        text = path.read_text()
        long += [
            f"{path.name}:{node.lineno} {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
        ]
        if len(text.splitlines()) > 400:
            long.append(path.name)

    assert long == []
