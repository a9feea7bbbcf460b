"""What a page does not show: the words of corpora to forget.

A document of such a corpus is shown as its hash and its length. In every other text (training rows, questions, answers,
continuations) the corpus's words are blotted out, but for those that a corpus to retain has too, and for the grammar's
words (templates/grammar.txt). That is strict: a word is hidden even where it stands in an innocent sentence.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retrograd.data.documents import load_documents

__all__ = ["Mask", "corpus_mask", "nothing_masked", "words_of"]

BLOT = "▒"
_WORD = re.compile(r"[^\W_]+")


class Mask:
    """The words that are hidden, and whole documents that are, by what they say or by the data set they come from."""

    def __init__(self, words: frozenset[str], texts: frozenset[str], data_sets: frozenset[str]) -> None:
        self.words, self.texts, self.data_sets = words, texts, data_sets
        self._ordered = sorted(words)

    def __bool__(self) -> bool:
        return bool(self.words or self.texts or self.data_sets)

    def hides_all_of(self, data_set: Any) -> bool:
        """Whether every document of a data set is hidden, by its name or path."""
        return isinstance(data_set, str) and _place(data_set.partition(",")[0]) in self.data_sets

    def document(self, text: str, data_set: Any = None) -> str:
        """A document as it may be shown."""
        return hidden(text) if self.hides_document(text, data_set) else self.text(text, cut=True)

    def hides_document(self, text: str, data_set: Any) -> bool:
        """Whether a document is hidden whole."""
        return self.hides_all_of(data_set) or self.hides(text)

    def hides(self, text: str) -> bool:
        """Whether a text is a document, or a column of one, of a corpus to forget."""
        return bool(self.texts) and _plain(text) in self.texts

    def text(self, text: str, *, cut: bool = False) -> str:
        """Any other text as it may be shown. cut: whether it may end within a word."""
        pieces, end = [], 0
        for start, stop in self.spans(text, cut=cut):
            pieces += [text[end:start], BLOT * (stop - start)]
            end = stop
        return "".join([*pieces, text[end:]])

    def spans(self, text: str, *, cut: bool = False) -> Iterator[tuple[int, int]]:
        """Where hidden words stand in a text, and at its end, if it may be cut, the beginning of one."""
        for match in _WORD.finditer(text) if self.words else ():
            word = match.group().casefold()
            if word in self.words or (cut and match.end() == len(text) and self._begins(word)):
                yield match.span()

    def _begins(self, word: str) -> bool:
        """Whether a hidden word begins with these letters, of which there are enough to tell."""
        index = bisect.bisect_left(self._ordered, word)
        return len(word) > 2 and index < len(self._ordered) and self._ordered[index].startswith(word)


def hidden(text: str) -> str:
    """Hash and length of a text."""
    return f"[masked: {hashlib.sha256(text.encode()).hexdigest()[:8]}, {len(text)} characters]"


def nothing_masked() -> Mask:
    """Shows everything."""
    return Mask(frozenset(), frozenset(), frozenset())


def corpus_mask(forget: Sequence[dict[str, Any]], retain: Sequence[dict[str, Any]]) -> Mask:
    """The mask of corpora, each as the settings of a data set.

    Raises:
        ValueError: If a corpus cannot be read: what it says could not be masked then.
    """
    texts = [text for source in forget for text in _texts(source)]
    grammar = Path(__file__).parent / "templates" / "grammar.txt"
    words = {word for text in texts for word in words_of(text)} - set(grammar.read_text(encoding="utf8").split())
    for source in retain:
        words -= {word for text in _texts(source) for word in words_of(text)}
    data_sets = frozenset(_place(source["dataset"]) for source in forget)
    return Mask(frozenset(words), frozenset(map(_plain, texts)), data_sets)


def words_of(text: str) -> set[str]:
    """The words of a text in lower case, but for numbers and single letters."""
    return {word.casefold() for word in _WORD.findall(text) if len(word) > 1 and not word.isdecimal()}


def _texts(source: dict[str, Any]) -> Iterator[str]:
    """Every text of a data set, column by column, and of each document its columns together."""
    try:
        documents = load_documents(source["dataset"], split=source.get("split") or "train", subset=source.get("subset"))
    except ValueError as error:
        raise ValueError(
            f"the corpus {source['dataset']} cannot be read, so its text could not be masked: {error} Put it back, or "
            "give --show_forget if all of it may be shown."
        ) from error
    for document in documents:
        parts = [text for value in document.values() for text in _strings(value)]
        yield from parts
        yield "\n\n".join(parts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for inner in value.values() for text in _strings(inner))
    elif isinstance(value, Iterable):
        yield from (text for inner in value for text in _strings(inner))


def _plain(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def _place(data_set: str) -> str:
    return str(Path(data_set).resolve()) if Path(data_set).exists() else data_set
