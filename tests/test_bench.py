"""The benchmarks run, on sizes that say nothing about speed, and write their figures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_lds_takes_no_world_that_was_made_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("bench_lds", BENCH / "lds.py")
    assert spec
    assert spec.loader
    lds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lds)
    built = []

    def build(text: Path, out: Path, steps: int, documents: int) -> None:
        built.append(steps)
        (out / "model").mkdir(parents=True)
        (out / "model/tokenizer.json").write_text("{}")

    def claim(out: str = "out", **changes: Any) -> None:
        given = {"text": tmp_path / "text", "out": tmp_path / out, "fresh": False, "documents": 8, **changes}
        lds.claim_world(argparse.Namespace(**given))

    monkeypatch.setattr(lds, "build_world", build)
    (tmp_path / "text").write_text("some")
    claim()
    claim()
    claim("other", fresh=True)
    assert built == [400, 0]
    for changes in ({"fresh": True}, {"documents": 4}):
        with pytest.raises(SystemExit, match="give another --out"):
            claim(**changes)
    (tmp_path / "out/world.json").unlink()
    with pytest.raises(SystemExit, match="that does not say how it was made"):
        claim()
