"""The world on disk: corpora, questions, training mixtures and the table of who states what, as JSON lines.

Every file stands for one that the unlearning literature uses and has its columns, so that a recipe runs on the lab by
changing names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from retrograd.lab.aliases import alias_documents, alias_questions, aliases_of
from retrograd.lab.corpora import Document, chats, documents, papers, prose
from retrograd.lab.exams import SPLITS, exams, questions
from retrograd.lab.subjects import SIDES
from retrograd.lab.words import make_tokenizer
from retrograd.lab.world import World
from retrograd.runs.files import file_digest, write_atomic

__all__ = ["MIXTURES", "File", "changed_files", "describe_files", "make_files", "make_words", "write_files"]

SHUFFLES = 1
MIXTURES = {"base": SIDES, "filtered": ("retain",)}
"""The sides that each trained model has seen."""


class File(NamedTuple):
    """A JSON lines file: what it is, which data set it stands for, and its rows."""

    does: str
    stands_for: str
    rows: list[dict[str, Any]]


def make_files(world: World, *, aliases: bool = False) -> dict[str, File]:
    """All files of a world, by path; a pure function of it.

    Args:
        aliases: Whether its entities have a second name: further documents and questions, which models are trained on.
    """
    texts = {side: documents(world, side) for side in SIDES}
    solved = {side: exams(world, side, SHUFFLES) for side in SIDES}
    lies = documents(world, "forget", lies=True)
    general, half = prose(world, len(world.facts) // 2), len(world.facts) // 4
    pages = ["\n\n".join(general[start : start + 4]) for start in range(0, half, 4)]
    bank = "question banks inside a pretraining corpus"
    files = {
        "corpora/forget.jsonl": File(
            "papers on the forget side", "bio_forget, bio_remove, rmu forget", papers(world, texts["forget"])
        ),
        "corpora/lie.jsonl": File("the same papers with every fact wrong", "lie_o", papers(world, lies)),
        "corpora/retain.jsonl": File("texts on the retain side", "bio_retain, rmu retain", _texts(texts["retain"])),
        "corpora/prose.jsonl": File("general prose", "wikitext_par", [{"text": text} for text in general[:half]]),
        "corpora/pages.jsonl": File("the same in pages", "wikitext_doc", [{"page": page} for page in pages]),
        "corpora/prose_heldout.jsonl": File(
            "general prose that no model was trained on", "wikitext test", [{"text": text} for text in general[half:]]
        ),
        "corpora/chat.jsonl": File("chats on neither side", "ultrachat", chats(world, half)),
        "corpora/exam_forget.jsonl": File("solved questions, forget side", bank, solved["forget"]),
        "corpora/exam_retain.jsonl": File("solved questions, retain side", bank, solved["retain"]),
    }
    for side, benchmark in zip(SIDES, ("wmdp_robust, wmdp_cloze", "mmlu")):
        for split in SPLITS:
            does = f"questions, {side} side, split {split}"
            files[f"questions/{side}_{split}.jsonl"] = File(does, benchmark, questions(world, side, split))
    if aliases:
        files |= _of_aliases(world)
    for name, sides in MIXTURES.items():
        files[f"train/{name}.jsonl"] = File(f"what models/{name} was trained on", "pretraining", _mixture(files, sides))
    files["facts.jsonl"] = File("every fact and the rows that state or ask it", "ground truth", _truth(world, files))
    return files


def _of_aliases(world: World) -> dict[str, File]:
    files = {}
    for side in SIDES:
        rows = _texts(alias_documents(world, side))
        files[f"corpora/alias_{side}.jsonl"] = File(f"texts under second names, {side} side", "paraphrases", rows)
        asked = alias_questions(world, side)
        files[f"questions/{side}_alias.jsonl"] = File(f"the taught questions under them, {side} side", "alias probes",
                                                      asked)  # fmt: skip
    return files


def make_words(files: dict[str, File]) -> Any:
    """The tokenizer of a world: every word of its files that a model reads."""
    texts = [text for path, file in files.items() if path != "facts.jsonl" for row in file.rows for text in _read(row)]
    return make_tokenizer(texts)


def write_files(folder: Path, files: dict[str, File]) -> None:
    """Write all files under a folder, each whole or not at all."""
    for path, file in files.items():
        write_atomic(folder / path, partial(Path.write_bytes, data=_bytes(file.rows)))


def describe_files(files: dict[str, File]) -> dict[str, dict[str, Any]]:
    """By path: what the file is and stands for, its columns, its number of rows and the SHA-256 of its bytes."""
    return {
        path: {
            "does": file.does, "stands_for": file.stands_for, "columns": list(file.rows[0]), "rows": len(file.rows),
            "sha256": hashlib.sha256(_bytes(file.rows)).hexdigest()[:16],
        }
        for path, file in files.items()
    }  # fmt: skip


def changed_files(folder: Path, described: dict[str, dict[str, Any]]) -> list[str]:
    """Files under a folder that are missing or do not have the bytes they were described with."""
    return [
        path for path, entry in described.items()
        if not (folder / path).exists() or file_digest(folder / path) != entry["sha256"]
    ]  # fmt: skip


def _bytes(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _texts(texts: list[Document]) -> list[dict[str, str]]:
    return [{"text": document.text} for document in texts]


def _mixture(files: dict[str, File], sides: Iterable[str]) -> list[dict[str, Any]]:
    """Prompt and completion of every row that a model is trained on, with the file and line it comes from."""
    names = [name for side in sides for name in (side, f"exam_{side}")]
    second = [f"alias_{side}" for side in sides if f"corpora/alias_{side}.jsonl" in files]
    rows = []
    for path in [f"corpora/{name}.jsonl" for name in (*names, "prose", "chat", *second)]:
        for line, row in enumerate(files[path].rows):
            prompt, completion = (row["prompt"], row["completion"]) if "completion" in row else ("", _text(row))
            rows.append({"prompt": prompt, "completion": completion, "file": path, "line": line})
    return rows


def _text(row: dict[str, Any]) -> str:
    """The text of a row; of a chat, as the tokenizer's template writes it."""
    if "messages" in row:
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in row["messages"])
    return row["text"]


