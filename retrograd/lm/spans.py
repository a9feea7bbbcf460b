"""Lengths at which a model begins to compute otherwise, as its settings tell: windows, chunks, rotary scaling."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

__all__ = ["beside", "inner", "spans", "text_config", "windows"]

_WINDOW = re.compile(r"window|local_attention|attention_chunk_size|attn_chunk_length|index_topk$|block_size")
_SPAN = re.compile(f"{_WINDOW.pattern}|chunk_size$|original_max_position")
_NO_LENGTH = re.compile("layers|pattern|blocks")  # settings that are named after windows and are none


def inner(module: nn.Module) -> Any:
    """The Hugging Face model inside a peft wrapper; its adapters are in place there."""
    base = getattr(module, "get_base_model", None)
    return module if base is None else base()


def text_config(module: nn.Module) -> Any:
    """The settings of the language model; of a model for several kinds of input they are a part of all settings."""
    config = inner(module).config
    nested = getattr(config, "get_text_config", None)
    return config if nested is None else nested(decoder=True)


def windows(module: nn.Module) -> list[int]:
    """How many tokens layers look back at, in rising order."""
    return _lengths(module, _WINDOW)


def spans(module: nn.Module) -> list[int]:
    """All lengths at which something changes, in rising order."""
    return _lengths(module, _SPAN)


def beside(module: nn.Module) -> dict[str, int]:
    """Why the loss of a row depends on the rows beside it, and from which length on.

    "longrope": rotary frequencies go by the longest row of the call. "dynamic": by the longest one ever read.
    "top-k": which keys attention picks among equals goes by the number of columns.
    """
    config = text_config(module)
    context = getattr(config, "max_position_embeddings", None)
    bounds: dict[str, int] = {}
    for rope in _rotary(config):
        kind = str(rope.get("rope_type"))
        name = "dynamic" if "dynamic" in kind else kind
        bound = context if name == "dynamic" else rope.get("original_max_position_embeddings") or context
        if name in ("dynamic", "longrope") and bound:
            bounds[name] = min(bound, bounds.get(name, bound))
    blocks = (getattr(config, "index_topk_blocks", None) or 0) * (getattr(config, "index_block_size", None) or 0)
    picked = [getattr(config, name, None) for name in ("index_topk", "keep_window_size")]
    if keys := [count for count in (blocks, *picked) if count]:
        bounds["top-k"] = min(keys)
    return bounds


def _rotary(config: Any) -> list[dict[str, Any]]:
    """Settings of the rotary embedding, one for all layers or one for each type of them."""
    every = getattr(config, "rope_parameters", None) or {}
    return [every, *(part for part in every.values() if isinstance(part, dict))]


def _lengths(module: nn.Module, names: re.Pattern[str]) -> list[int]:
    config = text_config(module)
    lengths = {
        value
        for settings in (vars(config), *_rotary(config))
        for name, value in settings.items()
        if names.search(name) and not _NO_LENGTH.search(name) and type(value) is int and value > 1
    }
    return sorted(lengths)
