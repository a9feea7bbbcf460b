"""Virtual tokens: ids from the vocabulary's size on, which a model reads as vectors of one's own.

The vectors stand in place of the input embedding's output, so they may be differentiated while every parameter stays
as it is; tied embeddings keep their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from retrograd.lm.model import CausalLM

__all__ = ["embedded", "embedding_rows", "virtual_tokens"]


def embedding_rows(lm: CausalLM) -> int:
    """Tokens that the input embedding has; the first virtual one has this id."""
    return int(_embedding(lm).weight.shape[0])


@torch.no_grad()
def embedded(lm: CausalLM, ids: Tensor) -> Tensor:
    """What the input embedding gives for tokens, [..., width]: at the model's own parameters."""
    return _embedding(lm)(ids.to(_embedding(lm).weight.device)).detach()


@contextmanager
def virtual_tokens(lm: CausalLM, vectors: Tensor) -> Iterator[None]:
    """Inside, the model reads the token `embedding_rows` + k as vectors[k].

    Args:
        vectors: [m, width].
    """
    embedding, first = _embedding(lm), embedding_rows(lm)
    asked: list[Tensor] = []

    def before(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        asked.append(given[0])
        return (given[0].clamp(max=first - 1), *given[1:])

    def after(module: Any, given: tuple[Any, ...], embeddings: Tensor) -> Tensor:
        ids = asked.pop()
        own = vectors.to(embeddings.dtype)[(ids - first).clamp(min=0)]
        return torch.where((ids >= first)[..., None], own, embeddings)

    hooks = [embedding.register_forward_pre_hook(before), embedding.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _embedding(lm: CausalLM) -> Any:
    return lm.module.get_input_embeddings()  # type: ignore[operator]
