"""From the settings of a recipe to the recipe: optimizer, schedule, and what a model leaves out of them."""

from __future__ import annotations

import math

from retrograd.core.optim import SGD, Adam, AdamW, Muon, Optimizer, Schedule
from retrograd.core.step import Recipe
from retrograd.lm.model import CausalLM, norms_and_biases, trainable
from retrograd.settings.train import TrainConfig

__all__ = ["optimizer", "recipe_of"]


def recipe_of(train: TrainConfig, model: CausalLM, steps: int, shards: int = 1) -> Recipe:
    """The recipe of a configuration, for a model, so many steps and so many logical shards."""
    spared = norms_and_biases(model.module) if train.spare_norms else ()
    chosen = optimizer(train, steps, _embeddings(model), spared)
    return Recipe(chosen, train.max_grad_norm, train.micro_batch_size, train.seed, train.dropout, shards)


def optimizer(train: TrainConfig, steps: int, exclude: tuple[str, ...] = (), spared: tuple[str, ...] = ()) -> Optimizer:
    """The optimizer of a configuration.

    Args:
        exclude: The matrices that Muon leaves to AdamW.
        spared: The parameters that do not decay.
    """
    lr = _schedule(train, steps)
    adam = (train.beta1, train.beta2, train.eps, train.eps_root)
    match train.optimizer:
        case "sgd":
            return SGD(lr, train.momentum, train.nesterov, train.weight_decay, spared)
        case "adam":
            return Adam(lr, *adam, train.weight_decay, spared)
        case "adamw":
            return AdamW(lr, *adam, train.weight_decay, spared)
        case "muon":
            return Muon(lr, train.momentum or 0.95, True, train.weight_decay, 5, *adam, exclude, spared)
    raise ValueError(f"unknown optimizer {train.optimizer!r}; the optimizers are sgd, adam, adamw, muon")


def _schedule(train: TrainConfig, steps: int) -> Schedule:
    ratio = train.warmup_ratio
    if ratio is None:
        ratio = 0.3 if train.lr_schedule.startswith("one-cycle") else 0.0
    warmup = min(steps - 1, math.ceil(ratio * steps)) if train.warmup_steps is None else train.warmup_steps
    power = 2.0 if train.lr_power is None else train.lr_power
    return Schedule(train.lr_schedule, train.lr, steps, warmup, power, train.lr_start, train.lr_end)


def _embeddings(model: CausalLM) -> tuple[str, ...]:
    """Names of the input and output embeddings, which Muon leaves to AdamW."""
    ends = (model.module.get_input_embeddings(), model.module.get_output_embeddings())  # type: ignore[operator]
    weights = {id(end.weight) for end in ends if hasattr(end, "weight")}
    named, readers = model.module.named_parameters(remove_duplicate=False), trainable(model.module)[1]
    leaves = {readers[name] for name, parameter in named if id(parameter) in weights and name in readers}
    return tuple(name for name in model.params if name in leaves)
