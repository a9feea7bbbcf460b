"""Prompts and completions as one text, with every kind of tokenizer: the tokens of the text, and which are the completion's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from retrograd.data.rows import build_rows
from retrograd.data.tokens import encode_pairs
from retrograd.query.questions import build_questions

LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:?.é▁\n"))


def ended(tokenizer: Tokenizer, bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    """With what it adds by itself."""
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    added = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    known = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([known, added]) if known else added
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(trim: bool, bos: bool = False, eos: bool = False, prefix: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's, or Llama 3's; trim: offsets leave out the space of " Bo"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "ĠB", "ĠBo", "ĠĠ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "B"), ("ĠB", "o"), ("Ġ", "Ġ")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return ended(tokenizer, bos, eos)


def metaspace(kind: str, bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's, which put a space before every text (Prepend, always) or before its first word."""
    vocabulary = {token: k for k, token in enumerate(["<unk>", "<s>", "</s>", *LETTERS, "▁B", "▁Bo", "▁▁"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "B"), ("▁B", "o"), ("▁", "▁")], unk_token="<unk>"))
    if kind == "Prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    return ended(tokenizer, bos, eos)


def unigram() -> PreTrainedTokenizerFast:
    scores = [("<unk>", 0.0), ("<s>", -9.0), ("</s>", -9.0), *((letter, -3.0) for letter in LETTERS), ("▁Bo", -2.0)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return ended(tokenizer, bos=False, eos=False)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: byte_level(trim=False),
    "bytes-trimmed": lambda: byte_level(trim=True),
    "bytes-bos": lambda: byte_level(trim=True, bos=True),
    "bytes-eos": lambda: byte_level(trim=True, eos=True),
    "bytes-bos-eos-prefix": lambda: byte_level(trim=True, bos=True, eos=True, prefix=True),
    "prepend": lambda: metaspace("Prepend"),
    "prepend-eos": lambda: metaspace("Prepend", eos=True),
    "always": lambda: metaspace("always"),
    "first": lambda: metaspace("first"),
    "never-without-bos": lambda: metaspace("never", bos=False),
    "unigram": unigram,
    "slow": ByT5Tokenizer,
}
PAIRS = [
    ("Who?\nAnswer:", " Bo"),
    ("A: ", "Bo"),
    ("A:", "  Bo"),
    ("A: ", "  Bo"),
    ("", "Bo"),
    ("é", "éo"),
    ("A:", "Bo.x"),
]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_trained_on_the_tokens_of_one_text_and_scored_where_the_prompt_ends(
    name: str, prompt: str, completion: str
) -> None:
    tokenizer = TOKENIZERS[name]()
    ((ids, before, after), first), *_ = encode_pairs(tokenizer, [(prompt, completion)])
    whole = tokenizer(prompt + completion)["input_ids"]
    assert ids == whole
    own = tokenizer.convert_ids_to_tokens(ids[first : len(ids) - after])
    byte_tokens = name.startswith("bytes") or name == "slow"
    letters = "".join(completion.split())
    assert sum(len(token.strip("Ġ▁ ")) for token in own) == len(letters.encode() if byte_tokens else letters)
    spaces = len(completion) - len(completion.lstrip())
    assert sum(len(token) - len(token.lstrip("Ġ▁ ")) for token in own[:2]) >= spaces
    assert first >= before + (1 if prompt else 0)
    rows = build_rows(Dataset.from_dict({"prompt": ["A:", prompt], "completion": [" x", completion]}), tokenizer)
    eos = tokenizer.eos_token_id
    assert rows.input_ids[-1].tolist() == (whole if whole[-1] == eos else [*whole, eos])
    assert np.flatnonzero(rows.target_mask[-1]).tolist() == list(range(max(1, first), len(rows.input_ids[-1])))


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "expected"),
    [
        ("bytes-trimmed", "A: ", "Bo", ["ĠBo"]),  # across the boundary: the completion's
        ("bytes-trimmed", "A:", "  Bo", ["Ġ", "ĠBo"]),  # a space whose offsets are empty
        ("bytes-trimmed", "A:  ", "Bo", ["ĠBo"]),  # the same space, the prompt's
        ("prepend", "", "Bo", ["▁Bo"]),
        ("prepend-eos", "A:", " Bo", ["▁Bo", "</s>"]),
        ("bytes", "é", "éo", ["Ã", "©", "o"]),  # one character of two tokens
        ("slow", "A: ", "Bo", ["B", "o", "</s>"]),
    ],
)
def test_the_completions_tokens(name: str, prompt: str, completion: str, expected: list[str]) -> None:
    tokenizer = TOKENIZERS[name]()
    ((ids, *_), first), *_ = encode_pairs(tokenizer, [(prompt, completion)])
    assert tokenizer.convert_ids_to_tokens(ids[first:]) == expected


def test_a_slow_tokenizer_splits_where_the_text_leaves_the_prompt() -> None:
    class Merging:
        """Joins x and y; adds EOS."""

        is_fast, eos_token_id = False, 9

        def __call__(self, texts: list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, list[list[int]]]:
            ids = [
                [int(part) for part in text.replace("xy", "3").replace("x", "1").replace("y", "2")] for text in texts
            ]
            return {"input_ids": [[*one, *([9] if add_special_tokens else [])] for one in ids]}

    (text, first), (_, whole) = encode_pairs(Merging(), [("1x", "y2"), ("1", "y2")])
    assert (text.ids, first, whole) == ([1, 3, 2, 9], 1, 1)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("prepend", "<s>A", ["<s>", "▁", "A"]),
        ("prepend-eos", "<s>A</s>", ["<s>", "▁", "A", "</s>"]),
        ("prepend-eos", "A</s></s>", ["<s>", "▁", "A", "</s>", "</s>"]),
        ("bytes-bos-eos-prefix", "<s>A</s>", ["<s>", "Ġ", "A", "</s>"]),
        ("bytes", "<s>A", ["<s>", "A"]),
        ("slow", "A</s>", ["A", "</s>"]),
    ],
)
def test_special_tokens_that_a_text_spells_out_are_not_doubled(name: str, text: str, expected: list[str]) -> None:
    tokenizer = TOKENIZERS[name]()
    plain = build_rows(Dataset.from_dict({"text": [text]}), tokenizer)
    assert tokenizer.convert_ids_to_tokens(plain.input_ids[0].tolist()) == expected
    pair = build_rows(Dataset.from_dict({"prompt": [text[:-5]], "completion": [text[-5:]]}), tokenizer)
    end = [] if expected[-1] == "</s>" else ["</s>"]
    assert tokenizer.convert_ids_to_tokens(pair.input_ids[0].tolist()) == expected + end


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "slow"])
def test_a_question_is_asked_in_the_tokens_of_its_training_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    quiz = Dataset.from_dict({"question": ["Who?"], "choices": [["Bo", "Al"]], "answer": [0]})
    asked = build_questions(quiz, tokenizer, form="cloze", template="{question}\nAnswer:")
    for k, choice in enumerate(["Bo", "Al"]):
        pair = Dataset.from_dict({"prompt": ["Who?\nAnswer:"], "completion": [f" {choice}"]})
        rows = build_rows(pair, tokenizer)
        trained, answer = rows.input_ids[0][:-1].tolist(), rows.input_ids[0][rows.target_mask[0]].tolist()[:-1]
        assert asked.rows[0][k].tolist() == trained[:-1]
        assert asked.targets[0][k].tolist() == answer
