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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from retrograd.core import tree
from retrograd.core.draws import random_draws
from retrograd.core.optim import SGD, Adam, AdamW, Cotangent, Moments, Muon, Optimizer, Pair, Params
from retrograd.core.step import Batch, Engine, Objective, State, Training, coefficients, micro_batches_of
from retrograd.proofs.slopes import Slopes, randomly, scaled

__all__ = ["prove", "prove_gradient", "prove_pure", "prove_reached", "prove_update"]

_OWN = (SGD, Adam, AdamW, Muon)  # their pullbacks are proved by tests
_DIRECTIONS = 2
_FULL = 1 << 26  # parameters, frozen ones too, up to which a float64 copy is made, and a second row is read


def prove(
    training: Training, state: State, module: nn.Module, objective: Objective | None = None, rows: int | None = None
) -> None:
    """All of it, on the first micro-batch: some fifteen gradients and a pullback, most of them in float64.

    Args:
        module: Whose parameters the state has; for names, buffers and float64.
        objective: Where the loss is not retrograd's own.
        rows: How many rows are enough, where the loss takes each by itself; of a large model one is.
    Raises:
        ValueError: If a replayed step would be another one, or scores would not be the derivative.
    """
    if rows is not None:
        rows = rows if sum(theta.numel() for theta in module.parameters()) <= _FULL else 1
        size = min(rows, training.recipe.micro_batch_size or rows)
        training = training._replace(recipe=dataclasses.replace(training.recipe, micro_batch_size=size))
    if objective is not None:
        prove_reached(training, state, objective, module)
    grads = prove_pure(training, state, module)
    prove_update(training.recipe.optimizer, state.params, grads)
    prove_gradient(training, state, module)


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
            f"the loss reads {_some(past)} of the module itself and not of its argument `params`: training would not "
            f"move what the loss depends on, and scores would miss it; {advice}"
        )
    if len(missed) == len(leaves):
        raise ValueError(
            f"none of the {len(leaves)} parameters reaches the loss: nothing would be trained, and every score would "
            f"be 0; {advice}"
        )


def prove_pure(training: Training, state: State, module: nn.Module | None = None) -> Params:
    """The first micro-batch's gradient, once it is clear that it has the same bits every time.

    Raises:
        ValueError: If two evaluations differ, or one changes the parameters or a buffer of the module.
    """
    batch, seed = _first(training, state)
    held = dict(module.named_buffers()) if module is not None else {}
    before = {"params": tree.digest(state.params), **{name: tree.digest(x) for name, x in held.items()}}
    loss, grads, _ = training.engine.gradient(state.params, [batch], training.weights, seed)
    again, others, _ = training.engine.gradient(state.params, [batch], training.weights, seed)
    now = dict(module.named_buffers()) if module is not None else {}
    changed = [name for name in held if name not in now or tree.digest(now[name]) != before[name]]
    if changed:
        raise ValueError(
            f"the loss changes the buffer {_named(module, changed[0])}, which no state of the run holds: a replayed "
            "step would be another one. Use a module without running statistics, or put it into evaluation mode"
        )
    if tree.digest(state.params) != before["params"]:
        raise ValueError(
            "the loss changes the parameters in place (nn.Embedding's max_norm does): a replayed step would be another "
            "one. Make the change part of the loss, as an operation that returns a new tensor"
        )
    differs = [name for name, g in grads.items() if not _same(g, others[name])]
    if differs or not _same(loss, again):
        where = f"the gradient of {_named(module, differs[0])}" if differs else "the loss"
        raise ValueError(
            f"the first step, evaluated twice from the same state, gives two results: {where} differs. A replayed step "
            "has to have the same bits: leave out random numbers drawn without `dropout`, counters and caches; on a "
            "GPU, torch.use_deterministic_algorithms(True)"
        )
    return grads


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
    small = sum(theta.numel() for theta in whole) <= _FULL
    if dtype == torch.float64 or (small and _runs_in_float64(training, state.params, batch, seed, module)):
        with _in_float64(module):
            given = tree.map(_wide, (state.params, batch, training.weights))
            _compare_gradient(training.engine, *given, seed, module)
    else:
        _compare_gradient(training.engine, state.params, batch, training.weights, seed, module)


