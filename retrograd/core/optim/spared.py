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
    updated = [
        half.update(_only(params, names), _each(moments, names), _only(grads, names), step)
        for half, names in _halves(optimizer, params)
    ]
    return _joined(params, [new for new, _ in updated]), _all(params, [after for _, after in updated])


def pullback(
    optimizer: Any, params: Params, moments: Moments, grads: Params | None, step: int, cotangent: Cotangent
) -> Updated:
    """As the optimizer's; ∂φ/∂wd is that of the decay which is applied."""
    pulled = []
    for half, names in _halves(optimizer, params):
        bars = Cotangent(_only(cotangent.params, names), _each(cotangent.moments, names))
        given = None if grads is None else _only(grads, names)
        pulled.append(half.pullback(_only(params, names), _each(moments, names), given, step, bars))
    decayed, free = pulled
    thetas = _joined(params, [part.cotangent.params for part in pulled])
    moment_bars = _all(params, [part.cotangent.moments for part in pulled])
    recipe = {"lr": decayed.recipe["lr"] + free.recipe["lr"], "weight_decay": decayed.recipe["weight_decay"]}
    return Updated(
        Cotangent(thetas, moment_bars), _joined(params, [part.bars for part in pulled]), recipe, decayed.slope
    )


def recovered(optimizer: Any, params: Params, moments: Moments, after: Moments) -> Params | None:
    """As the optimizer's."""
    grads = [
        half.recovered(_only(params, names), _each(moments, names), _each(after, names))
        for half, names in _halves(optimizer, params)
        if names
    ]
    return None if any(part is None for part in grads) else _joined(params, grads)


def preconditioner(optimizer: Any, params: Params, moments: Moments, grads: Params, step: int) -> Params:
    """As the optimizer's."""
    metrics = [
        half.preconditioner(_only(params, names), _each(moments, names), _only(grads, names), step)
        for half, names in _halves(optimizer, params)
    ]
    return _joined(params, metrics)


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
