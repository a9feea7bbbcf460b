"""The commands of docs/queries.md, run as they stand on a tiny model; and files and links that pages name are there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import quiz

from retrograd.cli import main

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "queries.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
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
    assert len(calls) == commands.count("retrograd ") == 11
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
    assert named - set(letter) - set(words) <= {"of", "then"}
    assert own["prompt"] == "{question}\n{choices}\nThe answer is"
    assert letter["template"] == "mmlu"
    assert (runs / "several/queries/bees_or_rivers/scores.pt").exists()
    later = json.loads((runs / "pre_scores/queries/query/query.json").read_text())
    assert later["then"] == [{"path": "runs/fine", "steps": 1, "rows": 2}]


def heading_links(page: Path) -> set[str]:
    """What `page.md#…` may name, by GitHub's rule."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_of_a_page_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf8")
    for name in re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|sh|md|toml))`", text):
        first = name.split("/")[0]
        homes = [home for home in (ROOT, ROOT / "retrograd") if (home / first).is_dir()]  # none: a user's own file
        assert not homes or any((home / name).exists() for home in homes), f"{page.name} names {name}"
    for link, part in re.findall(r"\]\(([^):#\s]*)(?:#([^)\s]*))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not part or part in heading_links(target), f"{page.name} links to {link}#{part}"
