"""Optimizers as (init, update) pairs with their pullbacks.

    update    (θ, m, g, t) → (θ', m')
    pullback  ((θ, m, g, t), λ = (λ_θ', λ_m')) → (θ̄, m̄, ḡ) = (∂(θ', m')/∂(θ, m, g))ᵀ λ

Each optimizer is a frozen record of its hyperparameters, so a recipe that holds it can be compared and hashed; all that
evolves is in the moments. `update` is made of plain differentiable operations and never writes in place; `pullback` is
closed-form for SGD and AdamW and takes cotangents with a leading query axis [K, *shape]. Sources: torch.optim.SGD;
Loshchilov & Hutter, arXiv:1711.05101; Jordan et al., Muon (2024), as in torch.optim.Muon with `match_rms_adamw`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from retrograd.core import tree

__all__ = ["SGD", "AdamW", "Cotangent", "LearningRate", "Muon", "Optimizer", "Pair", "autograd_pullback", "clip"]

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
        _check_fraction(momentum=self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum; momentum is 0")

    def init(self, params: Params) -> Moments:
        return {"momentum": _zeros(params)} if self.momentum else {}

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
        _check_fraction(beta1=self.beta1, beta2=self.beta2)
        if self.eps == 0 and self.eps_root == 0:
            raise ValueError("eps and eps_root are both 0: the first update of an unused parameter would be 0/0")

    def init(self, params: Params) -> Moments:
        return {"m": _zeros(params), "v": _zeros(params)}

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        lr, correction1, correction2 = self._rates(step)
        new, ms, vs = {}, {}, {}
        for name, theta in params.items():
            m = torch.lerp(moments["m"][name], grads[name], 1 - self.beta1)
            v = torch.addcmul(moments["v"][name] * self.beta2, grads[name], grads[name], value=1 - self.beta2)
            scale = _root(v / correction2 + self.eps_root if self.eps_root else v / correction2) + self.eps
            decayed = theta * (1 - lr * self.weight_decay) if self.weight_decay else theta
            new[name] = torch.addcdiv(decayed, m, scale, value=-lr / correction1)
            ms[name], vs[name] = m, v
        return new, {"m": ms, "v": vs}

    def pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent
    ) -> tuple[Cotangent, Params]:
        thetas, ms, vs, gs = {}, {}, {}, {}
        lr = rate(self.lr, step)
        for name in params:
            g = grads[name]
            slope_m, slope_v = self._slopes(moments["m"][name], moments["v"][name], g, step)
            theta_bar = cotangent.params[name]
            m_bar = torch.addcmul(cotangent.moments["m"][name], slope_m, theta_bar)
            v_bar = torch.addcmul(cotangent.moments["v"][name], slope_v, theta_bar)
            gs[name] = torch.addcmul(m_bar * (1 - self.beta1), g, v_bar, value=2 * (1 - self.beta2))
            thetas[name] = theta_bar * (1 - lr * self.weight_decay) if self.weight_decay else theta_bar
            ms[name], vs[name] = m_bar.mul_(self.beta1), v_bar.mul_(self.beta2)
        return Cotangent(thetas, {"m": ms, "v": vs}), gs

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


@dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum on matrices, AdamW on every other parameter and on those named in `exclude`.

        b' = μb + (1−μ)g     u = NewtonSchulz((1−μ)g + μb')     θ' = θ·(1 − lr·wd) − 0.2·lr·√max(rows, columns)·u

    Momentum and scaling are torch.optim.Muon's with `nesterov` and `match_rms_adamw`, so one learning rate serves both
    halves. Newton–Schulz runs in the parameter's dtype (torch's casts to bfloat16), and the decay is differentiated.
    """

    lr: LearningRate
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    ns_steps: int = 5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-8
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_fraction(momentum=self.momentum)
        self._rest()

    def init(self, params: Params) -> Moments:
        matrices, rest = self._divide(params)
        return {"momentum": _zeros({name: params[name] for name in matrices}), **self._rest().init(_only(params, rest))}

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        matrices, rest = self._divide(params)
        lr, new, buffers = rate(self.lr, step), {}, {}
        for name in matrices:
            new[name], buffers[name] = self._matrix(lr, params[name], moments["momentum"][name], grads[name])
        others, other_moments = self._rest().update(_only(params, rest), _adam(moments), grads, step)
        return {name: (new | others)[name] for name in params}, {"momentum": buffers, **other_moments}

    def pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent
    ) -> tuple[Cotangent, Params]:
        matrices, rest = self._divide(params)
        lr, buffers = rate(self.lr, step), {}
        below = Cotangent(_only(cotangent.params, rest), _adam(cotangent.moments))
        others, gs = self._rest().pullback(_only(params, rest), _adam(moments), grads, step, below)
        thetas = dict(others.params)
        for name in matrices:
            given = (params[name], moments["momentum"][name], grads[name])
            bars = (cotangent.params[name], cotangent.moments["momentum"][name])
            thetas[name], buffers[name], gs[name] = autograd_pullback(
                lambda theta, b, g: self._matrix(lr, theta, b, g), given, bars
            )
        pulled = Cotangent({name: thetas[name] for name in params}, {"momentum": buffers, **others.moments})
        return pulled, {name: gs[name] for name in params}

    def _matrix(self, lr: float, theta: Tensor, buffer: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        buffer = torch.lerp(buffer, g, 1 - self.momentum)
        direction = torch.lerp(g, buffer, self.momentum) if self.nesterov else buffer
        scale = 0.2 * lr * math.sqrt(max(theta.shape))
        return theta * (1 - lr * self.weight_decay) - scale * newton_schulz(direction, self.ns_steps), buffer

    def _rest(self) -> AdamW:
        return AdamW(self.lr, self.beta1, self.beta2, self.eps, self.eps_root, self.weight_decay)

    def _divide(self, params: Params) -> tuple[list[str], list[str]]:
        matrices = [name for name, theta in params.items() if theta.ndim == 2 and name not in self.exclude]
        return matrices, [name for name in params if name not in matrices]


@dataclass(frozen=True)
class Pair:
    """Any (init, update) pair in the convention of optax and torchopt, differentiated by autograd.

    `update(grads, state, params=params) -> (updates, state)`, and θ' = θ + updates. It must be pure: torchopt's
    in-place default is switched off here.
    """

    pair: Any

    def init(self, params: Params) -> Moments:
        return self.pair.init(params)

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        inplace = {"inplace": False} if "inplace" in _parameters(self.pair.update) else {}
        updates, moments = self.pair.update(grads, moments, params=params, **inplace)
        return {name: theta + updates[name] for name, theta in params.items()}, moments

    def pullback(
        self, params: Params, moments: Moments, grads: Params, step: int, cotangent: Cotangent
    ) -> tuple[Cotangent, Params]:
        def update(params: Params, moments: Moments, grads: Params) -> tuple[Params, Moments]:
            return self.update(params, moments, grads, step)

        thetas, moment_bars, gs = autograd_pullback(update, (params, moments, grads), tuple(cotangent))
        return Cotangent(thetas, moment_bars), gs


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


def autograd_pullback(function: Callable[..., Any], inputs: tuple[Any, ...], bars: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cotangents of `inputs`, [K, *shape], from those of the outputs of `function`; one graph for all K.

    Integer tensors (a step count) have no slope: their cotangent is zero.
    """
    live = tree.map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, inputs)
    with torch.enable_grad():
        outputs = tree.leaves(function(*live))
    wanted = [x for x in tree.leaves(live) if x.requires_grad]
    pairs = [(out, bar) for out, bar in zip(outputs, tree.leaves(bars), strict=True) if out.requires_grad]
    queries = tree.leaves(bars)[0].shape[0]
    found = [
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [bar[k] for _, bar in pairs],
            retain_graph=k + 1 < queries,
            materialize_grads=True,
        )
        for k in range(queries)
    ]
    stacked = iter([torch.stack(group) for group in zip(*found)])

    def place(x: Tensor) -> Tensor:
        return next(stacked) if x.requires_grad else torch.zeros((queries, *x.shape), device=x.device)

    return tree.map(place, live)


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Approximate UVᵀ of matrix = USVᵀ, [R, C], by the quintic iteration of Muon."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    # the root of Σx² + tiny, not max(‖x‖, ε): a gradient of exactly 0 has to keep a finite slope
    x = x / torch.sqrt(torch.sum(x * x) + 1e-14)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def rate(lr: LearningRate, step: int) -> float:
    """The learning rate of a step."""
    return lr(step) if callable(lr) else lr


def _root(x: Tensor) -> Tensor:
    """√x with slope 0 at 0: both `where` are needed, or autograd multiplies 0 by the infinite slope."""
    if not (x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x)):
        return x.sqrt()
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _zeros(params: Params) -> Params:
    return {name: torch.zeros_like(theta) for name, theta in params.items()}


def _only(tensors: Params, names: list[str]) -> Params:
    return {name: tensors[name] for name in names}


def _adam(moments: Moments) -> Moments:
    return {"m": moments["m"], "v": moments["v"]}


def _parameters(function: Callable[..., Any]) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


def _check(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not callable(number) and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} is {number}; it has to be a finite number, 0 or more")


def _check_fraction(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise ValueError(f"{name} is {number}; it has to be at least 0 and below 1")
