"""Multiple-choice questions as tokens, split the way lm-evaluation-harness splits them.

With e(·) the tokenizer, special tokens included, a prompt p and the target t of an option:

    context = e(p)        answer = e(p + t)[len(context):]

Special tokens at the end of a text are left out. Trailing whitespace of p belongs to t. The model reads the last
`max_length` tokens of context + answer without the answer's last token, which it only has to predict: a long prompt
loses its beginning, never its answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retrograd.data.tokens import encode
from retrograd.query.prompts import LETTERS, Prompt, Template, find_template, render

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Questions", "build_questions", "right_place"]

_BATCH = 1000  # questions tokenised in one call


@dataclass(frozen=True, eq=False)
class Questions:
    """Tokenised questions; question q has options 0, 1, … in the order of its `choices`.

    Args:
        form: "letter" or "cloze".
        rows: What the model reads. Letter: the prompt alone, one row; cloze: prompt and answer, one row per option.
        targets: What it has to predict at the row's end. Letter: the letters' tokens, all at the one last position;
            cloze: the tokens of each option's answer, at the last positions of the option's row.
        gold: The right option, [n] int64.
        widths: Characters of each option's text, what lm-eval's acc_norm divides by; letter: ones.
        hashes: Of each prompt's text, before any cut: 16 hexadecimal digits.
        template: How the prompts were written.
        cut: Questions whose prompt lost its beginning to max_length.
        subjects: Of each question, None where there is none.
    """

    form: str
    rows: list[list[np.ndarray]]
    targets: list[list[np.ndarray]]
    gold: np.ndarray
    widths: list[np.ndarray]
    hashes: list[str]
    template: Template
    cut: int = 0
    subjects: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = {len(column) for column in (self.rows, self.targets, self.gold, self.widths, self.hashes)}
        assert sizes == {len(self.gold)}, f"every question has one target: {sizes}"
        assert (self.gold >= 0).all(), "every target is an option"
        assert (self.gold < self.options).all(), "every target is an option"

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def options(self) -> np.ndarray:
        """Options of each question, [n] int64."""
        return np.array([len(widths) for widths in self.widths], dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each question's longest row, [n] int64."""
        return np.array([max(map(len, rows)) for rows in self.rows], dtype=np.int64)

    def digest(self) -> str:
        """Hash of tokens, answers and widths; the same in every process and on every machine."""
        total = hashlib.sha256(f"questions 1 {self.form} {len(self)}".encode())
        for rows, targets, gold, widths in zip(self.rows, self.targets, self.gold, self.widths, strict=True):
            for array in (*rows, *targets, widths):
                total.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
            total.update(int(gold).to_bytes(8, "little"))
        return total.hexdigest()


class _Question(NamedTuple):
    """One row of the data set, checked."""

    number: int
    prompt: Prompt
    gold: int
    widths: list[int]
    subject: str | None


def build_questions(
    documents: Dataset,
    tokenizer: Any,
    *,
    form: str = "letter",
    template: Template | str | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    vocab_size: int | None = None,
) -> Questions:
    """Tokenised questions of a data set; a question's number is its row.

    Args:
        documents: Columns `question`, `choices` (2 to 26 texts), `answer` (place of the right one, from 0; or its
            letter) and, where the template names it, `subject`.
        tokenizer: A transformers tokenizer; its special tokens are added as it does by default.
        form: Answer by letter, or by the option's text.
        template: A `prompts.Template`, the name of one, or a prompt written out with {question} and {choices}; None
            for the plain one of the form; "auto" for mmlu where all questions have a subject to name, else plain.
        max_length: Tokens that the model can read; longer prompts are cut from the left. None for no cut.
        limit: Keep only the first `limit` questions.
        vocab_size: Rows of the model's embedding; token ids must be below.
    Raises:
        ValueError: If columns, a row, the template or tokens do not fit; a letter that is not one token is refused.
    """
    if template != "auto":
        template = find_template(template, form)  # before the data: a wrong name is told at once
    for name, number in (("max_length", max_length), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it has to be at least 1, or None")
    missing = {"question", "choices", "answer"} - set(documents.column_names)
    if missing:
        raise ValueError(
            f"no column {min(missing)!r}; the data set has {', '.join(documents.column_names)}. Questions need "
            "question, choices and answer: rename its columns, or, to measure the text, give the task form: text"
        )
    count = len(documents) if limit is None else min(limit, len(documents))
    if not count:
        raise ValueError("the data set has no question; give one with rows, or a wider split")
    columns = [name for name in ("question", "choices", "answer", "subject") if name in documents.column_names]
    documents = documents.with_format(None).select_columns(columns).select(range(count))
    if not isinstance(template, Template):
        template = find_template(_automatic(documents, form), form)
    questions: list[_Question] = []
    tokens: list[tuple[list[np.ndarray], list[np.ndarray], bool]] = []
    for batch in documents.iter(batch_size=_BATCH):
        rows = [dict(zip(columns, row)) for row in zip(*(batch[name] for name in columns))]
        read = [_read(row, len(questions) + i, template) for i, row in enumerate(rows)]
        questions += read
        tokens += _tokens(read, tokenizer, template.form, max_length, vocab_size)
    return Questions(
        template.form,
        [rows for rows, _, _ in tokens],
        [targets for _, targets, _ in tokens],
        np.array([question.gold for question in questions], dtype=np.int64),
        [np.array(question.widths, dtype=np.int64) for question in questions],
        [hashlib.sha256(question.prompt.text.encode()).hexdigest()[:16] for question in questions],
        template,
        sum(cut for _, _, cut in tokens),
        [question.subject for question in questions],
    )


def _automatic(documents: Dataset, form: str) -> str | None:
    subjects = documents["subject"][:] if form == "letter" and "subject" in documents.column_names else [None]
    return "mmlu" if all(isinstance(subject, str) and subject.strip() for subject in subjects) else None


def _read(row: dict[str, Any], number: int, template: Template) -> _Question:
    question, choices, subject = row["question"], row["choices"], row.get("subject")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"row {number}: question is {str(question)[:60]!r}, not a text; write it out or drop the row")
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise ValueError(
            f"row {number}: choices is {type(choices).__name__} {str(choices)[:60]!r}, not a list of texts; store "
            "a list (JSON lines and Parquet can, CSV cannot)"
        )
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"row {number}: {len(choices)} choices; a question needs 2 to {len(LETTERS)}. Drop the row")
    for place, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(
                f"row {number}: choice {place} is {str(choice)[:60]!r}, not a text; fill it in or drop the row"
            )
    if subject is not None and not isinstance(subject, str):
        raise ValueError(f"row {number}: subject is {subject!r}, not a text; store its name")
    try:
        prompt = render(template, question, choices, subject)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    widths = [1] * len(choices) if template.form == "letter" else [len(choice) for choice in choices]
    return _Question(number, prompt, right_place(row["answer"], len(choices), number), widths, subject)


