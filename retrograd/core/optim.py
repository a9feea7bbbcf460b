"""Optimizers as (init, update) pairs with their pullbacks.

    update    (θ, m, g, t) → (θ', m')
    pullback  ((θ, m, g, t), λ = (λ_θ', λ_m')) → (θ̄, m̄, ḡ) = (∂(θ', m')/∂(θ, m, g))ᵀ λ

Each optimizer is a frozen record of its hyperparameters, so a recipe that holds it can be compared and hashed; all that
evolves is in the moments. `update` is made of plain differentiable operations and never writes in place; `pullback` is
closed-form for SGD and AdamW and takes cotangents with a leading query axis [K, *shape]. The same cotangents give the
derivatives of the query with respect to the recipe's own numbers (`recipe_pullback`):

    ∂φ/∂lr_t = ⟨λ_θ', ∂θ'/∂lr_t⟩          ∂φ/∂wd = Σ_t ⟨λ_θ', ∂θ'/∂wd⟩

Sources: torch.optim.SGD; Loshchilov & Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "SGD",
    "AdamW",
    "Cotangent",
    "LearningRate",
    "Moments",
    "Optimizer",
    "Params",
    "clip",
    "clip_pullback",
    "rate",
]

_PIECE = 1 << 18  # entries; measured flat between 2¹⁷ and 2¹⁸, where whole leaves take 3 to 4 times as long

_LONGEST = 0.99  # decay of an average out of which a gradient comes with 100 times the dtype's rounding

Params = dict[str, Tensor]
Moments = Any
LearningRate = float | Callable[[int], float]


class Cotangent(NamedTuple):
    """λ: what the sweep carries. Every tensor has a leading query axis [K, *shape]."""

    params: Params
    moments: Moments


@runtime_checkable
class Optimizer(Protocol):
    """What a step needs of an optimizer."""

    def init(self, params: Params) -> Moments:
        """The moments before step 0."""

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        """One update, as plain differentiable operations."""

    def pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent
    ) -> tuple[Cotangent, Params]:
        """The cotangents of (params, moments) and of grads, [K, *shape] each."""

    def recipe_pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent, bars: Params
    ) -> dict[str, Tensor]:
        """This step's ∂φ/∂lr_t and share of ∂φ/∂weight_decay, [K] each; `bars` are the cotangents of grads.

        Empty where the optimizer does not know its own learning rate.
        """

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        """The gradient that took `moments` to `after`, to rounding; None where they do not hold it."""

    def preconditioner(self, moments: Moments, grads: Params, step: int) -> Params | None:
        """P⁻¹ of the update θ' = θ − lr·P⁻¹m̂, elementwise; None for the identity."""


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent: b' = μb + g + wd·θ; θ' = θ − lr·b' (Nesterov: θ − lr·(g + wd·θ + μb')).

    >>> SGD(0.1).update({"x": torch.ones(2)}, {}, {"x": torch.ones(2)}, 0)[0]["x"]
    tensor([0.9000, 0.9000])
    """

    lr: LearningRate
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(lr=self.lr, weight_decay=self.weight_decay)
        check_fraction(momentum=self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum; momentum is 0")

    def init(self, params: Params) -> Moments:
        return {"momentum": zeros(params)} if self.momentum else {}

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        lr, new, buffers = rate(self.lr, step), {}, {}
        for name, theta in params.items():
            g = torch.add(grads[name], theta, alpha=self.weight_decay) if self.weight_decay else grads[name]
            if self.momentum:
                buffers[name] = torch.add(g, moments["momentum"][name], alpha=self.momentum)
                g = torch.add(g, buffers[name], alpha=self.momentum) if self.nesterov else buffers[name]
            new[name] = torch.sub(theta, g, alpha=lr)
        return new, {"momentum": buffers} if self.momentum else {}

    def pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent
    ) -> tuple[Cotangent, Params]:
        lr, mu, decay = rate(self.lr, step), self.momentum, self.weight_decay
        thetas, buffers, gs = {}, {}, {}
        for name in params:
            theta_bar = cotangent.params[name]
            if mu:
                scale = mu * lr if self.nesterov else lr
                buffer_bar = torch.sub(cotangent.moments["momentum"][name], theta_bar, alpha=scale)
                g_bar = torch.sub(buffer_bar, theta_bar, alpha=lr) if self.nesterov else buffer_bar
                buffers[name] = buffer_bar * mu
            else:
                g_bar = theta_bar * -lr
            gs[name] = g_bar
            thetas[name] = torch.add(theta_bar, g_bar, alpha=decay) if decay else theta_bar
        return Cotangent(thetas, {"momentum": buffers} if mu else {}), gs

    def recipe_pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent, bars: Params
    ) -> dict[str, Tensor]:
        directions = {}
        for name, theta in params.items():
            g = torch.add(grads[name], theta, alpha=self.weight_decay) if self.weight_decay else grads[name]
            if self.momentum:
                buffer = torch.add(g, moments["momentum"][name], alpha=self.momentum)
                g = torch.add(g, buffer, alpha=self.momentum) if self.nesterov else buffer
            directions[name] = g
        return {"lr": -inner(cotangent.params, directions), "weight_decay": inner(bars, params)}

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        if not _holds(moments.get("momentum", {}), self.momentum):
            return None
        found = {}
        for name, buffer in after["momentum"].items():
            g = torch.sub(buffer, moments["momentum"][name], alpha=self.momentum)
            found[name] = g.sub_(params[name], alpha=self.weight_decay) if self.weight_decay else g
        return found

    def preconditioner(self, moments: Moments, grads: Params, step: int) -> Params | None:
        return None


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay and ε_root inside the root, t counted from 0:

        m' = β₁m + (1−β₁)g      v' = β₂v + (1−β₂)g²      m̂ = m'/(1−β₁^(t+1))      v̂ = v'/(1−β₂^(t+1))
        θ' = θ − lr·(m̂/(√(v̂ + ε_root) + ε) + wd·θ)

    ε_root > 0 makes the update smooth where a gradient is near 0; at ε_root = 0 the root's slope at 0 is defined as 0.
    """

    lr: LearningRate
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(lr=self.lr, weight_decay=self.weight_decay, eps=self.eps, eps_root=self.eps_root)
        check_fraction(beta1=self.beta1, beta2=self.beta2)
        if self.eps == 0 and self.eps_root == 0:
            raise ValueError("eps and eps_root are both 0: the first update of an unused parameter would be 0/0")

    def init(self, params: Params) -> Moments:
        return {"m": zeros(params), "v": zeros(params)}

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        lr, correction1, correction2 = self._rates(step)

        def updated(theta: Tensor, m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = torch.lerp(m, g, 1 - self.beta1)
            v = torch.addcmul(v * self.beta2, g, g, value=1 - self.beta2)
            scale = _root(v / correction2 + self.eps_root if self.eps_root else v / correction2) + self.eps
            decayed = theta * (1 - lr * self.weight_decay) if self.weight_decay else theta
            return torch.addcdiv(decayed, m, scale, value=-lr / correction1), m, v

        new, ms, vs = {}, {}, {}
        for name, theta in params.items():
            given = (theta, moments["m"][name], moments["v"][name], grads[name])
            new[name], ms[name], vs[name] = _in_pieces(updated, given)
        return new, {"m": ms, "v": vs}

    def pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent
    ) -> tuple[Cotangent, Params]:
        def pulled(
            m: Tensor, v: Tensor, g: Tensor, theta_bar: Tensor, m_bar: Tensor, v_bar: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            slope_m, slope_v = self._slopes(m, v, g, step)
            m_bar, v_bar = torch.addcmul(m_bar, slope_m, theta_bar), torch.addcmul(v_bar, slope_v, theta_bar)
            g_bar = torch.addcmul(m_bar * (1 - self.beta1), g, v_bar, value=2 * (1 - self.beta2))
            return g_bar, m_bar.mul_(self.beta1), v_bar.mul_(self.beta2)

        thetas, ms, vs, gs = {}, {}, {}, {}
        lr = rate(self.lr, step)
        for name, theta_bar in cotangent.params.items():
            given = (moments["m"][name], moments["v"][name], grads[name])
            bars = (theta_bar, cotangent.moments["m"][name], cotangent.moments["v"][name])
            gs[name], ms[name], vs[name] = _in_pieces(pulled, given, bars)
            thetas[name] = theta_bar * (1 - lr * self.weight_decay) if self.weight_decay else theta_bar
        return Cotangent(thetas, {"m": ms, "v": vs}), gs

    def recipe_pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent, bars: Params
    ) -> dict[str, Tensor]:
        lr, correction1, _ = self._rates(step)
        decayed = inner(cotangent.params, params)
        moved = torch.zeros_like(decayed)
        for name, theta_bar in cotangent.params.items():
            for m, v, g, bar in _pieces((moments["m"][name], moments["v"][name], grads[name]), (theta_bar,)):
                direction = torch.lerp(m, g, 1 - self.beta1).div_(correction1).div_(self._scale(v, g, step))
                moved = moved + torch.mv(bar.flatten(1), direction.flatten()).double()
        return {"lr": -moved - self.weight_decay * decayed, "weight_decay": -lr * decayed}

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        if not _holds(after["m"], self.beta1):
            return None
        factor = 1 / (1 - self.beta1)
        return {name: torch.lerp(m, after["m"][name], factor) for name, m in moments["m"].items()}

    def preconditioner(self, moments: Moments, grads: Params, step: int) -> Params:
        return {name: self._scale(v, grads[name], step).reciprocal_() for name, v in moments["v"].items()}

    def _scale(self, v: Tensor, g: Tensor, step: int) -> Tensor:
        """√(v̂ + ε_root) + ε."""
        root = (v * self.beta2).addcmul_(g, g, value=1 - self.beta2).div_(self._rates(step)[2])
        return root.add_(self.eps_root).sqrt_().add_(self.eps)

    def _rates(self, step: int) -> tuple[float, float, float]:
        return rate(self.lr, step), 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)

    def _slopes(self, m: Tensor, v: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """∂θ'/∂m' and ∂θ'/∂v', elementwise; shared by all queries."""
        lr, correction1, correction2 = self._rates(step)
        new_m = torch.lerp(m, g, 1 - self.beta1)
        root = (v * self.beta2).addcmul_(g, g, value=1 - self.beta2).div_(correction2).add_(self.eps_root).sqrt_()
        scale = root + self.eps
        slope_m = torch.reciprocal(scale).mul_(-lr / correction1)
        # −∂θ'/∂m' · m'/scale · ∂root/∂v', with ∂root/∂v' = 1/(2·root·correction2)
        slope_v = new_m.mul_(slope_m).div_(scale).div_(root).mul_(-0.5 / correction2)
        if self.eps_root == 0:
            slope_v.masked_fill_(root == 0, 0.0)
        return slope_m, slope_v


def clip(grads: Params, max_norm: float) -> Params:
    """g·min(1, c/(‖g‖ + 1e-6)), ‖g‖ over all parameters together; as torch.nn.utils.clip_grad_norm_."""
    total = torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]).square().sum().sqrt()
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    return {name: g * scale for name, g in grads.items()}


