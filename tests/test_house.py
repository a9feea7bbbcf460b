"""The structure of the package: imports go one way, and the kernel needs torch alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "retrograd"
ROOMS = ["settings", "core", "lm", "data", "runs", "unlearn", "lab", "stages", "select", "commands", "cli"]


def imports(path: Path) -> set[str]:
    """Modules that a file imports, type-checking imports and those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    above = ROOMS[ROOMS.index(room) + 1 :]
    files = [PACKAGE / f"{room}.py"] if room == "cli" else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        upward = {name for name in imports(file) for other in above if name.startswith(f"retrograd.{other}")}
        assert not upward, f"{file.relative_to(PACKAGE)} imports {upward}"


def test_the_kernel_imports_torch_only() -> None:
    import sys

    for file in (PACKAGE / "core").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names) - {"retrograd", "torch"}
        assert not outside, f"{file.name} imports {outside}"
