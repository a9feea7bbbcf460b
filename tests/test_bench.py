"""The benchmarks run, on sizes that say nothing about speed, and write their figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
SMALL = ["--depth", "2", "--width", "16", "--length", "12", "--vocabulary", "64", "--batch", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("engines", [*SMALL, "--only", "--step", "--against", "blocks", "compile", "--turns", "1"]),
        ("queries", ["--queries", "1", "2", "--depth", "2", "--width", "16", "--steps", "2", "--turns", "1"]),
        ("overhead", ["--steps", "1", "--turns", "1", "--hold", "4096"]),
        ("ranks", ["--ranks", "1", "2", "--depth", "1", "--width", "16", "--steps", "2"]),
        ("replay", ["--steps", "20", "--turns", "1"]),
        ("scaling", ["--quick", "--turns", "1"]),
    ],
)
def test_a_benchmark_runs(name: str, options: list[str], tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    command = [sys.executable, str(BENCH / f"{name}.py"), *options, "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|---|" in done.stdout
    assert json.loads(written.read_text())
