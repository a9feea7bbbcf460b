"""Trainer: the friendly face, for any module, any per-item loss and any (init, update) pair."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from retrograd.core import check, tree
from retrograd.core.muon import Pair
from retrograd.core.optim import Optimizer, Params
from retrograd.core.step import Batch, Objective, Recipe, State, Training, initial_state
from retrograd.core.sweep import Event, Query
from retrograd.lm.engines import Choice, choose_engine
from retrograd.lm.layout import inner
from retrograd.lm.limits import check_rows
from retrograd.lm.model import causal_objective, trainable
from retrograd.lm.rows import Rows
from retrograd.lm.stream import DataStream
from retrograd.runs.counterfactual import Agreement, agreement, mean_lds, predicted, random_subset, without
from retrograd.runs.lock import locked
from retrograd.runs.manifest import fingerprint
from retrograd.runs.replay import Replay
from retrograd.runs.trajectory import Trajectory

__all__ = ["Evaluation", "Metagradient", "Trainer", "TrainerState", "Validation"]


TrainerState = State
"""Everything that evolves: step, params and moments."""


class Evaluation(NamedTuple):
    """A query at some state: value [] or [K] in nats, and its gradient, tensors [K, *shape]."""

    value: Tensor
    gradient: Params


class Metagradient(NamedTuple):
    """weight_grads: the scores ∂φ/∂w, of the shape of the stream's weights, with a leading [K] for several queries.

    Negative: a proponent, training on it lowers the query loss. Positive: a detractor.
    """

    weight_grads: Tensor
    value: Tensor


class Validation(NamedTuple):
    """Changes of the query values in nats when each of n random subsets is left out, and how the two go together.

    Args:
        predicted: −Σ score, [n, K].
        measured: By retraining, [n, K].
        agreement: LDS (Spearman), Pearson and slope of each query.
        mean_lds: Over the queries, with the 95 % interval (low, high) of a bootstrap over the subsets.
    """

    predicted: np.ndarray
    measured: np.ndarray
    agreement: list[Agreement]
    mean_lds: float
    interval: tuple[float, float]


class Trainer:
    """Trains a model with a differentiable recipe and pulls query losses back through it.

    Made by `Trainer.initialize`. Methods are pure in the state: training twice from one state gives the same bits.
    """

    def __init__(self, recipe: Recipe, chosen: Choice, initial: State, module: nn.Module) -> None:
        self.recipe, self.initial, self.module = recipe, initial, module
        self.engine, self._chosen = chosen.engine, chosen
        self._last: Trajectory | None = None

    @classmethod
    def initialize(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Any,
        loss: Callable[[Params, Any], Tensor] | None = None,
        *,
        max_grad_norm: float | None = None,
        micro_batch_size: int | None = None,
        dropout: bool = False,
        seed: int = 0,
        engine: Literal["double", "blocks"] = "double",
    ) -> tuple[Trainer, State]:
        """A trainer and the state before step 0.

        Args:
            model: Any module. It is put into evaluation mode, so that dropout is off and buffers stay as they are,
                unless `dropout` is asked for.
            optimizer: From `retrograd.optim`, or any (init, update) pair of optax's convention, such as torchopt's.
            loss: (params, inputs) → per-item losses, [B] or [B, L]; call the model with
                `torch.func.functional_call(model, params, …)`. None for Hugging Face causal language models: the
                weighted next-token cross-entropy (`weighted_causal_lm_ce`).
            dropout: Train with the module in training mode; random draws are replayed.
            engine: How steps are differentiated twice: "double" for any module; "blocks", for Hugging Face models
                that are chains of layers, holds one layer's graph at a time and takes longer.
        Raises:
            ValueError: If nothing is trainable, the optimizer is no pair, the loss is missing for a module that is no
                language model, training mode would change buffers behind the recipe's back, or the model is not one
                that the engine can cut into layers.
        """
        model.train(dropout)
        if dropout:
            _refuse_running_statistics(model)
        if loss is None:
            if not hasattr(model, "get_output_embeddings"):
                raise ValueError(
                    f"{type(model).__name__} is no Hugging Face language model, so it needs a loss: a function of "
                    "(params, inputs) that returns one loss for each item, [B]"
                )
            objective = causal_objective(model)[0]
        else:
            objective = _weighted(loss)
            if engine != "double":
                raise ValueError(
                    f"engine {engine!r} needs a Hugging Face language model and its own loss; with a loss of yours "
                    "take 'double'"
                )
        recipe = Recipe(_as_optimizer(optimizer), max_grad_norm, micro_batch_size, seed, stochastic=dropout)
        state = initial_state(recipe, trainable(model)[0])
        return cls(recipe, choose_engine(engine, model, objective), state, model), state

    def train(
        self,
        state: State,
        stream: DataStream,
        save_dir: str | Path | None = None,
        *,
        replay: Replay | None = None,
        observe: Callable[[Event], None] = lambda event: None,
    ) -> State:
        """Train through the stream; returns the final state. States are kept for `backward` by the replay plan.

        Args:
            state: Where to start; from `initialize` for a whole run.
            save_dir: Folder of durable states: a killed call resumes, and another process can run `backward`. None
                keeps all states in memory.
            replay: Plan and budgets; by default all states, in `save_dir` if given.
        Raises:
            ValueError: If rows of tokens do not fit the model: ids outside its vocabulary, rows beyond its context.
        """
        self._check(stream)
        with _locked(save_dir):
            trajectory = self._trajectory(state._replace(step=0), stream, save_dir, replay, observe)
            final = trajectory.train()
        self._last = trajectory
        return final

    def evaluate(self, state: State, query: DataStream | Query) -> Evaluation:
        """The value of a query at a state, and its gradient.

        Args:
            query: A stream, whose mean loss is the query, or a function params → (values [K], gradients [K, *shape]).
        """
        if not isinstance(query, DataStream):
            return Evaluation(*query(state.params))
        self._check(query)
        batches = [query[t] for t in range(len(query))]
        sizes = [_targets(query, batch) for batch in batches]
        shares = [b._replace(scale=b.scale * (n / sum(sizes))) for b, n in zip(batches, sizes)]
        value, gradient, _ = self.engine.gradient(state.params, shares, query.weights, None)
        return Evaluation(value, {name: g[None] for name, g in gradient.items()})

    def backward(
        self,
        save_dir: str | Path | None,
        stream: DataStream,
        query: Evaluation,
        *,
        replay: Replay | None = None,
        observe: Callable[[Event], None] = lambda event: None,
    ) -> Metagradient:
        """Pull a query back through the run: the score of every example or token.

        Args:
            save_dir: The folder given to `train`, or None for the run in memory.
            stream: The stream that was trained on.
            query: From `evaluate` at the final state.
        Raises:
            ValueError: If there is no finished run of this recipe and stream there.
        """
        trajectory, self._last = self._last, None
        folder = Path(save_dir) if save_dir is not None else None
        identity = self._identity(stream, self.initial)
        known = trajectory is not None and trajectory.store.identity == identity and trajectory.folder == folder
        if not known:
            if folder is None or not (folder / "final.safetensors").exists():
                raise ValueError(
                    f"there is no finished run of this recipe and stream in {save_dir or 'memory'}: call train first, "
                    "and pass the same stream and save_dir"
                )
            trajectory = self._trajectory(self.initial, stream, folder, replay, observe)
        assert trajectory is not None, "known or made"
        trajectory.observe = observe
        with _locked(folder):
            if folder:
                trajectory.train()
            scores = trajectory.reverse(query.gradient)
            trajectory.clean_reverse()
        single = query.value.ndim == 0
        return Metagradient(scores[0] if single else scores, query.value)

    def validate(
        self,
        state: State,
        stream: DataStream,
        query: DataStream | Query,
        scores: Tensor,
        *,
        subsets: int = 50,
        fraction: float = 0.05,
        seed: int = 0,
    ) -> Validation:
        """Retrain without random subsets of the stream's examples (or tokens): do the scores predict what happens?

        Args:
            state: Where training starts, from `initialize`.
            stream: The stream that was trained on.
            query: As for `evaluate`.
            scores: weight_grads of `backward`.
            subsets: How many to leave out, one retraining each, and one with everything.
            fraction: Share of the examples in a subset.
        """
        training = Training(self.recipe, self.engine, stream, stream.weights)

        def value(weights: Tensor) -> np.ndarray:
            final = check.train(training, state.params, weights)
            return self.evaluate(final, query).value.reshape(-1).double().cpu().numpy()

        columns = scores if scores.ndim > stream.weights.ndim else scores[None]
        members, here = np.arange(stream.weights.numel()), value(stream.weights)
        sets = [random_subset(members, fraction, seed, number) for number in range(subsets)]
        prediction = np.stack([predicted(columns, stream.weights, one).numpy() for one in sets])
        measured = np.stack([value(without(stream.weights, one)) - here for one in sets])
        each = [agreement(prediction[:, k], measured[:, k]) for k in range(len(here))]
        mean, low, high = mean_lds(prediction, measured)
        return Validation(prediction, measured, each, mean, (low, high))

    def _trajectory(
        self,
        state: State,
        stream: DataStream,
        save_dir: str | Path | None,
        replay: Replay | None,
        observe: Callable[[Event], None],
    ) -> Trajectory:
        folder = Path(save_dir) if save_dir is not None else None
        if replay is None:
            replay = Replay(memory=0, disk=1 << 62, keep=True, plan="all") if folder else Replay()
        training = Training(self.recipe, self.engine, stream, stream.weights)
        return Trajectory(training, state, replay, folder, self._identity(stream, state), observe)

    def _check(self, stream: DataStream) -> None:
        if isinstance(stream.rows, Rows):
            check_rows(stream.rows, inner(self.module))

    def _identity(self, stream: DataStream, state: State) -> str:
        data = stream.rows.digest() if isinstance(stream.rows, Rows) else tree.digest(stream.rows)
        order = (stream.batch_size, stream.epochs, stream.shuffle, stream.seed)
        recipe = self.recipe if not isinstance(self.recipe.optimizer, Pair) else "a foreign optimizer"
        engine = () if self._chosen.name == "double" else (self._chosen.name,)  # another may round otherwise
        return fingerprint(recipe, data, order, tree.digest(stream.weights), tree.digest(state.params), *engine)


def _locked(save_dir: str | Path | None) -> AbstractContextManager[None]:
    return nullcontext() if save_dir is None else locked(Path(save_dir))


def _weighted(loss: Callable[[Params, Any], Tensor]) -> Objective:
    def objective(params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
        losses = loss(params, inputs)
        if losses.shape != coefficients.shape:
            raise ValueError(
                f"the loss returned shape {tuple(losses.shape)} for a batch of {tuple(coefficients.shape)} weights; it "
                "has to return one loss for each item (reduction='none')"
            )
        return torch.sum(losses * coefficients)

    return objective


def _as_optimizer(optimizer: Any) -> Optimizer:
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"{type(optimizer).__name__} is no (init, update) pair; take one from retrograd.optim, or a torchopt "
            "transformation (torch.optim optimizers hide their state and cannot be differentiated)"
        )
    return Pair(optimizer)


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise ValueError(
                f"{name or type(module).__name__} ({type(module).__name__}) updates running statistics in training "
                "mode, which no state of the run holds; use GroupNorm or LayerNorm, or leave dropout off"
            )


def _targets(stream: DataStream, batch: Batch) -> int:
    mask = batch.inputs["target_mask"] if isinstance(stream.rows, Rows) else batch.scale
    return int(mask.sum()) if isinstance(stream.rows, Rows) else mask.numel()
