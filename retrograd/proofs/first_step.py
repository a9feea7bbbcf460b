"""The first step, tried before the training: is it a function, and is its pullback that function's derivative?

Autograd differentiates operations. Where one hides what it does (detach, a straight-through estimate, .item(), a
backward that is not differentiated again), the second derivative is that of another update, and every score is silently
wrong. So along random directions u of the parameters and v of an optimizer's gradient, moments and parameters,

    ⟨u, H ḡ⟩ = d/dh ⟨g(θ + hu), ḡ⟩                ⟨v, U*λ⟩ = d/dh ⟨U(s + hv), λ⟩                   at h = 0

by central differences (slopes.py): in float64 where the loss runs in it, else at the run's precision. Only where none
agrees, the step is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from retrograd.core import tree
from retrograd.core.draws import random_draws
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Engine, Objective, State, Training, coefficients, micro_batches_of
from retrograd.parallel.group import RankError
from retrograd.parallel.shard import ByBlock
from retrograd.proofs.first_update import prove_update
from retrograd.proofs.leaves import anywhere, named, refuse_infinite, some, wide
from retrograd.proofs.memory import FULL
from retrograd.proofs.slopes import Draws, Slopes, scaled

__all__ = ["loss_of", "prove", "prove_gradient", "prove_pure", "prove_reached"]

_NEAR = {torch.float64: 1e-8, torch.float32: 1e-3}  # of an engine's loss to the objective's, relative
_DIRECTIONS = 2


def prove(
    training: Training,
    state: State,
    module: nn.Module,
    objective: Objective | None = None,
    rows: int | None = None,
    loss: Tensor | None = None,
) -> None:
    """All of it, on the first micro-batch: some fifteen gradients and a pullback, most of them in float64.

    Parameters may lie in pieces, where the engine and `tree.lying` know how: then all processes call it.

    Args:
        module: Whose parameters the state has; for names, buffers and float64.
        objective: Where the loss is not retrograd's own.
        rows: How many rows are enough, where the loss takes each by itself; of a large model one is.
        loss: By the model's own forward pass (`loss_of`), where the engine takes another way.
    Raises:
        ValueError: If a replayed step would be another one, or scores would not be the derivative.
    """
    training = _on_few(training, module, rows)
    if objective is not None:
        prove_reached(training, state, objective, module)
    engine_loss, grads = prove_pure(training, state, module)
    if loss is not None:
        _refuse_another(engine_loss, loss, next(iter(state.params.values())).dtype)
    prove_update(training.recipe.optimizer, state.params, grads)
    del grads  # as large as the model
    prove_gradient(training, state, module)


@torch.no_grad()
def loss_of(
    training: Training, state: State, objective: Objective, module: nn.Module, rows: int | None = None
) -> Tensor:
    """The loss [] of what `prove` looks at, by a forward pass of the objective, which has to change nothing.

    Raises:
        ValueError: If it changes the parameters or a buffer of the module.
    """
    batch, seed = _first(_on_few(training, module, rows), state)
    with _unchanged(state, module), random_draws(seed, 0):
        return objective(state.params, batch.inputs, coefficients(batch, training.weights))


def prove_reached(training: Training, state: State, objective: Objective, module: nn.Module) -> None:
    """Refuse a loss that reads the module's own parameters, or none, in place of those it is given.

    Raises:
        ValueError: If no parameter reaches the loss, or one of the module does past the argument `params`.
    """
    batch, seed = _first(training, state)
    # clones: what the loss changes in place is for `prove_pure` to see
    leaves = {name: theta.detach().clone().requires_grad_() for name, theta in state.params.items()}
    with torch.enable_grad(), random_draws(seed, 0):
        loss = objective(leaves, batch.inputs, coefficients(batch, training.weights))
    # what the loss reads is on its graph: autograd's leaves hold the tensors themselves
    read = {id(node.variable) for node in _nodes(loss.grad_fn) if hasattr(node, "variable")}
    missed = {name for name, leaf in leaves.items() if id(leaf) not in read}
    past = [name for name, own in module.named_parameters() if name in missed and id(own) in read]
    advice = "call the model with torch.func.functional_call(model, params, …)"
    if past:
        raise ValueError(
            f"the loss reads {some(past)} of the module itself and not of its argument `params`: training would not "
            f"move what the loss depends on, and scores would miss it; {advice}"
        )
    if len(missed) == len(leaves):
        raise ValueError(
            f"none of the {len(leaves)} parameters reaches the loss: nothing would be trained, and every score would "
            f"be 0; {advice}"
        )


def prove_pure(training: Training, state: State, module: nn.Module | None = None) -> tuple[Tensor, Params]:
    """The first micro-batch's loss and gradient, once it is clear that they have the same bits every time.

    Raises:
        ValueError: If two evaluations differ, or one changes the parameters or a buffer of the module.
    """
    batch, seed = _first(training, state)
    with _unchanged(state, module):
        loss, grads, _ = training.engine.gradient(state.params, [batch], training.weights, seed)
        again, others, _ = training.engine.gradient(state.params, [batch], training.weights, seed)
    differs = anywhere({name: not _same(g, others[name]) for name, g in grads.items()})
    if differs or not _same(loss, again):
        where = f"the gradient of {named(module, differs[0])}" if differs else "the loss"
        raise ValueError(
            f"the first step, evaluated twice from the same state, gives two results: {where} differs. A replayed step "
            "has to have the same bits: leave out random numbers drawn without `dropout`, counters and caches; on a "
            "GPU, torch.use_deterministic_algorithms(True)"
        )
    return loss, grads


def prove_gradient(training: Training, state: State, module: nn.Module | None = None) -> None:
    """Refuse a loss whose H ḡ is not the derivative of its gradient.

    Raises:
        ValueError: If they differ, by the name of the parameters where they do, or the loss cannot be differentiated
            twice.
    """
    batch, seed = _first(training, state)
    dtype = next(iter(state.params.values())).dtype
    if dtype not in (torch.float32, torch.float64):
        return  # coarser than any difference that would tell
    whole = state.params.values() if module is None else module.parameters()
    small = sum(theta.numel() for theta in whole) <= FULL
    if dtype == torch.float64 or (small and _runs_in_float64(training, state.params, batch, seed, module)):
        with _in_float64(module):
            given = tree.map(wide, (state.params, batch, training.weights))
            _compare_gradient(training.engine, *given, seed, module)
    else:
        _compare_gradient(training.engine, state.params, batch, training.weights, seed, module)


def _on_few(training: Training, module: nn.Module, rows: int | None) -> Training:
    """The training whose first micro-batch has so many rows; of a large model one, of None all."""
    if rows is None:
        return training
    rows = rows if sum(theta.numel() for theta in module.parameters()) <= FULL else 1
    size = min(rows, training.recipe.micro_batch_size or rows)
    return training._replace(recipe=dataclasses.replace(training.recipe, micro_batch_size=size))


@contextmanager
def _unchanged(state: State, module: nn.Module | None) -> Iterator[None]:
    """Refuses what changes the parameters or a buffer inside."""
    held = dict(module.named_buffers()) if module is not None else {}
    before = {"params": tree.digest(state.params), **{name: tree.digest(x) for name, x in held.items()}}
    yield
    now = dict(module.named_buffers()) if module is not None else {}
    changed = [name for name in held if name not in now or tree.digest(now[name]) != before[name]]
    if changed:
        raise ValueError(
            f"the loss changes the buffer {named(module, changed[0])}, which no state of the run holds: a replayed "
            "step would be another one. Use a module without running statistics, or put it into evaluation mode"
        )
    if tree.digest(state.params) != before["params"]:
        raise ValueError(
            "the loss changes the parameters in place (nn.Embedding's max_norm does): a replayed step would be another "
            "one. Make the change part of the loss, as an operation that returns a new tensor"
        )


def _refuse_another(engine_loss: Tensor, own: Tensor, dtype: torch.dtype) -> None:
    """Refuses an engine whose loss is not the objective's."""
    difference = abs(float(engine_loss) - float(own))
    if not difference <= _NEAR.get(dtype, 0.1) * (abs(float(own)) + 1e-3):
        raise ValueError(
            f"the engine's loss on the first rows is {float(engine_loss):.6g}, the model's own forward pass gives "
            f"{float(own):.6g}: it would train another function. Take --engine double"
        )


