"""The update half of the first step, tried before the training: is it a function, and is its pullback the derivative?

    ⟨v, U*λ⟩ = d/dh ⟨U(s + hv), λ⟩                   at h = 0

by central differences in float64, for optimizers that are not retrograd's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import SGD, Adam, AdamW, Cotangent, Moments, Muon, Optimizer, Pair, Params
from retrograd.proofs.leaves import refuse_infinite, some, wide
from retrograd.proofs.slopes import Draws, Slopes

__all__ = ["prove_update"]

_OWN = (SGD, Adam, AdamW, Muon)  # their pullbacks are proved by tests


def prove_update(optimizer: Optimizer, params: Params, grads: Params) -> None:
    """Refuse an optimizer whose pullback is not the derivative of its update, or whose update is no function.

    Tried in float64 after two updates, at the gradient given, a thousandth and a thousand times of it: clipping shows
    at one of them.

    Raises:
        ValueError: By the names of the optimizer and of what its update is differentiated by.
    """
    if isinstance(optimizer, _OWN):
        return
    draw = Draws()
    params, grads = tree.map(wide, (params, grads))
    typical = float(tree.norm(grads)) / max(1, sum(g.numel() for g in grads.values())) ** 0.5
    if not 0 < typical < float("inf"):
        return  # the run itself says what is wrong with such a gradient
    for scale in (1.0, 1e3, 1e-3):
        near = {name: scale * (g + 0.1 * typical * draw.like(name, g)) for name, g in grads.items()}
        _compare_update(optimizer, params, near, draw)


def _compare_update(optimizer: Optimizer, params: Params, grads: Params, draw: Draws) -> None:
    params, moments, varying = _after_two(optimizer, params, grads, draw)
    _pure_update(optimizer, params, moments, grads)
    new, after = optimizer.update(params, moments, grads, 2)
    bars = tree.map(lambda x: draw.like("", x) if x.is_floating_point() else x.new_zeros(x.shape), (new, after))
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
        refuse_infinite(f"the pullback of {_title(optimizer)} to its {what}", slopes)

        def value(moved: Params, what: str = what) -> float:
            given = {"parameters": params, "gradient": grads, "moments": moments}
            given[what] = moved if what != "moments" else _placed(moments, {**flat, **moved})
            out = optimizer.update(given["parameters"], given["moments"], given["gradient"], 2)
            # from the unmoved outcome: a small change of large parameters would round away
            return float(tree.dot(tree.map(torch.sub, *_floating(out, (new, after))), _floating(bars, bars)[0]))

        probe = Slopes(value, point, slopes, draw)
        # in proportion to each entry: an update is smooth there even where it divides by √v
        along = {name: x * draw.like(name, x) for name, x in point.items()}
        compared = probe.along(along)
        if not compared.agrees:
            raise ValueError(
                f"the derivative of {_title(optimizer)}'s update by its {what} is {compared.measured:.6g} by "
                f"differences and {compared.pulled:.6g} by its pullback (at {some(probe.leaves(along))}): scores would "
                "be wrong by as much. Something in it hides from autograd what it does, such as "
                "torchopt.clip_grad_norm or use_accelerated_op; clip with max_grad_norm instead, or take an optimizer "
                "from retrograd.optim"
            )


def _after_two(optimizer: Optimizer, params: Params, grads: Params, draw: Draws) -> tuple[Params, Moments, list[str]]:
    """Parameters and moments after two updates, and which moments depend on the gradient (a step count does not)."""
    ends = []
    for _ in range(2):
        now, moments = params, optimizer.init(params)
        for t in range(2):
            moved = {name: g * (1 + 0.3 * draw.like(name, g)) for name, g in grads.items()}
            now, moments = optimizer.update(now, moments, moved, t)
            now, moments = tree.map(torch.detach, (now, moments))
        ends.append((now, moments))
    first, second = (_numbered(moments) for _, moments in ends)
    varying = [name for name, x in first.items() if x.is_floating_point() and not torch.equal(x, second[name])]
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
    return [[x for x in tree.leaves(nested) if x.is_floating_point()] for nested in trees]


def _numbered(moments: Moments) -> Params:
    return {f"moment {place}": x for place, x in enumerate(tree.leaves(moments))}


def _placed(moments: Moments, flat: Params) -> Moments:
    given = iter(flat.values())
    return tree.map(lambda _: next(given), moments)


def _title(optimizer: Optimizer) -> str:
    named = optimizer.pair if isinstance(optimizer, Pair) else optimizer
    return f"the optimizer {type(named).__module__.split('.')[0]}.{type(named).__name__}"
