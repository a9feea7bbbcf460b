"""Optimizers as (init, update) pairs with their pullbacks.

    update    (θ, m, g, t) → (θ', m')
    pullback  ((θ, m, g, t), λ = (λ_θ', λ_m')) → (θ̄, m̄), ḡ = (∂(θ', m')/∂(θ, m, g))ᵀ λ

Each optimizer is a frozen record of its hyperparameters, so a recipe that holds it can be compared and hashed; all that
evolves is in the moments. `update` is made of plain differentiable operations and never writes in place; `pullback` is
closed-form for SGD and AdamW and takes cotangents with a leading query axis [K, *shape]. The same cotangents give the
derivatives of the query with respect to the recipe's own numbers:

    ∂φ/∂lr_t = ⟨λ_θ', ∂θ'/∂lr_t⟩          ∂φ/∂wd = Σ_t ⟨λ_θ', ∂θ'/∂wd⟩

Sources: torch.optim.SGD; Loshchilov & Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from retrograd.core import rooms

__all__ = [
    "ELEMENTWISE",
    "SGD",
    "AdamW",
    "Cotangent",
    "LearningRate",
    "Moments",
    "Optimizer",
    "Params",
    "Updated",
    "clip",
    "clip_pullback",
    "rate",
]

_PIECE = 1 << 18  # entries; measured flat between 2¹⁷ and 2¹⁸, where whole leaves take 3 to 4 times as long
_JOINED = {"cuda"}  # devices whose small leaves are joined,
_BUCKET = 1 << 22  # up to this many entries; not measured

_LONGEST = 0.99  # decay of an average out of which a gradient comes with 100 times the dtype's rounding

Params = dict[str, Tensor]
Moments = Any
_Room = Tensor | None
LearningRate = float | Callable[[int], float]


class Cotangent(NamedTuple):
    """λ: what the sweep carries. Every tensor has a leading query axis [K, *shape]."""

    params: Params
    moments: Moments


class Updated(NamedTuple):
    """An update's pullback: the cotangents of (params, moments) and of the gradient, [K, *shape] each.

    recipe: this step's ∂φ/∂lr and share of ∂φ/∂weight_decay, [K] float64 each; empty where the optimizer does not know
        its own learning rate.
    slope: where no gradient was given, what ∂φ/∂lr lacks is slope·⟨ḡ, g⟩.
    """

    cotangent: Cotangent
    bars: Params
    recipe: dict[str, Tensor]
    slope: float = 0.0


@runtime_checkable
class Optimizer(Protocol):
    """What a step needs of an optimizer."""

    def init(self, params: Params) -> Moments:
        """The moments before step 0."""

    def update(self, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
        """One update, as plain differentiable operations."""

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        """The cotangents of what an update depends on; the gradient may be None where it is not needed."""

    def needs_gradient(self, step: int) -> bool:
        """Whether the pullback of a step does."""

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
        lr, mu = rate(self.lr, step), self.momentum

        def plain(theta: Tensor, g: Tensor, new: _Room) -> tuple[Tensor, ...]:
            return (torch.sub(theta, self._decayed(g, theta), alpha=lr, out=new),)

        def heavy(theta: Tensor, g: Tensor, buffer: Tensor, new: _Room, new_buffer: _Room) -> tuple[Tensor, ...]:
            g = self._decayed(g, theta)
            buffer = torch.add(g, buffer, alpha=mu, out=new_buffer)
            move = torch.add(g, buffer, alpha=mu) if self.nesterov else buffer
            return torch.sub(theta, move, alpha=lr, out=new), buffer

        if not mu:
            return _elementwise(plain, (params, grads), (), (params,))[0], {}
        like = (params, moments["momentum"])
        new, buffers = _elementwise(heavy, (params, grads, moments["momentum"]), (), like)
        return new, {"momentum": buffers}

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        lr, mu, decay = rate(self.lr, step), self.momentum, self.weight_decay

        def plain(theta_bar: Tensor, g_room: _Room) -> tuple[Tensor, ...]:
            return (torch.mul(theta_bar, -lr, out=g_room),)

        def heavy(theta_bar: Tensor, buffer_bar: Tensor, g_room: _Room, buffer_room: _Room) -> tuple[Tensor, ...]:
            g_bar = torch.sub(buffer_bar, theta_bar, alpha=mu * lr if self.nesterov else lr, out=g_room)
            buffer_bar = torch.mul(g_bar, mu, out=buffer_room)
            return torch.sub(g_bar, theta_bar, alpha=lr, out=g_room) if self.nesterov else g_bar, buffer_bar

        bars = cotangent.params
        given = (bars, cotangent.moments["momentum"]) if mu else (bars,)
        gs, *buffers = _elementwise(heavy if mu else plain, (), given, given)
        thetas = {name: torch.add(bars[name], g_bar, alpha=decay) for name, g_bar in gs.items()} if decay else bars
        pulled = Cotangent(thetas, {"momentum": buffers[0]} if mu else {})
        slope = decay * inner(bars, params)  # of θ' along −lr: of g + wd·θ, and of the moments
        if grads is not None:
            slope = slope + inner(bars, grads)
        if mu:
            slope = slope * (1 + mu if self.nesterov else 1)
            slope = slope + inner(bars, moments["momentum"]) * (mu * mu if self.nesterov else mu)
        found = Updated(pulled, gs, {"lr": -slope, "weight_decay": inner(gs, params)})
        if grads is None:  # ḡ = −lr·λ, so that −⟨λ, g⟩ = ⟨ḡ, g⟩/lr
            assert not self.needs_gradient(step), "a gradient is left out only where it is not needed"
            return found._replace(slope=1 / lr)
        return found

    def _decayed(self, g: Tensor, theta: Tensor) -> Tensor:
        return torch.add(g, theta, alpha=self.weight_decay) if self.weight_decay else g

    def needs_gradient(self, step: int) -> bool:
        return self.momentum > 0 or rate(self.lr, step) == 0

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

        def updated(
            theta: Tensor, m: Tensor, v: Tensor, g: Tensor, new: _Room, new_m: _Room, new_v: _Room
        ) -> tuple[Tensor, ...]:
            m = torch.lerp(m, g, 1 - self.beta1, out=new_m)
            v = torch.addcmul(torch.mul(v, self.beta2, out=new_v), g, g, value=1 - self.beta2, out=new_v)
            scale = _root(v / correction2 + self.eps_root if self.eps_root else v / correction2) + self.eps
            decayed = theta * (1 - lr * self.weight_decay) if self.weight_decay else theta
            return torch.addcdiv(decayed, m, scale, value=-lr / correction1, out=new), m, v

        like = (params, moments["m"], moments["v"])
        new, ms, vs = _elementwise(updated, (*like, grads), (), like)
        return new, {"m": ms, "v": vs}

    def pullback(
        self, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
    ) -> Updated:
        assert grads is not None, "AdamW is not linear in the gradient"
        lr, correction1, correction2 = self._rates(step)
        moved: list[Tensor] = []

        def pulled(
            m: Tensor, v: Tensor, g: Tensor, theta_bar: Tensor, m_bar: Tensor, v_bar: Tensor,
            g_room: _Room, m_room: _Room, v_room: _Room,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            inverse, direction, slope = self._slopes(m, v, g, step)
            moved.append(torch.mv(theta_bar.reshape(len(theta_bar), -1), direction.flatten()).double())
            m_bar = torch.addcmul(m_bar, inverse, theta_bar, value=-lr / correction1, out=m_room)
            v_bar = torch.addcmul(v_bar, slope, theta_bar, value=0.5 * lr / (correction1 * correction2), out=v_room)
            share = torch.mul(m_bar, 1 - self.beta1, out=g_room)
            g_bar = torch.addcmul(share, g, v_bar, value=2 * (1 - self.beta2), out=g_room)
            return g_bar, m_bar.mul_(self.beta1), v_bar.mul_(self.beta2)

        bars = (cotangent.params, cotangent.moments["m"], cotangent.moments["v"])
        gs, ms, vs = _elementwise(pulled, (moments["m"], moments["v"], grads), bars, bars)
        kept = 1 - lr * self.weight_decay
        thetas = {name: bar * kept if self.weight_decay else bar for name, bar in cotangent.params.items()}
        decayed = inner(cotangent.params, params)
        slope = -sum(moved, start=torch.zeros_like(decayed)) / correction1
        recipe = {"lr": slope - self.weight_decay * decayed, "weight_decay": -lr * decayed}
        return Updated(Cotangent(thetas, {"m": ms, "v": vs}), gs, recipe)

    def needs_gradient(self, step: int) -> bool:
        return True

    def recovered(self, params: Params, moments: Moments, after: Moments) -> Params | None:
        if not _holds(after["m"], self.beta1):
            return None
        factor = 1 / (1 - self.beta1)
        return {
            name: torch.lerp(m, after["m"][name], factor, out=rooms.empty_like(m)) for name, m in moments["m"].items()
        }

    def preconditioner(self, moments: Moments, grads: Params, step: int) -> Params:
        return {n: self._rooted(v, grads[n], step).add_(self.eps).reciprocal_() for n, v in moments["v"].items()}

    def _rooted(self, v: Tensor, g: Tensor, step: int) -> Tensor:
        """√(v̂ + ε_root)."""
        correction2 = self._rates(step)[2]
        square = (v * (self.beta2 / correction2)).addcmul_(g, g, value=(1 - self.beta2) / correction2)
        return square.add_(self.eps_root).sqrt_()

    def _rates(self, step: int) -> tuple[float, float, float]:
        return rate(self.lr, step), 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)

    def _slopes(self, m: Tensor, v: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """1/scale, m'/scale and m'/(scale²·root), elementwise; shared by all queries.

        With θ' = θ − (lr/c₁)·m'/scale, scale = root + ε and root = √(v'/c₂ + ε_root), they are ∂θ'/∂m', ∂θ'/∂lr and
        ∂θ'/∂v' up to the factors −lr/c₁, −1/c₁ and lr/(2c₁c₂).
        """
        root = self._rooted(v, g, step)
        inverse = torch.add(root, self.eps).reciprocal_()
        direction = torch.lerp(m, g, 1 - self.beta1).mul_(inverse)
        slope = torch.mul(direction, inverse).div_(root)
        if self.eps_root == 0:
            slope.masked_fill_(root == 0, 0.0)
        return inverse, direction, slope


ELEMENTWISE = (SGD, AdamW)
"""Optimizers whose update is elementwise: little work, and the same bits wherever its inputs lie."""


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
    inner = sum(
        (bars[name].reshape(len(bars[name]), -1) @ g.flatten() for name, g in grads.items()), start=torch.zeros(())
    )
    slope = -inner * scale / (total + 1e-6) / total  # [K]
    return {n: bars[n] * scale + slope.view(-1, *[1] * grads[n].ndim) * grads[n] for n in grads}


def inner(cotangent: Params, direction: Params) -> Tensor:
    """⟨λ_k, direction⟩ for each query, [K] float64."""
    parts = (torch.mv(bar.reshape(len(bar), -1), direction[name].flatten()).double() for name, bar in cotangent.items())
    return sum(parts, start=torch.zeros((), dtype=torch.float64))


def rate(lr: LearningRate, step: int) -> float:
    """The learning rate of a step."""
    return lr(step) if callable(lr) else lr


def _elementwise(
    function: Callable[..., tuple[Tensor, ...]], trees: Sequence[Params], bars: Sequence[Params], like: Sequence[Params]
) -> list[Params]:
    """An elementwise function of leaves [*shape] and their cotangents [K, *shape], on pieces of a convenient size.

    On a CPU large leaves are cut, so that temporaries stay in cache. On an accelerator small ones are joined, for a
    launch takes longer than their work.

    Args:
        function: Its arguments are followed by the room for each result, or None where it makes its own.
        like: What each result is like.
    """
    found: list[Params] = [{} for _ in like]
    queries = max((len(bar) for tree in bars for bar in tree.values()), default=1)
    for names in _groups([*trees, *bars]):
        leaves, wide = ([[tree[name] for name in names] for tree in given] for given in (trees, bars))
        if len(names) == 1:
            single = ([x[0] for x in leaves], [x[0] for x in wide], [x[names[0]] for x in like])
            parts = [[out] for out in _in_pieces(function, *single, queries)]
        else:
            joined = [torch.cat([x.flatten() for x in each]) for each in leaves]
            joined += [torch.cat([x.reshape(queries, -1) for x in each], 1) for each in wide]
            outs = function(*joined, *[None] * len(like))
            sizes = [x.numel() for x in leaves[0]] if leaves else [x[0].numel() for x in wide[0]]
            parts = [list(out.split(sizes, -1)) for out in outs]
        for tree, each, pattern in zip(found, parts, like, strict=True):
            tree.update({name: x.view(pattern[name].shape) for name, x in zip(names, each, strict=True)})
    return found


def _groups(trees: Sequence[Params]) -> list[list[str]]:
    """The leaves' names in order; those together that are worked on at once.

    A leaf that would leave the next one unaligned stays alone: states read back are aligned, and bits depend on it.
    """
    groups, filled, before = list[list[str]](), 0, None
    for name, leaf in trees[0].items():
        odd = leaf.numel() * leaf.element_size() % 64 != 0
        alone = odd or leaf.device.type not in _JOINED or any(_traced(tree[name]) for tree in trees)
        kind = None if alone else [(tree[name].dtype, tree[name].device) for tree in trees]
        filled += leaf.numel()
        if kind is None or kind != before or filled > _BUCKET:
            groups.append([])
            filled, before = leaf.numel(), kind
        groups[-1].append(name)
    return groups


def _in_pieces(
    function: Callable[..., tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    bars: Sequence[Tensor],
    like: Sequence[Tensor],
    queries: int,
) -> tuple[Tensor, ...]:
    size = leaves[0].numel() if leaves else bars[0][0].numel()
    piece = max(1, _PIECE // queries)
    if size <= piece or any(x.device.type != "cpu" or _traced(x) for x in (*leaves, *bars)):
        return function(*leaves, *bars, *[None] * len(like))
    outs = tuple(rooms.empty_like(x) for x in like)
    flat = [x.reshape(-1) for x in leaves]
    wide = [x.reshape(queries, -1) if bars else x.reshape(-1) for x in (*bars, *outs)]
    for start in range(0, size, piece):
        function(*(x[..., start : start + piece] for x in (*flat, *wide)))
    return outs


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
    """Zeros of the parameters' shapes, which take no room: the initial state is held as long as the run."""
    return {name: theta.new_zeros(()).expand(theta.shape) for name, theta in params.items()}


def _check(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not callable(number) and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} is {number}; it has to be a finite number, 0 or more")


def check_fraction(**numbers: float) -> None:
    """Refuse a number outside [0, 1), by its name."""
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise ValueError(f"{name} is {number}; it has to be at least 0 and below 1")
