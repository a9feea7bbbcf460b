"""What can be asked of a model, said once for queries and for tasks of an evaluation. No heavy imports here.

    letter      multiple choice by answer letter, zero-shot
    cloze       multiple choice by the answers' texts, zero-shot
    text        the loss of documents
    generate    greedy continuations of the documents' first tokens, for people to read: no query
    memory      how much of each document is known by heart: no query
    kl          the divergence of documents' predictions from another model's: no query
    depth       in which layers the right answers' texts are known, by another model's states: no query

A choice loss, in nats, is four_way (among the question's options) or full (of the right one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["COLUMNS", "ChoiceForm", "ChoiceLoss", "Form", "Question", "Source", "names_of"]

ChoiceForm = Literal["letter", "cloze"]
Form = Literal["letter", "cloze", "text", "generate", "memory", "kl", "depth"]
ChoiceLoss = Literal["four_way", "full"]

COLUMNS = (
    "input_ids", "labels", "messages", "tools", "prompt", "completion", "text",
    "question", "choices", "answer", "subject",
)  # fmt: skip
"""What a column can be."""


def names_of(columns: Sequence[str]) -> dict[str, str]:
    """The column of each role, of settings such as "prompt=question".

    Raises:
        ValueError: If one is no such setting, or a role or a column is named twice.

    >>> names_of(["prompt=instruction", "completion=output"])
    {'prompt': 'instruction', 'completion': 'output'}
    """
    roles: dict[str, str] = {}
    for setting in columns:
        role, equals, name = setting.partition("=")
        if role not in COLUMNS or not equals or not name:
            raise ValueError(
                f"columns: {setting!r} does not say what a column is; write ROLE=COLUMN, with the role one of "
                f"{', '.join(COLUMNS)}"
            )
        if role in roles or name in roles.values():
            raise ValueError(f"columns: {', '.join(columns)} names {role!r} or column {name!r} twice; name each once")
        roles[role] = name
    return roles


@dataclass(frozen=True)
class Source:
    """A data set, and how much of it is read."""

    dataset: str | None = None
    """Hub name, folder saved by `datasets`, or a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or one of them with
    .gz or .zst behind it."""
    subset: str | None = None
    """Subset ("configuration") of a hub data set."""
    split: str = "train"
    """Split or expression of splits, such as train[:8]."""
    text_column: str | None = None
    """Column of text; found by itself when None (input_ids, messages, prompt and completion, or text)."""
    columns: tuple[str, ...] = ()
    """What columns are, where they have other names: prompt=instruction completion=output, or messages=dialogue. Of
    input_ids, labels, messages, tools, prompt, completion, text; question, choices, answer, subject."""
    assistant_only_loss: bool = False
    """Of chats, count what the assistant says alone. Every token of a chat counts otherwise."""
    max_length: int | None = None
    """Cut documents to this many tokens, questions from the left; the model's context length when None."""
    limit: int | None = None
    """Use the first documents or questions only."""


@dataclass(frozen=True)
class Question(Source):
    """A data set, and how a model is asked about it."""

    form: Form = "text"
    """text: mean token loss. letter, cloze: multiple choice by answer letter, or by the answers' own texts; the data
    set then needs question, choices and answer."""
    template: str = "auto"
    """Prompt of a question: plain, mmlu, wmdp, wmdp_chem, wmdp_cyber or legacy (letter); plain_cloze or wmdp_cloze
    (cloze); or a text with {question} and, for letter, {choices}. auto: plain_cloze for cloze; for letter, mmlu where
    every question has a subject, and else plain."""
    normalise: bool = False
    """cloze: divide an answer's log-likelihood by its length in characters."""

    @property
    def choices(self) -> bool:
        return self.form in ("letter", "cloze")