def prove_update(optimizer: Optimizer, params: Params, grads: Params) -> None:
    """Refuse an optimizer whose pullback is not the derivative of its update, or whose update is no function.

    Tried in float64 after two updates, at the gradient given, a thousandth and a thousand times of it: clipping shows
    at one of them.

    Raises:
        ValueError: By the names of the optimizer and of what its update is differentiated by.
    """
    if isinstance(optimizer, _OWN):
        return
    draw = torch.Generator().manual_seed(0)
    params, grads = tree.map(_wide, (params, grads))
    typical = float(tree.norm(grads)) / max(1, sum(g.numel() for g in grads.values())) ** 0.5
    if not 0 < typical < float("inf"):
        return  # the run itself says what is wrong with such a gradient
    for scale in (1.0, 1e3, 1e-3):
        near = {name: scale * (g + 0.1 * typical * randomly(g, draw)) for name, g in grads.items()}
        _compare_update(optimizer, params, near, draw)


def _first(training: Training, state: State) -> tuple[Batch, str | None]:
    batches, seed = micro_batches_of(training, state.step)
    return batches[0], seed


# The gradient half.


def _compare_gradient(
    engine: Engine, params: Params, batch: Batch, weights: Tensor, seed: str | None, module: nn.Module | None
) -> None:
    draw = torch.Generator().manual_seed(0)
    grads = engine.gradient(params, [batch], weights, seed)[1]
    if tree.nonfinite(grads):
        return  # the run itself says so, with the step
    bars = {name: bar[None] for name, bar in scaled(grads, 1.0, draw).items()}
    del grads  # as large as the model
    try:
        products = engine.pullback(params, [batch], weights, seed, bars)[0]
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the loss cannot be differentiated twice, which scores need: {str(error).strip().splitlines()[0]} Write "
            "the operation in plain tensor operations, or give it a backward that is differentiable itself"
        ) from error
    _finite("H ḡ", products, module)

    def value(point: Params) -> float:
        found = engine.gradient(point, [batch], weights, seed)[1]
        return float(tree.dot(found, {name: bar[0] for name, bar in bars.items()}))

    probe = Slopes(value, params, {name: x[0] for name, x in products.items()}, draw)
    for _ in range(_DIRECTIONS):
        along = scaled(params, 0.02, draw)
        found = probe.along(along)
        if not found.agrees:
            wrong = probe.leaves(along)
            raise ValueError(
                f"the second derivative of the loss is not that of the step: along {_some(wrong, module)} the "
                f"derivative of the gradient is {found.measured:.6g} by differences and {found.pulled:.6g} by "
                "autograd, and scores would be wrong by as much. Something there hides from autograd what it does: "
                "detach, straight-through estimates, once_differentiable, .item(), or a fused kernel with a backward "
                "of its own. Write it in plain differentiable operations"
            )


@contextmanager
def _in_float64(module: nn.Module | None) -> Iterator[None]:
    """The module's parameters and buffers in float64, and whatever else meets a torch function inside.

    The very tensors are put back.
    """
    held = [] if module is None else [*module.parameters(), *module.buffers()]
    before = [x.data for x in held]
    try:
        for x in held:
            x.data = _wide(x.data)
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
        given = _pytree.tree_map(_widened, (arguments, options or {}))
        return function(*given[0], **given[1])


