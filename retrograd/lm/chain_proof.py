"""A chain is proved against the model's own objective, a few leaves at a time: its gradient, and its pullback along v.

    g_i = ∂ℓ/∂θ_i                    (H v)_i = ∂/∂θ_i [d/de ℓ(θ + e·v)]                    at e = 0

ℓ is the model's own forward pass, on all of its parameters as they lie. What its backward pass brings to e is
Σ_j ⟨∂ℓ/∂θ_j, v_j⟩, a number for each leaf, so that neither the gradient nor v is ever there for more than one leaf: v_j
is the leaf's size times a bᵀ with random a and b, made anew wherever it is multiplied with. The chain gives g and H v
place by place, and what is done is compared and let go of, an eighth of the model at once. So beside the model there
are three times an eighth of it, or its largest leaf, and a few tensors of a leaf's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from retrograd.core import lookups, tree
from retrograd.core.engine.blocks import Blocks, Chain, micros
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Objective, coefficients

__all__ = ["TOLERANCE", "prove_chain"]

# largest relative difference on the trial batch, by dtype: rounding, not a wrong term
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2}
_PARTS = 8  # of the model, one of which is compared at once


def prove_chain(chain: Chain, objective: Objective, params: Params, batch: Batch, weights: Tensor) -> None:
    """Hold a chain's gradient and pullback against those of the model's own objective.

    Args:
        objective: (params, inputs, coefficients) → scalar, by the model's own forward pass.
        batch, weights: A small batch, and its data weights.
    Raises:
        ValueError: If they differ; with the leaf.
    """
    along = {name: _Direction.of(theta, seed) for seed, (name, theta) in enumerate(params.items())}
    live = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    e = torch.zeros((), dtype=batch.scale.dtype, device=batch.scale.device, requires_grad=True)
    factors = coefficients(batch, weights).requires_grad_()
    engine, parts = Blocks(chain), micros([batch], weights, None)
    with torch.enable_grad(), lookups.twice() as passing:
        moved = {name: _Along.apply(theta, e, along[name]) for name, theta in live.items()}
        with _AtUse({id(x): partial(_Along.apply, live[name], e, along[name]) for name, x in moved.items()}):
            loss = objective(moved, batch.inputs, factors)
    read = partial(_each, lambda name: params[name])

    first = _Comparison(chain, params, lambda names: grad(loss, _of(live, names), **_KEEP))
    _, residual = engine.first(read, parts, first)
    first.judge("gradient")

    (slope,) = grad(loss, e, create_graph=True)
    passing.turn()
    second = _Comparison(chain, params, lambda names: grad(slope, _of(live, names), **_KEEP))
    (slopes,) = engine.second(read, partial(_each, lambda name: along[name].made()[None]), 1, parts, second, residual)
    second.note("data weights", slopes[0], *grad(slope, [factors], **_KEEP))
    second.judge("pullback")


_KEEP: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}


class _Direction(NamedTuple):
    """size · a bᵀ, in the shape of a leaf."""

    a: Tensor
    b: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, theta: Tensor, seed: int) -> _Direction:
        draw = torch.Generator().manual_seed(seed)
        rows = len(theta) if theta.ndim else 1
        a, b = (torch.randn(n, generator=draw).to(theta) for n in (rows, theta.numel() // max(1, rows)))
        b = torch.ones_like(b) if theta.ndim < 2 else b
        size = float(torch.linalg.vector_norm(theta)) / max(1, theta.numel()) ** 0.5
        return cls(a * (size or 0.02), b, theta.shape)

    def made(self) -> Tensor:
        return torch.outer(self.a, self.b).view(self.shape)


class _Along(torch.autograd.Function):
    """θ + e·v at e = 0."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, e: Tensor, v: _Direction) -> Tensor:
        ctx.v = v
        return theta.view_as(theta)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return bar, _Dot.apply(bar, ctx.v) if ctx.needs_input_grad[1] else None, None


class _AtUse(TorchFunctionMode):
    """Leaves are moved where they are used. A backward pass comes to the latest operations first: there it is done with
    a leaf's derivative before it has that of the next; moved all at once, it would come to them last, with all of them.

    Args:
        moved: What a leaf that was moved before, by its id, is replaced by.
    """

    def __init__(self, moved: dict[int, Callable[[], Tensor]]) -> None:
        super().__init__()
        self.moved = moved

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") != "__get__":  # what is asked of a tensor, such as its shape
            arguments, options = _pytree.tree_map(self._at_use, (arguments, options or {}))
        return function(*arguments, **(options or {}))

    def _at_use(self, x: Any) -> Any:
        return self.moved[id(x)]() if isinstance(x, Tensor) and id(x) in self.moved else x


class _Dot(torch.autograd.Function):
    """⟨x, v⟩, which keeps neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: _Direction) -> Tensor:
        ctx.v, ctx.dtype = v, x.dtype
        return torch.sum(x.to(_least(x)) * v.made())

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None]:
        return (bar * ctx.v.made()).to(ctx.dtype), None


class _Comparison:
    """Gets what a chain gives, leaf by leaf, and holds it against the model's own: `Sums` of a single micro-batch."""

    def __init__(self, chain: Chain, params: Params, own: Callable[[list[str]], Sequence[Tensor]]) -> None:
        self.params, self.own, self.left = params, own, chain.uses
        self.most = max(tree.nbytes(params) // _PARTS, *(x.nbytes for x in params.values()))
        self.held: Params = {}
        self.ready: Params = {}
        self.seen = Counter[str]()
        self.differences = list[tuple[str, float, float]]()  # name, difference, norm of the model's own

    def add(self, part: int, terms: Params) -> None:
        for name, x in terms.items():
            self.held[name] = self.held[name] + x if name in self.held else x

    def done(self, names: Sequence[str]) -> None:
        self.seen.update(names)
        for name in names:
            if self.seen[name] == self.left[name]:
                self._finish(name, self.held.pop(name, None))

    def note(self, name: str, chained: Tensor, own: Tensor) -> None:
        """Compare what is no leaf, or one that is whole."""
        self.differences.append((name, float((chained.view_as(own) - own).norm()), float(own.norm())))

    def judge(self, what: str) -> None:
        """Refuse the chain if anything differs; a leaf that no place has has to be without a derivative."""
        for name in self.params:
            if name not in self.seen:
                self._finish(name, None)
        self._compare()
        whole = sum(size**2 for _, _, size in self.differences) ** 0.5
        tolerance = TOLERANCE.get(next(iter(self.params.values())).dtype, 0.2)
        for name, difference, size in self.differences:
            # a mathematically zero entry (a key's bias under softmax) is rounding in both
            if not difference <= tolerance * (size + 1e-3 * whole):
                raise ValueError(
                    f"the chain's {what} differs from the model's own by {difference:.2g} of {size:.2g} in {name}"
                )

    def _finish(self, name: str, total: Tensor | None) -> None:
        theta = self.params[name]
        self.ready[name] = torch.zeros_like(theta) if total is None else total.view_as(theta)
        if tree.nbytes(self.ready) >= self.most:
            self._compare()

    def _compare(self) -> None:
        names = list(self.ready)
        for name, own in zip(names, self.own(names) if names else ()):
            self.note(name, self.ready.pop(name), own)


def _each(value: Callable[[str], Tensor], names: Iterable[str]) -> Params:
    return {name: value(name) for name in names}


def _of(leaves: Params, names: Sequence[str]) -> list[Tensor]:
    return [leaves[name] for name in names]


def _least(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
