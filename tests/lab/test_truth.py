"""Rankings against the truth of a lab: which rows taught what, recall and reciprocal rank by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrograd.data.documents import load_documents
from retrograd.lab.files import make_files, write_files
from retrograd.lab.truth import recall_at, reciprocal_rank, sides_of_rows, strongest, taught_by
from retrograd.lab.world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0, 8)


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    write_files(folder, make_files(world))
    return folder


@pytest.mark.parametrize("mixture", ["base", "filtered"])
def test_the_rows_that_taught_a_fact_name_it_and_its_value(folder: Path, world: World, mixture: str) -> None:
    rows = load_documents(str(folder / "train" / f"{mixture}.jsonl"))
    texts = [row["prompt"] + row["completion"] for row in rows]
    for number, taught in taught_by(folder, mixture).items():
        fact = world.facts[number]
        seen = mixture == "base" or fact.side == "retain"
        asked = 3 * (seen and fact.asked)
        assert [len(rows) for rows in taught] == [4 * seen, asked, asked]
        assert taught.rows == sorted({*taught.stated, *taught.answered})
        assert all(fact.entity in texts[row] and fact.value in texts[row] for row in taught.rows)
        assert all(texts[row].endswith(f"Answer: {fact.value}") for row in taught.answered)
        assert all(texts[row][:-1].endswith("Answer: ") and fact.entity in texts[row] for row in taught.lettered)


def test_the_side_of_a_row_is_that_of_its_entity(folder: Path, world: World) -> None:
    rows = load_documents(str(folder / "train/base.jsonl"))
    sides = sides_of_rows(folder)
    assert len(sides) == len(rows)
    for row, side in zip(rows, sides):
        found = {fact.side for fact in world.facts if fact.entity in row["prompt"] + row["completion"]}
        assert found == ({side} if side else set())
    assert all(sides.count(side) == 32 // 2 + 36 for side in ("forget", "retain"))
    assert "forget" not in sides_of_rows(folder, "filtered")


def test_recall_and_rank_by_hand() -> None:
    scores = [0.5, -3.0, 0.0, -1.0, -2.0, 0.0]  # proponents first: 1, 4, 3, then the equal 2 and 5, then 0
    assert strongest(scores, 5) == [1, 4, 3, 2, 5]
    assert [recall_at(scores, [4, 3, 0], k) for k in (1, 2, 3, 5, 6)] == [0, 1 / 2, 2 / 3, 2 / 3, 1]
    assert [reciprocal_rank(scores, rows) for rows in ([1, 0], [3, 4], [0])] == [1, 1 / 2, 1 / 6]


def test_what_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recall of no rows says nothing"):
        recall_at([0.0], [], 1)
    with pytest.raises(ValueError, match="recall of no rows says nothing"):
        reciprocal_rank([0.0], [])
    with pytest.raises(ValueError, match="recall@0 looks at no row"):
        recall_at([0.0], [0], 0)
    with pytest.raises(ValueError, match="has to be a folder of `retrograd lab`"):
        taught_by(tmp_path)
    with pytest.raises(ValueError, match="has to be a folder of `retrograd lab`"):
        sides_of_rows(tmp_path)
