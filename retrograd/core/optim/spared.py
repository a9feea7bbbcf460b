"""Weight decay that spares some parameters, norms and biases as a rule: an optimizer as two, by the parameter's name.

An optimizer with names in `spared` is itself without them on the other parameters, and itself without decay on those.
Its moments are the two halves' in one, so that a state looks as if there were one optimizer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from retrograd.core.optim.protocol import Cotangent, Moments, Params, Updated

__all__ = ["pullback", "preconditioner", "recovered", "update"]


def update(optimizer: Any, params: Params, moments: Moments, grads: Params, step: int) -> tuple[Params, Moments]:
    """As the optimizer's."""
    found = [
        half.update(_only(params, names), _each(moments, names), _only(grads, names), step)
        for half, names in _halves(optimizer, params)
    ]
    return _joined(params, [new for new, _ in found]), _all(params, [after for _, after in found])


def pullback(
    optimizer: Any, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
) -> Updated:
    """As the optimizer's; ∂φ/∂wd is that of the decay which is applied."""
    found = []
    for half, names in _halves(optimizer, params):
        bars = Cotangent(_only(cotangent.params, names), _each(cotangent.moments, names))
        given = None if grads is None else _only(grads, names)
        found.append(half.pullback(_only(params, names), _each(moments, names), given, step, bars))
    decayed, free = found
    thetas = _joined(params, [one.cotangent.params for one in found])
    moment_bars = _all(params, [one.cotangent.moments for one in found])
    recipe = {"lr": decayed.recipe["lr"] + free.recipe["lr"], "weight_decay": decayed.recipe["weight_decay"]}
    return Updated(Cotangent(thetas, moment_bars), _joined(params, [one.bars for one in found]), recipe, decayed.slope)


def recovered(optimizer: Any, params: Params, moments: Moments, after: Moments) -> Params | None:
    """As the optimizer's."""
    found = [
        half.recovered(_only(params, names), _each(moments, names), _each(after, names))
        for half, names in _halves(optimizer, params)
        if names
    ]
    return None if any(one is None for one in found) else _joined(params, found)


def preconditioner(optimizer: Any, params: Params, moments: Moments, grads: Params, step: int) -> Params:
    """As the optimizer's."""
    found = [
        half.preconditioner(_only(params, names), _each(moments, names), _only(grads, names), step)
        for half, names in _halves(optimizer, params)
    ]
    return _joined(params, found)


def _halves(optimizer: Any, params: Params) -> list[tuple[Any, list[str]]]:
    spared = set(optimizer.spared)
    return [
        (replace(optimizer, spared=()), [name for name in params if name not in spared]),
        (replace(optimizer, spared=(), weight_decay=0.0), [name for name in params if name in spared]),
    ]


def _only(tensors: Params, names: list[str]) -> Params:
    return {name: tensors[name] for name in names if name in tensors}


def _each(moments: Moments, names: list[str]) -> Moments:
    return {kind: _only(tensors, names) for kind, tensors in moments.items()}


def _joined(params: Params, parts: list[Params]) -> Params:
    """Two trees as one, in the parameters' order."""
    both = {name: x for part in parts for name, x in part.items()}
    return {name: both[name] for name in params if name in both}


def _all(params: Params, parts: list[Moments]) -> Moments:
    return {kind: _joined(params, [part[kind] for part in parts]) for kind in parts[0]}