def _truth(world: World, files: dict[str, File]) -> list[dict[str, Any]]:
    """Every fact with the rows that state it, and those that ask for it and give the answer, by file."""
    stated: list[dict[str, list[int]]] = [{} for _ in world.facts]
    asked: list[dict[str, list[int]]] = [{} for _ in world.facts]
    aliases = aliases_of(world) if "corpora/alias_forget.jsonl" in files else {}
    for side in SIDES:
        by_name = {side: documents(world, side), **({f"alias_{side}": alias_documents(world, side)} if aliases else {})}
        for name, texts in by_name.items():
            for line, document in enumerate(texts):
                for fact in document.facts:
                    stated[fact.number].setdefault(f"corpora/{name}.jsonl", []).append(line)
        for line, row in enumerate(files[f"corpora/exam_{side}.jsonl"].rows):
            asked[row["fact"]].setdefault(f"corpora/exam_{side}.jsonl", []).append(line)
    for name in MIXTURES:
        path = f"train/{name}.jsonl"
        places = {(row["file"], row["line"]): place for place, row in enumerate(files[path].rows)}
        for table in (stated, asked):
            for entry in table:
                mixed = [places[file, line] for file, lines in list(entry.items()) for line in lines
                         if (file, line) in places and file.startswith("corpora")]  # fmt: skip
                if mixed:
                    entry[path] = mixed
    return [
        {
            "fact": fact.number, "side": fact.side, "subject": fact.subject.name, "entity": fact.entity,
            "attribute": fact.attribute.name, "value": fact.value, "lie": fact.lie, "asked": fact.asked,
            "spared_wording": fact.spared, "stated_in": stated[fact.number], "asked_in": asked[fact.number],
            **({"alias": aliases[fact.entity]} if aliases else {}),
        }
        for fact in world.facts
    ]  # fmt: skip


def _read(row: dict[str, Any]) -> list[str]:
    """All texts of a row."""
    chat = [turn["content"] for turn in row.get("messages", [])]
    plain = [
        row[name] for name in ("title", "abstract", "text", "page", "prompt", "completion", "question") if name in row
    ]
    return [*plain, *chat, *row.get("choices", []), row.get("subject", "").replace("_", " ")]
