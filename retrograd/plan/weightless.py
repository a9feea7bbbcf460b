"""A model without its weights, from config.json alone: parameters on the meta device, which have shapes and no memory.

What autograd saves of it is measured on a small model of the same architecture, of one layer and of two, and scaled: by
width what grows with a row's length, by heads what grows with its square, by parameters what grows with neither.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrograd.core.optim import Params
from retrograd.data.rows import Rows
from retrograd.data.stream import token_rows
from retrograd.lm.adapters import adapter_settings, check_adapter
from retrograd.lm.checkpoint import DTYPES, read_config
from retrograd.lm.engines import Curve, graph_curve
from retrograd.lm.load import adapters_of
from retrograd.lm.model import CausalLM, adapted, causal_objective, trainable
from retrograd.lm.spans import text_config
from retrograd.settings.plan import PlanConfig
from retrograd.settings.train import LoraConfig, TrainConfig

__all__ = ["activations_of", "narrowed", "rows_of", "weightless"]

_HEADS, _VOCABULARY = 2, 256  # of the small model


def weightless(
    name: str, dtype: str, device: torch.device, lora: LoraConfig, train: TrainConfig
) -> CausalLM:  # fmt: skip
    """The model that `load_model` would load, without its weights; it computes nothing.

    Raises:
        ValueError: If it has no configuration, or no causal language model is of that type.
    """
    check_adapter(name, lora.adapter)
    with torch.device("meta"):
        module = _built(read_config(name), name, DTYPES[dtype])
        if lora.adapter == "continue":
            module = adapted(module, adapter_settings(name), train.seed)
        if lora.rank:
            module = adapted(module, adapters_of(lora), train.seed)
    return CausalLM(module, trainable(module)[0], _nothing, True)


def narrowed(model: CausalLM, names: Collection[str]) -> CausalLM:
    """As `only_trained`, of a model without weights."""
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name in names)
    return CausalLM(model.module, trainable(model.module)[0], _nothing, True)


def rows_of(config: PlanConfig) -> Callable[..., tuple[Rows, list[str]]]:
    """In place of `load_rows`: as many rows as the configuration says, of as many tokens."""
    assert config.rows is not None, "checked by the settings"
    assert config.row_tokens is not None, "checked by the settings"
    rows = token_rows([np.zeros(config.row_tokens, dtype=np.int64)] * config.rows)
    return lambda *_, **__: (rows, [""] * len(rows))


def activations_of(name: str, dtype: str) -> tuple[Curve, Curve] | None:
    """Bytes that autograd saves for a row: of a gradient with its graph, and of the loss alone.

    Returns:
        None, with a warning that says why, where no small model of the architecture can be made.
    """
    whole = read_config(name)
    try:
        near, far = (_small(whole, layers) for layers in (1, 2))
        curves = [(graph_curve(*near, twice=twice), graph_curve(*far, twice=twice)) for twice in (True, False)]
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"activations are left out, for no small model of {name!r} can be made: {reason}", stacklevel=2)
        return None
    scale = DTYPES[dtype].itemsize / 4
    twice, once = (_scaled(*pair, whole, near[0], far[0], scale) for pair in curves)
    return twice, once


def _scaled(near_curve: Curve, far_curve: Curve, whole: Any, near: nn.Module, far: nn.Module, scale: float) -> Curve:
    """Of a small model of one layer and of two, to the layers, width and heads of the whole one."""
    small, large = text_config(near), whole.get_text_config(decoder=True)
    layer = Curve(*(b - a for a, b in zip(near_curve, far_curve)))
    rest = Curve(*(a - b for a, b in zip(near_curve, layer)))
    width = large.hidden_size / small.hidden_size
    heads = large.num_attention_heads / small.num_attention_heads
    by = Curve(width**2, width, heads)
    return Curve(*(scale * k * (max(0.0, a) + large.num_hidden_layers * b) for k, a, b in zip(by, rest, layer)))


def _small(whole: Any, layers: int) -> tuple[nn.Module, Callable[[Params, Any, Tensor], Tensor]]:
    """A model of the architecture with two heads of the same size each, and its objective."""
    settings = copy.deepcopy(whole)
    text = settings.get_text_config(decoder=True)
    share = text.num_attention_heads / _HEADS
    text.hidden_size = int(text.hidden_size / share)
    if getattr(text, "intermediate_size", None):
        text.intermediate_size = int(text.intermediate_size / share)
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = max(1, int(text.num_key_value_heads / share))
    text.num_attention_heads, text.num_hidden_layers, text.vocab_size = _HEADS, layers, _VOCABULARY
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, token, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _built(settings, settings.model_type, torch.float32)
    module.eval()
    return module, causal_objective(module)[0]


def _built(settings: Any, name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(settings, dtype=dtype)
    except (ValueError, KeyError, ImportError) as error:
        raise ValueError(f"no causal language model can be made of the configuration of {name!r}: {error}") from error


def _nothing(params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
    raise AssertionError("a model without weights computes nothing")
