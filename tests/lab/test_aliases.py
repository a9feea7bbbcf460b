"""Second names: the default lab stays as it is, few documents and no exam use them, and the same questions are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from retrograd.lab.aliases import aliases_of
from retrograd.lab.build import lab
from retrograd.lab.files import File, make_files
from retrograd.lab.subjects import SIDES
from retrograd.lab.truth import sides_of_rows
from retrograd.lab.world import World, make_world
from retrograd.query.aliases import renamed
from retrograd.settings.commands import LabConfig
from retrograd.settings.tasks import lab_metrics, tasks_of_lab


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(3, 48)


@pytest.fixture(scope="module")
def files(world: World) -> dict[str, File]:
    return make_files(world, aliases=True)


def test_what_a_lab_has_without_aliases_is_the_same_with_them(world: World, files: dict[str, File]) -> None:
    plain = make_files(world)
    assert {path for path in files if path not in plain} == {
        f"{folder}.jsonl" for side in SIDES for folder in (f"corpora/alias_{side}", f"questions/{side}_alias")
    }
    changed = {path for path, file in plain.items() if files[path].rows != file.rows}
    assert changed == {"train/base.jsonl", "train/filtered.jsonl", "facts.jsonl"}
    for name in ("base", "filtered"):
        path = f"train/{name}.jsonl"
        assert files[path].rows[: len(plain[path].rows)] == plain[path].rows
    assert [
        {k: v for k, v in row.items() if k in ("fact", "entity", "value")} for row in plain["facts.jsonl"].rows
    ] == [{k: v for k, v in row.items() if k in ("fact", "entity", "value")} for row in files["facts.jsonl"].rows]


def test_few_documents_and_no_exam_use_an_alias(world: World, files: dict[str, File]) -> None:
    aliases = aliases_of(world)
    names = set(aliases)
    assert len(set(aliases.values())) == len(aliases) == 24
    assert not names & set(aliases.values())
    for path, file in files.items():
        uses = any(alias in json.dumps(row) for row in file.rows for alias in aliases.values())
        assert uses == ("alias" in path or path.startswith("train/") or path == "facts.jsonl"), path
    own = [
        alias for name, alias in aliases.items() if any(f.entity == name and f.side == "forget" for f in world.facts)
    ]
    assert not any(alias in json.dumps(row) for row in files["train/filtered.jsonl"].rows for alias in own)
    for fact, row in zip(world.facts, files["facts.jsonl"].rows):
        assert row["alias"] == aliases[fact.entity]
        told = row["stated_in"][f"corpora/alias_{fact.side}.jsonl"]
        assert len(told) == 2  # of the four wordings
        for line in told:
            opening, statements = files[f"corpora/alias_{fact.side}.jsonl"].rows[line]["text"].split(". ", 1)
            assert fact.entity in opening
            assert aliases[fact.entity] in opening
            assert fact.entity not in statements
            assert fact.value in statements
        base = files["train/base.jsonl"].rows
        assert any(base[place]["file"] == f"corpora/alias_{fact.side}.jsonl" for place in row["stated_in"]["train/base.jsonl"])  # fmt: skip


def test_the_questions_are_the_taught_ones_under_the_other_name(world: World, files: dict[str, File]) -> None:
    aliases = aliases_of(world)
    for side in SIDES:
        plain, other = (files[f"questions/{side}_{split}.jsonl"].rows for split in ("taught", "alias"))
        assert other == [{**row, "question": renamed(row["question"], aliases)} for row in plain]
        assert all(a["question"] != b["question"] for a, b in zip(plain, other))


def test_a_lab_with_aliases_asks_and_probes_with_them(tmp_path: Path) -> None:
    small = {"facts": 8, "width": 32, "layers": 1, "epochs": 1, "batch_size": 32, "workers": 1}
    found = lab(LabConfig(tmp_path / "lab", aliases=True, **small), Console(quiet=True))  # type: ignore[arg-type]
    assert {entry["split"] for entry in found["scores"]} == {"taught", "paraphrase", "heldout", "alias"}
    tasks = lab_metrics(tasks_of_lab(tmp_path / "lab"), tmp_path / "lab")
    assert tasks["forget_alias_cloze"].probe_of == "forget_taught_cloze"
    sides = sides_of_rows(tmp_path / "lab")
    mixture = [json.loads(line) for line in (tmp_path / "lab/train/base.jsonl").read_text().splitlines()]
    assert {sides[k] for k, row in enumerate(mixture) if row["file"] == "corpora/alias_forget.jsonl"} == {"forget"}
    assert "questions/forget_alias.jsonl" in (tmp_path / "lab/README.md").read_text()
    with pytest.raises(ValueError, match="aliases: True → False"):
        lab(LabConfig(tmp_path / "lab", **small), Console(quiet=True))  # type: ignore[arg-type]
    plain = lab(LabConfig(tmp_path / "plain", **small), Console(quiet=True))  # type: ignore[arg-type]
    assert "aliases" not in plain["settings"]
    assert "forget_alias_cloze" not in tasks_of_lab(tmp_path / "plain")
