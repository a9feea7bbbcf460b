"""A tiny tokenizer, tiny models and tiny data sets, written to disk for tests that load them for real."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "hill",
    "sun",
    "sea",
    "red",
    "blue",
    "big",
    "small",
    "bird",
    "fish",
    "tree",
    "sings",
    "swims",
]
VOCABULARY = len(WORDS) + 2


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 9))) for _ in range(count)]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def configurations() -> dict:
    """One small configuration for each family, with what is special about it: ties, GQA, parallel residuals."""
    from transformers import (
        GemmaConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        Olmo2Config,
        Qwen2Config,
    )

    common = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    return {
        "gpt-neox": GPTNeoXConfig(**common, hidden_dropout=0.1, attention_dropout=0.1),
        "gpt2-tied": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        "llama-gqa": LlamaConfig(**common, num_key_value_heads=1),
        "qwen2-tied": Qwen2Config(**common, num_key_value_heads=1, tie_word_embeddings=True),
        "gemma": GemmaConfig(**common, num_key_value_heads=1, head_dim=8),
        "mistral": MistralConfig(**common, num_key_value_heads=1, head_dim=8, sliding_window=6),
        "olmo2": Olmo2Config(**common, num_key_value_heads=1, eos_token_id=0, pad_token_id=1),
    }


def save_model(folder: Path, family: str = "gpt-neox", seed: int = 0) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(configurations()[family]).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
