"""Tiny multiple-choice questions, and a tiny tokenizer and models for which " A", " B", … are single tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tiny
import torch

LETTERS = "ABCDE"
SUBJECTS = ["river_lore", "old_towns"]


def questions(count: int, seed: int = 0, options: int = 4) -> list[dict[str, Any]]:
    """Fictional facts; texts of very different lengths, some not ASCII, so that no two normalisers agree."""
    draw = random.Random(seed)
    texts = [*tiny.WORDS, "Ölçüm", "naïve café", "日本", "a very long and winding answer", "r2-d2"]
    found = []
    for number in range(count):
        words = " ".join(draw.choice(tiny.WORDS) for _ in range(draw.randint(2, 14)))
        choices = [" ".join(draw.sample(texts, draw.randint(1, 3))) for _ in range(options)]
        found.append({"question": f" What {words}? ", "choices": choices, "answer": draw.randrange(options),
                      "subject": SUBJECTS[number % 2]})  # fmt: skip
    return found


def dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def tokenizer(letters: str = LETTERS, bos: bool = False) -> Any:
    """A byte-level BPE trained on text with the letters; a letter left out falls into two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<eos>", "<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    text = [" ".join(tiny.sentences(20)), *(f"Answer: {letter}" for letter in letters for _ in range(50))]
    found.train_from_iterator(text, trainer)
    if bos:
        found.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<eos>", bos_token="<bos>" if bos else None)


def module(family: str, vocabulary: int, positions: int = 512, scale: float = 0.3) -> Any:
    """A random model whose answers differ from question to question."""
    from transformers import AutoModelForCausalLM, CohereConfig, GPTNeoXConfig, LlamaConfig

    common = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": positions, "initializer_range": scale}  # fmt: skip
    configuration = {
        "gpt-neox": lambda: GPTNeoXConfig(**common, hidden_dropout=0.1, attention_dropout=0.1),
        "llama-tied": lambda: LlamaConfig(**common, num_key_value_heads=1, tie_word_embeddings=True),
        "cohere": lambda: CohereConfig(**common, num_key_value_heads=1, logit_scale=0.25),
    }[family]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configuration)


def save(folder: Path, family: str = "gpt-neox", positions: int = 512, bos: bool = False) -> Path:
    tokens = tokenizer(bos=bos)
    module(family, len(tokens), positions).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
