"""Trainer: the friendly face, for any module, any per-item loss and any (init, update) pair."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd.core import lookups
from retrograd.core.optim import Cotangent, Optimizer, Pair, Params
from retrograd.core.step import Batch, NonFiniteError, Objective, Recipe, State, Training, initial_state
from retrograd.core.sweep import Event, Query
from retrograd.data.limits import check_rows
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream
from retrograd.lm.engines import Choice, choose_engine
from retrograd.lm.loss import refuse_other_loss
from retrograd.lm.model import causal_objective, evaluating, trainable
from retrograd.lm.spans import inner
from retrograd.proofs import first_step
from retrograd.runs.cotangent import BackwardState, Evaluation, cotangent_of
from retrograd.runs.identity import architecture, fingerprint, held_tensors, identify
from retrograd.runs.lock import locked
from retrograd.runs.states.budget import Replay
from retrograd.runs.trajectory import Ready, Trajectory
from retrograd.trust.left_out import Agreement, agreement, mean_lds, predicted, random_subset, without

__all__ = ["BackwardState", "Evaluation", "Trainer", "TrainerState", "Validation"]


TrainerState = State
"""Everything that evolves: step, params and moments."""


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
    A folder belongs to one run: to the data and their order, the weights, the state it begins from, the recipe, and the
    model with its frozen weights, buffers, configuration and code, and the loss's code with what it closes over, as
    they were at `initialize`; of another run it is refused.

    Args:
        function: Hash of model, recipe and loss as functions.
    """

    def __init__(self, recipe: Recipe, chosen: Choice, initial: State, module: nn.Module, function: str = "") -> None:
        self.recipe, self.initial, self.module = recipe, initial, module
        self.engine, self._function = chosen.engine, function
        self._begun = initial  # where the last training began
        self._last: Trajectory | None = None
        self._objective: Objective | None = None  # of a loss of one's own
        self._proved = False

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
                weighted next-token cross-entropy (`weighted_causal_lm_ce`), which a `loss_function` that was set on the
                model has to be.
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
            if (own := vars(inner(model)).get("_loss_function")) is not None:
                refuse_other_loss(own)
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
        chosen = choose_engine(engine, model, objective)
        used = () if chosen.name == "double" else (chosen.name,)  # another may round otherwise
        function = fingerprint(architecture(model), recipe, "causal language model" if loss is None else loss, *used)
        trainer = cls(recipe, chosen, state, model, function)
        trainer._objective = objective if loss is not None else None
        return trainer, state

    def prove(self, state: State, stream: DataStream) -> None:
        """Try the first step: it is a function, and its pullback that function's derivative. Once for a trainer.

        `train` does it before it trains; by itself it is for measuring apart. It takes some fifteen gradients of one
        micro-batch, of two rows where the loss is the language model's own.

        Raises:
            ValueError: By the name of the parameter, module or optimizer that is wrong.
        """
        if self._proved:
            return
        training = Training(self.recipe, self.engine, self._fitting(stream), stream.weights)
        first_step.prove(training, state, self.module, self._objective, rows=2 if self._objective is None else None)
        self._proved = True

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

        From state t the run goes on: it takes the stream's steps t, t + 1, …, with the learning rates, random draws and
        optimizer corrections of those steps, so that training on through two epochs what one epoch left gives the
        bits of two epochs. Snapshots and scores are of these steps alone.
        The first call tries its first step before it trains, as `prove` does.

        Args:
            state: Where to start; from `initialize` for a whole run.
            save_dir: Folder of durable states: a killed call resumes, and another process can run `backward`. None
                keeps all states in memory.
            replay: Plan and budgets; by default all states, in `save_dir` if given.
        Raises:
            ValueError: If the stream ends at or before the state, or rows of tokens do not fit the model: ids outside
                its vocabulary, rows beyond its context. If no parameter reaches the loss, a step taken twice has other
                bits, or the second derivative of loss or optimizer is not that of the step.
            RunError: If `save_dir` holds another run.
        """
        self.prove(state, stream)
        with _locked(save_dir):
            trajectory = self._trajectory(state, self._fitting(stream), save_dir, replay, observe)
            final = trajectory.train()
        self._begun, self._last = state, trajectory
        return final

    def restart(self, state: State) -> State:
        """State 0 with the parameters of `state` and fresh moments, where a new phase of training begins."""
        return initial_state(self.recipe, state.params)

    def evaluate(self, state: State, query: DataStream | Query) -> Evaluation:
        """The value of a query at a state, and its gradient; dropout is off, however the model is trained.

        Args:
            query: A stream, whose mean loss is the query, or a function params → (values [K], gradients [K, *shape]).
        """
        with evaluating(self.module), lookups.whole():
            if not isinstance(query, DataStream):
                return Evaluation(*query(state.params))
            query = self._fitting(query)
            batches = [query[t] for t in range(len(query))]
            sizes = [_targets(query, batch) for batch in batches]
            shares = [b._replace(scale=b.scale * (n / sum(sizes))) for b, n in zip(batches, sizes)]
            value, gradient, _ = self.engine.gradient(state.params, shares, query.weights, None)
        return Evaluation(value, {name: g[None] for name, g in gradient.items()})

    def backward(
        self,
        save_dir: str | Path | None,
        stream: DataStream,
        query: Evaluation | BackwardState,
        *,
        start: State | None = None,
        replay: Replay | None = None,
        observe: Callable[[Event], None] = lambda event: None,
    ) -> BackwardState:
        """Pull a query back through the run: the score of every example or token, and the cotangent of its start.

        Args:
            save_dir: The folder given to `train`, or None for the run in memory.
            stream: The stream that was trained on.
            query: From `evaluate` at the final state; or what `backward` gave for a run that went on from there.
            start: The state that the run began from: that of the last `train`, or of `initialize`, when None.
        Raises:
            ValueError: If there is no finished run of this recipe, start and stream there, or the query does not fit.
            RunError: If `save_dir` holds another run.
        """
        trajectory, self._last = self._last, None
        folder, start = Path(save_dir) if save_dir is not None else None, start or self._begun
        stream = self._fitting(stream)
        identity = self._identity(stream, start)
        known = trajectory is not None and trajectory.store.identity == identity and trajectory.folder == folder
        if not known:
            if folder is None or not (folder / "final.safetensors").exists():
                raise ValueError(
                    f"there is no finished run of this recipe, start and stream in {save_dir or 'memory'}: call train "
                    "first, and pass the same stream and save_dir, and as start the state that it began from"
                )
            trajectory = self._trajectory(start, stream, folder, replay, observe)
        assert trajectory is not None, "known or made"
        given = cotangent_of(query, start, stream.weights)
        trajectory.observe = observe
        key, reached = fingerprint(given.gradient, given.moments), list[Cotangent]()
        with _locked(folder):
            if folder:
                trajectory.train()
            scores = trajectory.reverse(given.gradient, key, moments=given.moments, reached=reached.append)
            trajectory.durable.clean_reverse(key)
        return given.answered(reached.pop(), scores)

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
            state: Where the run started.
            stream: The stream that was trained on.
            query: As for `evaluate`.
            scores: weight_grads of `backward`.
            subsets: How many to leave out, one retraining each, and one with everything.
            fraction: Share of the examples in a subset.
        Raises:
            NonFiniteError: If a retraining diverges; it names the subset and the step.
        """
        _refuse_finished(state, stream)
        stream = self._fitting(stream)
        ready = Ready(Training(self.recipe, self.engine, stream, stream.weights), state, "")

        def value(weights: Tensor, left_out: str) -> np.ndarray:
            try:
                final = ready.final(weights)
            except NonFiniteError as error:
                raise NonFiniteError(f"retrained {left_out}: {error}") from error
            values = self.evaluate(final, query).value.reshape(-1).double().cpu().numpy()
            if not np.isfinite(values).all():
                raise NonFiniteError(f"retrained {left_out}: the query is {values.tolist()} after training")
            return values

        columns = scores if scores.ndim > stream.weights.ndim else scores[None]
        members, here = np.arange(stream.weights.numel()), value(stream.weights, "with everything")
        sets = [random_subset(members, fraction, seed, number) for number in range(subsets)]
        prediction = np.stack([predicted(columns, stream.weights, subset).numpy() for subset in sets])
        retrained = [
            value(without(stream.weights, subset), f"without subset {number}") for number, subset in enumerate(sets)
        ]
        measured = np.stack(retrained) - here
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
        _refuse_finished(state, stream)
        if replay is None:
            replay = Replay(memory=0, disk=1 << 62, keep=True, plan="all") if folder else Replay()
        training = Training(self.recipe, self.engine, stream, stream.weights)
        return Ready(training, state, self._identity(stream, state)).trajectory(replay, folder, observe)

    def _fitting(self, stream: DataStream) -> DataStream:
        """The stream in the model's precision, its rows checked against the model."""
        if isinstance(stream.rows, Rows):
            check_rows(stream.rows, inner(self.module))
        dtypes = (theta.dtype for theta in self.initial.params.values())
        return stream.in_precision(reduce(torch.promote_types, dtypes))

    def _identity(self, stream: DataStream, state: State) -> str:
        data = stream.rows.digest() if isinstance(stream.rows, Rows) else stream.rows
        stopped = (stream.steps,) if stream.steps < stream.epochs * stream.steps_per_epoch else ()
        order = (stream.batch_size, stream.epochs, stream.shuffle, stream.seed, *stopped)
        begun = (state.step, state.params, state.moments)
        return identify(self._function, data, order, stream.dtype, stream.weights, *begun, held_tensors(self.module))


def _locked(save_dir: str | Path | None) -> AbstractContextManager[None]:
    return nullcontext() if save_dir is None else locked(Path(save_dir))


def _weighted(loss: Callable[[Params, Any], Tensor]) -> Objective:
    def objective(params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the only one that is twice differentiable
            losses = loss(params, inputs)
        if losses.shape != coefficients.shape:
            raise ValueError(
                f"the loss returned shape {tuple(losses.shape)} for a batch of {tuple(coefficients.shape)} weights; it "
                "has to return one loss for each item (reduction='none')"
            )
        return torch.sum(losses * coefficients)

    return objective


def _refuse_finished(state: State, stream: DataStream) -> None:
    if state.step >= len(stream):
        raise ValueError(
            f"the state is at step {state.step} and the stream ends at step {len(stream)}: there is nothing left to "
            "train. To go on, pass a stream of more epochs; for a new phase with fresh moments, start from "
            "trainer.restart(state)"
        )


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