def right_place(answer: Any, options: int, number: int) -> int:
    """The place of a question's right option, from 0, of what its row says: a place, or a letter.

    Raises:
        ValueError: If it is neither, or there is no such option.
    """
    place = answer
    if isinstance(answer, str):
        text = answer.strip()
        place = LETTERS.index(text) if len(text) == 1 and text in LETTERS else int(text) if text.isdecimal() else None
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < options:
        raise ValueError(
            f"row {number}: answer is {answer!r}, and there are {options} choices; it has to be a place from 0 to "
            f"{options - 1}, or a letter from A to {LETTERS[options - 1]}. Correct it or drop the row"
        )
    return place


def _tokens(
    questions: Sequence[_Question], tokenizer: Any, form: str, max_length: int | None, vocab_size: int | None
) -> list[tuple[list[np.ndarray], list[np.ndarray], bool]]:
    """(rows, targets, whether cut) of each question."""
    heads = [question.prompt.text.rstrip() for question in questions]  # lm-eval moves trailing space to the answer
    contexts = _encode(tokenizer, heads)
    wholes = iter(
        _encode(tokenizer, [question.prompt.text + end for question in questions for end in question.prompt.targets])
    )
    encoded = []
    for question, context in zip(questions, contexts, strict=True):
        answers = [next(wholes)[len(context) :] for _ in question.prompt.targets]
        _check_ids(question.number, [*context, *(k for ids in answers for k in ids)], vocab_size)
        _check_answers(question, context, answers, form, tokenizer, max_length)
        read = [context] if form == "letter" else [context + answer[:-1] for answer in answers]
        cut = max_length is not None and any(len(ids) > max_length for ids in read)
        rows = [np.array(ids if max_length is None else ids[-max_length:], dtype=np.int64) for ids in read]
        ends = [[ids[0] for ids in answers]] if form == "letter" else answers
        encoded.append((rows, [np.array(ids, dtype=np.int64) for ids in ends], cut))
    return encoded


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """As lm-eval's `tok_encode`: a text that spells out the first special token gets no second one.

    What a tokenizer adds at the end (EOS, SEP) is left out: no answer follows it.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    mark = "" if first is None else str(tokenizer.decode(first))
    marked = [mark != "" and text.startswith(mark) for text in texts]
    return [
        ids[before if bare else 0 : len(ids) - after]
        for (ids, before, after), bare in zip(encode(tokenizer, texts), marked)
    ]


def _check_ids(number: int, ids: Sequence[int], vocab_size: int | None) -> None:
    if vocab_size is not None and max(ids) >= vocab_size:
        raise ValueError(
            f"row {number} has token id {max(ids)}, outside the vocabulary of {vocab_size}: tokenizer and model "
            "do not match"
        )


def _check_answers(
    question: _Question,
    context: list[int],
    answers: list[list[int]],
    form: str,
    tokenizer: Any,
    max_length: int | None,
) -> None:
    for target, answer in zip(question.prompt.targets, answers):
        if form == "letter" and len(answer) != 1:
            pieces = tokenizer.convert_ids_to_tokens(answer)
            raise ValueError(
                f"row {question.number}: letter {target.strip()!r} is {len(answer)} tokens {pieces} after the prompt "
                "and has to be one. Use another tokenizer, a template that does not end in a space, or form='cloze'"
            )
        if not answer or not context:
            bare = f"answer {target[:60]!r}" if context else "the prompt"
            raise ValueError(
                f"row {question.number}: {bare} has no token of its own; drop the row or use another template"
            )
        if max_length is not None and len(answer) > max_length:
            raise ValueError(
                f"row {question.number}: an answer of {len(answer)} tokens does not fit into max_length {max_length}; "
                "answers are never cut. Raise max_length or drop the row"
            )
    firsts = [answer[0] for answer in answers]
    if form == "letter" and len(set(firsts)) < len(firsts):
        raise ValueError(
            f"row {question.number}: two letters share one token ({tokenizer.convert_ids_to_tokens(firsts)}), so no "
            "answer can be told apart. Use another tokenizer, or form='cloze'"
        )
