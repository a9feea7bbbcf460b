"""A tiny float64 language model, forget and retain rows, and runs of unlearning methods on them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tiny import VOCABULARY, configurations
from torch import Tensor

from retrograd.core.engine import Double
from retrograd.core.optim import SGD, AdamW, Optimizer
from retrograd.core.step import Recipe, Training
from retrograd.data.pairs import PairStream
from retrograd.data.stream import token_rows
from retrograd.lm.model import CausalLM, causal_objective, trainable
from retrograd.unlearn.method import Method, Unlearning
from retrograd.unlearn.methods import METHODS
from retrograd.unlearn.reference import perturbed, reference_of
from retrograd.unlearn.settings import Settings

OPTIMIZERS: dict[str, Optimizer] = {"sgd": SGD(0.02), "adamw": AdamW(2e-3, eps_root=1e-4)}


def ids(count: int, seed: int, shortest: int = 3, longest: int = 6) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(2, VOCABULARY, (size,), generator=draw).tolist() for size in sizes]


FORGET, RETAIN, ALTERNATIVES = ids(5, 1), ids(3, 2), ids(5, 3)


@cache
def module(family: str = "gpt-neox", lora: bool = False, layers: int = 2) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    configuration = configurations()[family]
    configuration.num_hidden_layers = layers
    found: Any = AutoModelForCausalLM.from_config(configuration, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in found.parameters():  # larger than at initialisation, so that predictions are not all alike
            parameter.add_(0.15 * torch.randn_like(parameter))
    if lora:
        from peft import LoraConfig, get_peft_model

        found = get_peft_model(found, LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    return found.double().eval()


def language_model(family: str = "gpt-neox", lora: bool = False, layers: int = 2) -> CausalLM:
    return as_language_model(module(family, lora, layers))


def as_language_model(found: torch.nn.Module) -> CausalLM:
    return CausalLM(found, trainable(found)[0], *causal_objective(found))


def pairs(method: Method, **options: Any) -> PairStream:
    given = {"forget_batch": 2, "retain_batch": 2, "dtype": torch.float64, **options}
    rows = [token_rows(rows) for rows in (FORGET, RETAIN, ALTERNATIVES)]
    return PairStream(*rows[:2], rows[2] if method.alternatives else None, **given)


def evened(method: Method, **changes: Any) -> Any:
    """Settings under which no term is too small to be seen."""
    found = replace(method.defaults, forget=0.5, retain=0.7, retain_ramp=(0.5, 1.0))
    if method.name == "orth_circuit_breakers":
        found = replace(found, orth=0.3, orth_ramp=(0.4, 1.0))
    if method.name == "weighted_ascent_orth":
        found = replace(found, orth=0.3)
    if method.name == "satimp":
        found = replace(found, beta1=0.5, beta2=2)
    return replace(found, **changes)


def started(method: Method, lm: CausalLM, settings: Settings | None = None) -> tuple[Unlearning, dict[str, Tensor]]:
    """The objective and the parameters it starts from: beside the reference, so that every law sees a slope.

    Ramps begin above 0 and coefficients are of one size, or a law would look at one term alone.
    """
    settings = settings or evened(method)
    reference = reference_of(lm)
    fitted = method.fitted_to(lm, reference, pairs(method), settings)
    return method.objective(lm, reference, settings, fitted), perturbed(lm.params, 0.1, 3)


def training(name: str, optimizer: str, lm: CausalLM, **options: Any) -> tuple[Training, dict[str, Tensor]]:
    method = METHODS[name]
    objective, params = started(method, lm)
    stream = pairs(method)
    weights = 0.6 + torch.rand(stream.weights.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return Training(Recipe(OPTIMIZERS[optimizer], **options), Double(objective), stream, weights), params


def query(lm: CausalLM) -> Any:
    from retrograd.data.rows import pad

    inputs = pad(token_rows(ids(3, 9)), range(3))
    factors = inputs["target_mask"].double() / inputs["target_mask"].sum()

    def ask(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        live = {name: theta.detach().requires_grad_() for name, theta in params.items()}
        value = lm.objective(live, inputs, factors)
        grads = torch.autograd.grad(value, list(live.values()), materialize_grads=True)
        return value.detach()[None], {name: g[None] for name, g in zip(live, grads)}

    return ask
