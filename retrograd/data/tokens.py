"""Texts as tokens, each with what the tokenizer puts before and after it, and where a prompt ends inside one.

Prompt and completion are one text. With s = prompt + completion, the tokens of s are what a model reads when it is
asked, and the completion is

    from the first token that holds a character behind the prompt.

A token across the boundary, such as " Bo" where the prompt ends in the space, is therefore the completion's: predicting
it predicts the completion's first letters. A tokenizer that tells no characters (a slow one) splits where the tokens of
s leave those of the prompt alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["Text", "common_start", "encode", "encode_pairs", "located", "without_doubles"]


class Text(NamedTuple):
    """Tokens of a text; the first `before` and the last `after` were added to it by the tokenizer."""

    ids: list[int]
    before: int
    after: int


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Text]:
    """Tokens of each text, with the special tokens that the tokenizer adds by itself."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [_located(whole, bare) for whole, bare in zip(_ids(tokenizer, texts), _ids(tokenizer, texts, False))]
    encoded = tokenizer(list(texts), return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    return [_marked(ids, added) for ids, added in zip(encoded["input_ids"], encoded["special_tokens_mask"])]


def without_doubles(text: Text) -> Text:
    """Without the tokens added to a text that spells them out itself, such as <s> before "<s>[INST] …"."""
    ids, before, after = text
    if before and ids[:before] == ids[before : 2 * before]:
        ids, before = ids[before:], 0
    if after and ids[len(ids) - after :] == ids[len(ids) - 2 * after : len(ids) - after]:
        ids, after = ids[: len(ids) - after], 0
    return Text(ids, before, after)


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[Text, int]]:
    """Tokens of prompt + completion, none doubled, and how many of them are the prompt's."""
    texts = encode(tokenizer, [prompt + completion for prompt, completion in pairs])
    firsts = (_firsts_by_character if tokenizer.is_fast else _firsts_by_prompt)(tokenizer, pairs, texts)
    singles = []
    for text, first in zip(texts, firsts, strict=True):
        single = without_doubles(text)
        singles.append((single, first - (text.before - single.before)))
    return singles


def located(
    tokenizer: Any, texts: Sequence[str], passages: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens of texts, none added, and which of them hold a character of the text's passages (from, to).

    Raises:
        ValueError: If a tokenizer that tells no characters (a slow one) has a token across the end of a passage.
    """
    if not texts:
        return
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(list(texts), return_offsets_mapping=tokenizer.is_fast, **options)
    for number, (text, spans, ids) in enumerate(zip(texts, passages, encoded["input_ids"], strict=True)):
        held = [False] * len(ids)
        for start, end in spans:
            if tokenizer.is_fast:
                places = encoded["offset_mapping"][number]
                first = next((k for k, (_, to) in enumerate(places) if to > start), len(ids)) if start else 0
                last = next((k for k, (at, _) in enumerate(places) if at >= end and k >= first), len(ids))
                last = len(ids) if end == len(text) else last
            else:
                first, last = (_tokens_of_prefix(tokenizer, text[:place], ids) for place in (start, end))
            held[first:last] = [True] * max(0, last - first)
        yield ids, held


def _tokens_of_prefix(tokenizer: Any, prefix: str, ids: list[int]) -> int:
    begun = _ids(tokenizer, [prefix], False)[0]
    if ids[: len(begun)] != begun:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} does not tell which characters a token holds, and one stands "
            f"across a boundary, behind {prefix[-20:]!r}: take a fast tokenizer"
        )
    return len(begun)


def _firsts_by_character(tokenizer: Any, pairs: Sequence[tuple[str, str]], texts: Sequence[Text]) -> list[int]:
    """Place of the first token that ends behind the prompt; the tokens added at the end if there is none."""
    if not texts:
        return []
    wholes = [prompt + completion for prompt, completion in pairs]
    spans = tokenizer(wholes, return_offsets_mapping=True, return_attention_mask=False, verbose=False)["offset_mapping"]
    firsts = []
    for (prompt, _), text, places in zip(pairs, texts, spans, strict=True):
        own = range(text.before, len(text.ids) - text.after)
        firsts.append(next((k for k in own if places[k][1] > len(prompt)), own.stop))
    return firsts


def _firsts_by_prompt(tokenizer: Any, pairs: Sequence[tuple[str, str]], texts: Sequence[Text]) -> list[int]:
    """Place of the first token in which the whole text differs from the prompt alone."""
    firsts = []
    for text, prompt in zip(texts, _ids(tokenizer, [prompt for prompt, _ in pairs], False), strict=True):
        own = text.ids[text.before : len(text.ids) - text.after]
        firsts.append(text.before + common_start(own, prompt))
    return firsts


def common_start(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences begin with in common.

    >>> common_start("abcd", "abx")
    2
    """
    apart = (k for k, (own, other) in enumerate(zip(first, second)) if own != other)
    return next(apart, min(len(first), len(second)))


def _ids(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    if not texts:
        return []
    # verbose would warn of texts longer than the model, before they are cut
    options = {"return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, **options)["input_ids"]


def _marked(ids: list[int], added: list[int]) -> Text:
    """By a mask of what was added."""
    before = next((k for k, flag in enumerate(added) if not flag), len(ids))
    after = next((k for k, flag in enumerate(reversed(added)) if not flag), 0)
    return Text(ids, before, after)


def _located(whole: list[int], bare: list[int]) -> Text:
    """By where the text's own tokens are."""
    starts = range(len(whole) - len(bare) + 1)
    before = next((k for k in starts if whole[k : k + len(bare)] == bare), 0)
    return Text(whole, before, max(0, len(whole) - len(bare) - before))
