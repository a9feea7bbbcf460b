"""The commands of docs/queries.md, run in order as they stand, but on a tiny model from disk."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import quiz

from retrograd.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "queries.md"
FILE = re.compile(r"^`([\w.]+)`:.*?^```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = 'retrograd() { printf "%s\\0" "$@"; printf "\\036"; }\n'


def test_every_command_of_the_page_on_queries_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf8")
    files, commands = FILE.findall(text), "".join(COMMANDS.findall(text))
    assert [name for name, _ in files] == ["train.jsonl", "rivers.jsonl", "questions.jsonl", "mine.py", "queries.yaml"]
    for name, content in files:
        (tmp_path / name).write_text(content, encoding="utf8")
    model = str(quiz.save(tmp_path / "model"))
    told = subprocess.run(["bash", "-ec", SHELL + commands], capture_output=True, text=True, check=True).stdout
    calls = [call.split("\0")[:-1] for call in told.split("\036")[:-1]]
    assert len(calls) == commands.count("retrograd ") == 8
    monkeypatch.chdir(tmp_path)
    for call in calls:
        assert main([argument.replace("EleutherAI/pythia-14m", model) for argument in call]) == 0, call
    _the_tables_are_true(text, tmp_path / "runs")


def _the_tables_are_true(text: str, runs: Path) -> None:
    letter, own, words = (
        json.loads((runs / n / "queries/query/query.json").read_text()) for n in ("letter", "own", "text")
    )
    section = text[text.index("## What query.json says") :]
    named = set(re.findall(r"`([a-z_]+)`", section))
    assert set(letter) <= named
    assert set(words) <= named
    assert named - set(letter) - set(words) <= {"of"}
    assert own["prompt"] == "{question}\n{choices}\nThe answer is"
    assert letter["template"] == "mmlu"
    assert (runs / "several/queries/bees_or_rivers/scores.pt").exists()
