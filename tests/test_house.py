"""The structure of the package: imports go one way, the kernel needs torch alone, and tests mirror the rooms."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "retrograd"

RANKS = [
    ("settings", "core", "durable"),
    ("accel", "parallel", "data", "lm", "proofs"),
    ("query",),
    ("runs",),
    ("evaluate", "trust", "select"),
    ("unlearn", "attack"),
    ("lab", "experiment", "plan"),
    ("report",),
    ("commands",),
    ("cli", "trainer", "optim", "__init__", "__main__"),
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
KERNEL = sorted((PACKAGE / "core").rglob("*.py"))
OUTSIDE = {"subprocess", "ctypes", "tempfile", "shutil", "mmap", "threading"}  # what no kernel needs


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, type-checking imports and those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in RANK, f"{path} is in no room of the table"
    for name in imports(path):
        if name.startswith("retrograd."):
            other = name.split(".")[1]
            assert RANK[other] <= RANK[room], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", KERNEL, ids=lambda path: path.name)
def test_the_kernel_imports_torch_only_and_prints_nothing(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(path)}
    assert not found - set(sys.stdlib_module_names) - {"retrograd", "torch"}
    assert not found & OUTSIDE
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.parent.name for path in TESTS.rglob("test_*.py")} - {TESTS.name}
    assert rooms <= set(RANK), f"folders of tests without a room: {rooms - set(RANK)}"
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}, "pytest imports one of a name"


TOO_LONG: set[str] = set()  # files that wait for being parted: none
TOO_LONG_FUNCTIONS: set[str] = set()


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    told = ast.get_docstring(function) is not None
    documented = (first.end_lineno or 0) - first.lineno + 1 if told else 0
    return (function.end_lineno or 0) - function.lineno + 1 - documented


def test_files_and_functions_are_short() -> None:
    """400 lines, and 50 of code, but for what waits."""
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf8") for path in FILES}
    assert {name for name, text in files.items() if len(text.splitlines()) > 400} <= TOO_LONG
    long = set()
    for name, text in files.items():
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        long |= {f"{name}:{function.name}" for function in functions if code_lines(function) > 50}
    assert long <= TOO_LONG_FUNCTIONS


def test_one_place_makes_trajectories() -> None:
    """Whoever trains takes a `Ready`: then all replay, resume and retrain alike."""
    makers = set()
    for path in FILES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(node, ast.Call)]
        if any(isinstance(call.func, ast.Name) and call.func.id == "Trajectory" for call in calls):
            makers.add(str(path.relative_to(PACKAGE)))
    assert makers == {"runs/trajectory.py"}


def test_protocols_can_be_checked_at_run_time() -> None:
    """Or the rooms whose annotations `make test-all` checks cannot even be imported there."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases):
                assert "runtime_checkable" in map(ast.unparse, node.decorator_list), f"{path.name}: {node.name}"
