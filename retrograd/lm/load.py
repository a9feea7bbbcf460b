"""A causal language model by the settings of a run: its name, precision, device and adapters."""

from __future__ import annotations

from typing import Any, Literal

import torch

from retrograd.lm.model import CausalLM, load_causal_lm
from retrograd.settings.train import LoraConfig, TrainConfig

__all__ = ["adapters_of", "load_model"]


def load_model(
    model: str, dtype: Literal["float32", "float64", "bfloat16"], device: torch.device, lora: LoraConfig,
    train: TrainConfig,
) -> CausalLM:  # fmt: skip
    """A causal language model, with adapters if their rank is above 0.

    Raises:
        ValueError: If it cannot be loaded, or adapted.
    """
    given = {"lora": adapters_of(lora), "adapter": lora.adapter, "seed": train.seed, "dropout": train.dropout}
    return load_causal_lm(model, dtype=dtype, device=device, **given)


def adapters_of(lora: LoraConfig) -> Any:
    """The settings of adapters as peft has them; None where there are none."""
    if not lora.rank:
        return None
    from peft import LoraConfig as Adapters

    return Adapters(
        r=lora.rank, lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=list(lora.target_modules) or None, task_type="CAUSAL_LM",
    )  # fmt: skip