def clip_pullback(grads: Params, max_norm: float, bars: Params) -> Params:
    """The cotangent of g, [K, *shape], from that of clip(g): s·ḡ + g·⟨g, ḡ⟩·s'(‖g‖)/‖g‖ where the clip is active."""
    total = torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]).square().sum().sqrt()
    scale = max_norm / (total + 1e-6)
    if scale >= 1:
        return bars
    inner = sum((bars[name].flatten(1) @ g.flatten() for name, g in grads.items()), start=torch.zeros(()))
    slope = -inner * scale / (total + 1e-6) / total  # [K]
    return {n: bars[n] * scale + slope.view(-1, *[1] * grads[n].ndim) * grads[n] for n in grads}


def inner(cotangent: Params, direction: Params) -> Tensor:
    """⟨λ_k, direction⟩ for each query, [K] float64."""
    parts = (torch.mv(bar.flatten(1), direction[name].flatten()).double() for name, bar in cotangent.items())
    return sum(parts, start=torch.zeros((), dtype=torch.float64))


def rate(lr: LearningRate, step: int) -> float:
    """The learning rate of a step."""
    return lr(step) if callable(lr) else lr


def _in_pieces(
    function: Callable[..., tuple[Tensor, ...]], leaves: Sequence[Tensor], bars: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """An elementwise function of [*shape] and [K, *shape], piece by piece."""
    size, start, outs = leaves[0].numel(), 0, list[Tensor]()
    for given in _pieces(leaves, bars):
        found = function(*given)
        if given[0].numel() == size:
            return found
        outs = outs or [x.new_empty((*x.shape[:-1], size)) for x in found]
        for out, part in zip(outs, found, strict=True):
            out[..., start : start + part.shape[-1]] = part
        start += given[0].numel()
    return tuple(out.view(*out.shape[:-1], *leaves[0].shape) for out in outs)


def _pieces(leaves: Sequence[Tensor], bars: Sequence[Tensor] = ()) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [*shape] and [K, *shape]; on a CPU large ones in flat pieces, so that temporaries stay in cache."""
    size, queries = leaves[0].numel(), len(bars[0]) if bars else 1
    piece = max(1, _PIECE // queries)
    if size <= piece or any(x.device.type != "cpu" or _traced(x) for x in (*leaves, *bars)):
        yield (*leaves, *bars)
        return
    flat = [x.reshape(-1) for x in leaves] + [x.reshape(queries, -1) for x in bars]
    for start in range(0, size, piece):
        yield tuple(x[..., start : start + piece] for x in flat)


def _traced(x: Tensor) -> bool:
    return x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _root(x: Tensor) -> Tensor:
    """√x with slope 0 at 0: both `where` are needed, or autograd multiplies 0 by the infinite slope."""
    if not _traced(x):
        return x.sqrt()
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _holds(moments: Params, decay: float) -> bool:
    """Whether a gradient can be had back from an average of rate `decay`: rounding grows by 1/(1 − decay)."""
    exact = all(x.dtype in (torch.float32, torch.float64) for x in moments.values())
    return bool(moments) and exact and decay <= _LONGEST


def zeros(params: Params) -> Params:
    """Zeros of the parameters' shapes."""
    return {name: torch.zeros_like(theta) for name, theta in params.items()}


def _check(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not callable(number) and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} is {number}; it has to be a finite number, 0 or more")


def check_fraction(**numbers: float) -> None:
    """Refuse a number outside [0, 1), by its name."""
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise ValueError(f"{name} is {number}; it has to be at least 0 and below 1")
