"""What is pulled back through a run of a `Trainer`: a query's gradient, or what another sweep has come to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Cotangent, Moments, Params
from retrograd.core.step import State

__all__ = ["BackwardState", "Evaluation", "Given", "cotangent_of"]


class Evaluation(NamedTuple):
    """A query at some state: value [] or [K] in nats, and its gradient, tensors [K, *shape]."""

    value: Tensor
    gradient: Params


class BackwardState(NamedTuple):
    """What is pulled back through a run: derivatives of the query φ with respect to the state it has reached.

    Several queries have a leading [K] everywhere. `Trainer.backward` takes one at the end of a run and gives one at its
    start, which is the one at the end of what was trained before.

    Args:
        param_grads: ∂φ/∂θ, by parameter.
        opt_grads: ∂φ/∂(moments), of their structure, or a list with one tensor for each floating one; None for zero.
        weight_grads: The scores ∂φ/∂w, of the shape of the stream's weights. Negative: a proponent, training on it
            lowers the query loss. Positive: a detractor. A sweep adds to those it is given; None for none.
        value: φ in nats, if it is known.
    """

    param_grads: Params
    opt_grads: Moments
    weight_grads: Tensor | None
    value: Tensor | None = None


class Given(NamedTuple):
    """A query as the sweep takes it: gradient and moments [K, *shape]; `single` for one without K."""

    gradient: Params
    moments: Moments
    scores: Tensor | None
    value: Tensor | None
    single: bool

    def answered(self, cotangent: Cotangent, scores: Tensor) -> BackwardState:
        if self.single:
            cotangent, scores = tree.map(lambda x: x[0], cotangent), scores[0]
        return BackwardState(*cotangent, scores if self.scores is None else self.scores + scores, self.value)


def cotangent_of(query: Evaluation | BackwardState, like: State, weights: Tensor) -> Given:
    """What is to be pulled back, checked against a state and the data weights."""
    before = None
    if isinstance(query, Evaluation):
        single, gradient, moments = query.value.ndim == 0, query.gradient, None
    else:
        single, gradient, moments, before = False, query.param_grads, query.opt_grads, query.weight_grads
    _same_names(gradient, like.params)
    if isinstance(query, BackwardState):
        name, theta = next(iter(like.params.items()))
        single = gradient[name].ndim == theta.ndim
        gradient = {name: gradient[name][None] for name in gradient} if single else gradient
        moments = _moments(moments, like, len(gradient[name]), single)
    queries = len(next(iter(gradient.values())))
    for name, theta in like.params.items():
        _same_shape(f"the gradient of {name}", gradient[name], (queries, *theta.shape))
    if before is not None:
        _same_shape("weight_grads", before, tuple(weights.shape) if single else (queries, *weights.shape))
    return Given(gradient, moments, before, query.value, single)


def _moments(given: Any, like: State, queries: int, single: bool) -> Moments:
    """∂φ/∂(moments) of the moments' structure, [K, *shape]: from a tree of it, or a list of the floating ones'."""
    if given is None:
        return None
    wanted, bars = tree.leaves(like.moments), tree.leaves(given)
    floating = [leaf for leaf in wanted if leaf.is_floating_point()]
    if len(bars) not in (len(wanted), len(floating)):
        raise ValueError(f"opt_grads has {len(bars)} tensors; this optimizer's moments have {len(floating)}")
    left = iter(bars)

    def place(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() and len(bars) < len(wanted):
            return torch.zeros((), device=leaf.device).expand(queries, *leaf.shape)
        bar = next(left)[None] if single else next(left)
        return _same_shape("a tensor of opt_grads", bar, (queries, *leaf.shape))

    return tree.map(place, like.moments)


def _same_names(gradient: Params, params: Params) -> None:
    if gradient.keys() != params.keys():
        missing, unknown = sorted(params.keys() - gradient.keys()), sorted(gradient.keys() - params.keys())
        raise ValueError(
            f"the query's gradient is not of this model's trainable parameters: missing {missing[:3]}, unknown "
            f"{unknown[:3]}; tied parameters are one, under the name that the state's params have"
        )


def _same_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}; for this run it has to be {shape}")
    return tensor