def _first(training: Training, state: State) -> tuple[Batch, str | None]:
    batches, seed = micro_batches_of(training, state.step)
    return batches[0], seed


def _compare_gradient(
    engine: Engine, params: Params, batch: Batch, weights: Tensor, seed: str | None, module: nn.Module | None
) -> None:
    draw = Draws()
    grads = engine.gradient(params, [batch], weights, seed)[1]
    if tree.nonfinite(grads):
        return  # the run itself says so, with the step
    bars = {name: bar[None] for name, bar in scaled(grads, 1.0, draw).items()}
    del grads  # as large as the model
    try:
        products = engine.pullback(params, [batch], weights, seed, bars)[0]
    except (RankError, torch.OutOfMemoryError):
        raise  # says nothing of the loss
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the loss cannot be differentiated twice, which scores need: {str(error).strip().splitlines()[0]} Write "
            "the operation in plain tensor operations, or give it a backward that is differentiable itself"
        ) from error
    refuse_infinite("H ḡ", products, module)

    def value(point: Params) -> float:
        moved = engine.gradient(point, [batch], weights, seed)[1]
        return float(tree.dot(moved, {name: bar[0] for name, bar in bars.items()}))

    probe = Slopes(value, params, {name: x[0] for name, x in products.items()}, draw)
    for _ in range(_DIRECTIONS):
        along = scaled(params, 0.02, draw)
        compared = probe.along(along)
        if not compared.agrees:
            wrong = probe.leaves(along)
            raise ValueError(
                f"the second derivative of the loss is not that of the step: along {some(wrong, module)} the "
                f"derivative of the gradient is {compared.measured:.6g} by differences and {compared.pulled:.6g} by "
                "autograd, and scores would be wrong by as much. Something there hides from autograd what it does: "
                "detach, straight-through estimates, once_differentiable, .item(), or a fused kernel with a backward "
                "of its own. Write it in plain differentiable operations"
            )