def _widened(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else _wide(x) if isinstance(x, Tensor) else x


def _runs_in_float64(
    training: Training, params: Params, batch: Batch, seed: str | None, module: nn.Module | None
) -> bool:
    """Whether the loss does: one with kernels of its own may not."""
    params, batch, weights = tree.map(_wide, (params, batch, training.weights))
    try:
        with _in_float64(module):
            grads = training.engine.gradient(params, [batch], weights, seed)[1]
    except Exception:  # a loss raises what it likes; at the run's precision it has run already
        return False
    return all(g.dtype == torch.float64 for g in grads.values())


# The update half.


def _compare_update(optimizer: Optimizer, params: Params, grads: Params, draw: torch.Generator) -> None:
    params, moments, varying = _after_two(optimizer, params, grads, draw)
    _pure_update(optimizer, params, moments, grads)
    new, after = optimizer.update(params, moments, grads, 2)
    bars = tree.map(lambda x: randomly(x, draw) if x.is_floating_point() else x.new_zeros(x.shape), (new, after))
    cotangent = Cotangent(*tree.map(lambda x: x[None], bars))
    pulled = optimizer.pullback(params, moments, grads, 2, cotangent)
    flat, flat_bars = _numbered(moments), _numbered(pulled.cotangent.moments)
    inputs = {
        "gradient": (grads, {name: bar[0] for name, bar in pulled.bars.items()}),
        "moments": ({n: flat[n] for n in varying}, {n: flat_bars[n][0] for n in varying}),
        "parameters": (params, {name: bar[0] for name, bar in pulled.cotangent.params.items()}),
    }
    for what, (point, slopes) in inputs.items():
        if not point:
            continue
        _finite(f"the pullback of {_title(optimizer)} to its {what}", slopes)

        def value(moved: Params, what: str = what) -> float:
            given = {"parameters": params, "gradient": grads, "moments": moments}
            given[what] = moved if what != "moments" else _placed(moments, {**flat, **moved})
            out = optimizer.update(given["parameters"], given["moments"], given["gradient"], 2)
            # from the unmoved outcome: a small change of large parameters would round away
            return float(tree.dot(tree.map(torch.sub, *_floating(out, (new, after))), _floating(bars, bars)[0]))

        probe = Slopes(value, point, slopes, draw)
        # in proportion to each entry: an update is smooth there even where it divides by √v
        along = {name: x * randomly(x, draw) for name, x in point.items()}
        found = probe.along(along)
        if not found.agrees:
            raise ValueError(
                f"the derivative of {_title(optimizer)}'s update by its {what} is {found.measured:.6g} by differences "
                f"and {found.pulled:.6g} by its pullback (at {_some(probe.leaves(along))}): scores would be wrong by "
                "as much. Something in it hides from autograd what it does, such as torchopt.clip_grad_norm or "
                "use_accelerated_op; clip with max_grad_norm instead, or take an optimizer from retrograd.optim"
            )


def _after_two(
    optimizer: Optimizer, params: Params, grads: Params, draw: torch.Generator
) -> tuple[Params, Moments, list[str]]:
    """Parameters and moments after two updates, and which moments depend on the gradient (a step count does not)."""
    ends = []
    for _ in range(2):
        now, moments = params, optimizer.init(params)
        for t in range(2):
            moved = {name: g * (1 + 0.3 * randomly(g, draw)) for name, g in grads.items()}
            now, moments = optimizer.update(now, moments, moved, t)
            now, moments = tree.map(torch.detach, (now, moments))
        ends.append((now, moments))
    one, other = (_numbered(moments) for _, moments in ends)
    varying = [name for name, x in one.items() if x.is_floating_point() and not torch.equal(x, other[name])]
    return *ends[0], varying


def _pure_update(optimizer: Optimizer, params: Params, moments: Moments, grads: Params) -> None:
    given = (params, moments, grads)
    before = tree.digest(given)
    outcomes = [tree.digest(optimizer.update(*given, 2)) for _ in range(2)]
    if tree.digest(given) != before:
        raise ValueError(
            f"{_title(optimizer)} changes its arguments in place: replay needs them as they were. Its update has to "
            "return new tensors"
        )
    if outcomes[0] != outcomes[1]:
        raise ValueError(
            f"the update of {_title(optimizer)}, taken twice from the same state, gives two results: all that it "
            "remembers has to be in the moments that it is given and returns"
        )


def _floating(*trees: Any) -> list[list[Tensor]]:
    return [[x for x in tree.leaves(one) if x.is_floating_point()] for one in trees]


def _numbered(moments: Moments) -> Params:
    return {f"moment {place}": x for place, x in enumerate(tree.leaves(moments))}


def _placed(moments: Moments, flat: Params) -> Moments:
    given = iter(flat.values())
    return tree.map(lambda _: next(given), moments)


def _title(optimizer: Optimizer) -> str:
    one = optimizer.pair if isinstance(optimizer, Pair) else optimizer
    return f"the optimizer {type(one).__module__.split('.')[0]}.{type(one).__name__}"


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() and x.dtype != torch.float64 else x


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _finite(what: str, found: Params, module: nn.Module | None = None) -> None:
    bad = [name for name, x in found.items() if not bool(torch.isfinite(x).all())]
    if bad:
        raise ValueError(
            f"{what} is not finite in {_named(module, bad[0])} at the first step, where the gradient is: a function "
            "there has no finite slope, as √ at 0 (the cure for Adam is eps_root above 0)"
        )


def _named(module: nn.Module | None, name: str) -> str:
    """A parameter or buffer with the type of the module that owns it."""
    parts = dict(module.named_modules()) if module is not None else {}
    owner = parts.get(name.rpartition(".")[0])
    if owner is None:
        return name
    held = list(owner) if isinstance(owner, ParametrizationList) else [owner]
    return f"{name} ({', '.join(type(one).__name__.lstrip('_') for one in held)})"


def _some(names: Sequence[str], module: nn.Module | None = None) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(_named(module, name) for name in names[:3]) + more


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
