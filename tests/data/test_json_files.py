"""JSON files hold what was written: no dates made of text, and no file refused for a column that nobody reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from test_tokens import TOKENIZERS

from retrograd.data.documents import load_documents
from retrograd.data.rows import build_rows
from retrograd.query.questions import build_questions

DATES = ["2001-01-01", "1999-12-31T23:59:59", "12:30", "1e5", "true", "null"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_that_look_like_something_else_stay_texts_in_every_format(tmp_path: Path) -> None:
    rows = [{"text": text} for text in DATES]
    lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"text": DATES}, indent=1))
    (tmp_path / "d.json").write_text(json.dumps(DATES))
    (tmp_path / "e.csv").write_text("text\n" + "\n".join(DATES) + "\n")
    (tmp_path / "f.tsv").write_text("text\tn\n" + "\n".join(f"{text}\t1" for text in DATES) + "\n")
    (tmp_path / "g.txt").write_text("\n".join(DATES) + "\n")
    Dataset.from_dict({"text": DATES}).to_parquet(str(tmp_path / "h.parquet"))
    for file in sorted(tmp_path.iterdir()):
        assert load_documents(str(file))["text"][:] == DATES, file.name


def test_dates_in_lists_and_chats_stay_texts(tmp_path: Path) -> None:
    question = {"question": "1945-05-08", "choices": ["1945-05-08", "1944-06-06"], "answer": 0}
    chat = {"messages": [{"role": "user", "content": "1945-05-08"}]}
    quiz = load_documents(lines(tmp_path / "quiz.jsonl", [question] * 2))
    asked = build_questions(quiz, TOKENIZERS["bytes"](), form="cloze")
    assert len(asked) == 2
    assert asked.widths[0].tolist() == [10, 10]
    assert load_documents(lines(tmp_path / "chat.jsonl", [chat] * 2))["messages"][:] == [chat["messages"]] * 2


def test_a_late_row_with_another_key_or_type_changes_no_other_column(tmp_path: Path) -> None:
    plain = [{"text": f"row {k}", "note": None, "n": k} for k in range(2500)]
    late = [{"text": "late", "label": "new", "note": "told", "n": "many", "odd": {"a": [1, "b"]}}]
    found = load_documents(lines(tmp_path / "d.jsonl", plain + late))
    assert found["text"][-2:] == ["row 2499", "late"]
    assert found["n"][-2:] == [2499, "many"]
    assert (found["label"][:3], found["label"][-1]) == ([None] * 3, "new")
    assert (found["note"][0], found["note"][-1]) == (None, "told")
    assert found["odd"][-1] == {"a": [1, "b"]}
    assert build_rows(found, TOKENIZERS["bytes"]()).documents == 2501


def test_shards_of_a_folder_with_other_columns_join(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        parts = [{"text": ["a"], "label": [1]}, {"label": ["x"], "text": ["b"], "more": ["c"]}, {"text": ["d"]}]
        for k, columns in enumerate(parts):
            shard, file = Dataset.from_dict(columns), folder / f"part-{k}{suffix}"
            {".jsonl": shard.to_json, ".csv": shard.to_csv, ".parquet": shard.to_parquet}[suffix](str(file))
        found = load_documents(str(folder))
        assert found["text"][:] == ["a", "b", "d"], suffix


def test_a_column_that_is_read_names_the_row_that_does_not_fit(tmp_path: Path) -> None:
    rows = [{"text": "a b"}] * 1200 + [{"text": 7}]
    with pytest.raises(ValueError, match="document 1200 is int '7', not text"):
        build_rows(load_documents(lines(tmp_path / "d.jsonl", rows)), TOKENIZERS["bytes"]())
    quiz = [{"question": "q", "choices": ["a", "b"], "answer": answer} for answer in (0, "B", 1.5)]
    with pytest.raises(ValueError, match=r"row 2: answer is 1\.5"):
        build_questions(load_documents(lines(tmp_path / "q.jsonl", quiz)), TOKENIZERS["bytes"](), form="cloze")
    asked = build_questions(load_documents(lines(tmp_path / "r.jsonl", quiz[:2])), TOKENIZERS["bytes"](), form="cloze")
    assert asked.gold.tolist() == [0, 1]


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"ids": [1, 2], "big": 2**63, "mixed": 1, "pair": "\U0001f600", "empty": [], "truth": True, "x": 0.1},
        {"ids": [], "big": 3, "mixed": "1", "pair": "é", "empty": [], "truth": False, "x": 2.5},
        {"ids": None, "big": None, "mixed": [1, "a"], "pair": None, "empty": None, "truth": None, "x": None},
    ]
    found = load_documents(lines(tmp_path / "d.jsonl", rows))
    for name in rows[0]:
        assert found[name][:] == [row[name] for row in rows], name
    assert found.features["ids"] == datasets.List(datasets.Value("int64"))
    assert found.features["x"] == datasets.Value("float64")


def test_lines_are_split_at_newlines_only_and_blank_ones_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + '\n{"text": "a\u2028b"}\r\n  \n{"text": "c\u0085d"}'.encode())
    assert load_documents(str(tmp_path / "d.jsonl"))["text"][:] == ["a\u2028b", "c\u0085d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n["b"]\n', "d.json, line 2 is list .*not an object"),
        ('{"text"\n{"text": "b"}\n', "d.json, line 1 is not valid JSON"),
        ('[{"text": "a"}, 3]', "d.json: item 1 is int '3', not an object or a text"),
        ('{\n"text": "a",\n"n": }\n', "d.json, line 1 is not valid JSON"),
        ('"text"\n', "d.json, line 1 is str 'text', not an object"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / "d.json"))


def test_a_broken_byte_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"d.jsonl, line 2 is not UTF-8: byte 0xff at 10"):
        load_documents(str(tmp_path / "d.jsonl"))


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"d.jsonl, line 2 is not valid JSON: .*surrogates not allowed"):
        load_documents(str(tmp_path / "d.jsonl"))


def test_a_pretty_printed_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"text": "a b", "choices": ["x", "y"]}, indent=2))
    assert load_documents(str(tmp_path / "d.json"))[0] == {"text": "a b", "choices": ["x", "y"]}