@contextmanager
def _in_float64(module: nn.Module | None) -> Iterator[None]:
    """The module's parameters and buffers in float64, and whatever else meets a torch function inside.

    The very tensors are put back.
    """
    own = [] if module is None else [*module.parameters(), *module.buffers()]
    held = [x for x in own if x.untyped_storage().nbytes() >= x.nbytes]  # what lies in pieces is not here
    before = [x.data for x in held]
    try:
        for x in held:
            x.data = wide(x.data)
        with _Widening():
            yield
    finally:
        for x, data in zip(held, before, strict=True):
            x.data = data


class _Widening(TorchFunctionMode):
    """Arguments of lower precision are raised to float64: tensors that a loss holds, casts in its code."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        return function(*map(_widened, arguments), **{name: _widened(x) for name, x in (options or {}).items()})


def _widened(x: Any) -> Any:
    if isinstance(x, (tuple, list, dict)):
        return _pytree.tree_map(_widened, x) if x else x
    return torch.float64 if x is torch.float32 else wide(x) if isinstance(x, Tensor) else x


def _runs_in_float64(
    training: Training, params: Params, batch: Batch, seed: str | None, module: nn.Module | None
) -> bool:
    """Whether the loss does: one with kernels of its own may not. Processes that prove together all say the same."""
    engine = training.engine
    params, batch, weights = tree.map(wide, (params, batch, training.weights))
    try:
        with _in_float64(module):
            if isinstance(engine, ByBlock):
                return engine.runs(params, [batch], weights, seed)
            grads = engine.gradient(params, [batch], weights, seed)[1]
    except (RankError, torch.OutOfMemoryError):
        raise
    except Exception:  # a loss raises what it likes; at the run's precision it has run already
        return False
    return all(g.dtype == torch.float64 for g in grads.values())


def _same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first, second) or torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _nodes(start: Any) -> Iterator[Any]:
    """The nodes of an autograd graph."""
    waiting, seen = [start] if start is not None else [], set[Any]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions if following is not None)
