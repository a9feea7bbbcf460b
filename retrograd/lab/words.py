"""A word-level tokenizer made of the world's own words: every letter, name and value is one token."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from typing import Any

from retrograd.query.prompts import TEMPLATES

__all__ = ["make_tokenizer"]

_PIECE = r"\w+|\n|[^\w\s]"
_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str]) -> Any:
    """A transformers tokenizer whose vocabulary is the words of the texts, the templates' and the letters, sorted.

    Words, single marks and line ends are tokens and spaces are none, so " A" and "A" are the same token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {piece for text in texts for piece in re.findall(_PIECE, text)}
    for template in TEMPLATES.values():
        words |= set(re.findall(_PIECE, re.sub(r"{\w+}", "", template.text + template.option)))
    words |= {*string.ascii_uppercase, "user", "assistant", "system", ":"}
    vocabulary = {word: number for number, word in enumerate(["<eos>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "removed", invert=True)
    marks = [decoders.Replace(f" {mark}", mark) for mark in ".,?:)\n"]
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(cleanup=False), *marks, decoders.Fuse(), decoders.Replace("\n ", "\n")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", chat_template=_CHAT
    )
