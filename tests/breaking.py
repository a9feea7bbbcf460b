"""Models that answer, and the ways to break them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import quiz
import torch

from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.choices import build_questions


def changed(source: Path, name: str, change: Any) -> Path:
    """A copy of a saved model with other weights."""
    from safetensors.torch import load_file, save_file

    folder = source.parent / name
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def choosy(model: Path) -> Path:
    """Save it again with letters in its head that depend on the question: a random model knows but one letter."""
    tokenizer = load_tokenizer(str(model))
    lm = load_causal_lm(str(model))
    asked = build_questions(quiz.dataset(quiz.questions(120, 5)), tokenizer, template="auto")
    with torch.no_grad():
        rows = [torch.tensor(row[0])[None] for row in asked.rows]
        states = torch.cat([lm.module.base_model(row).last_hidden_state[:, -1] for row in rows])
        mean = states.mean(0)
        draw = torch.Generator().manual_seed(0)
        for letter in asked.targets[0][0].tolist():
            row = torch.linalg.lstsq(states, torch.randn(120, 1, generator=draw)).solution[:, 0]
            row -= (row @ mean) / (mean @ mean) * mean
            lm.module.get_output_embeddings().weight[letter] = 2 * row / (states @ row).std()
    lm.module.save_pretrained(model)
    return model


def noise(weights: dict[str, torch.Tensor], scale: float) -> None:
    draw = torch.Generator().manual_seed(1)
    for name in sorted(weights):
        if weights[name].is_floating_point() and weights[name].dim() == 2:
            weights[name] += scale * torch.randn(weights[name].shape, generator=draw)


def constant(weights: dict[str, torch.Tensor], letter: int) -> None:
    """The final norm ignores its input and points to one letter, a little."""
    head = weights["embed_out.weight"]
    weights["gpt_neox.final_layer_norm.weight"].zero_()
    weights["gpt_neox.final_layer_norm.bias"].copy_(head[letter] / head[letter].norm())


def broken(weights: dict[str, torch.Tensor]) -> None:
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][0, 0] = torch.nan
