"""A latent attack: the small change of hidden states that brings back most of what is to be forgotten.

    δ_{k+1} = δ_k − (size/steps)·‖h‖·g/‖g‖        g = ∂/∂δ_k Σ CE of the forget rows, δ_0 = 0

for the outputs h of the embedding and of every block that is looked at, at each position by itself, so that rows do not
depend on each other. An objective that is computed under δ holds where somebody searches for what is left.

δ is found by steps of its own at the current parameters and is then a constant: the gradient of the objective at fixed
δ is what training descends, and its derivative is not that of the update. So nothing is pulled back through it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrograd.core.optim import Params
from retrograd.data.pairs import FORGET
from retrograd.lm.outputs import Outputs, decoder_blocks, recorded, replaced
from retrograd.lm.spans import inner

__all__ = ["LatentAttack"]

_TINY = 1e-30  # below every gradient that is one


@dataclass(frozen=True)
class LatentAttack:
    """steps: of the search; size: of δ at most, as a share of the norm of the state at its position."""

    steps: int
    size: float

    def __call__(self, outputs: Callable[..., Outputs], params: Params, inputs: Any, module: nn.Module) -> Outputs:
        """What the model gives under the attack, differentiable in the parameters at fixed δ.

        Args:
            outputs: (params, inputs) → logits and states, from `outputs_of`; the states say which blocks are attacked.
        """
        fixed = {name: theta.detach() for name, theta in params.items()}
        places = [inner(module).get_input_embeddings(), *decoder_blocks(module)]
        with torch.no_grad(), recorded(dict(enumerate(places))) as seen:
            looked = outputs(fixed, inputs).states
        sites = {0: places[0], **{block + 1: places[block + 1] for block in looked}}
        lengths = {
            site: [(self.size / self.steps) * h.norm(dim=-1, keepdim=True) for h in seen[site]] for site in sites
        }
        change = {site: [torch.zeros_like(h) for h in seen[site]] for site in sites}
        for _ in range(self.steps):
            flat = [part.requires_grad_() for parts in change.values() for part in parts]
            with torch.enable_grad():
                loss = _forget_loss(_under(outputs, fixed, inputs, sites, change), inputs)
                slopes = iter(torch.autograd.grad(loss, flat, allow_unused=True))
            for site, parts in change.items():
                moved = [part.detach() if g is None else part.detach() - length * _direction(g)
                         for part, length, g in zip(parts, lengths[site], slopes)]  # fmt: skip
                change[site] = moved
        return _under(outputs, params, inputs, sites, change)


def _under(
    outputs: Callable[..., Outputs], params: Params, inputs: Any, sites: dict[int, nn.Module],
    change: dict[int, list[Tensor]],
) -> Outputs:  # fmt: skip
    with ExitStack() as stack:
        for site, module in sites.items():
            stack.enter_context(replaced(module, _adding(change[site])))
        return outputs(params, inputs)


def _adding(parts: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Adds a part to each call's output, in their order."""
    calls = itertools.count()
    return lambda h: h + parts[next(calls)]


def _direction(g: Tensor) -> Tensor:
    """g/‖g‖ along the last dimension, and 0 where g is."""
    return g / g.norm(dim=-1, keepdim=True).clamp_min(_TINY)


def _forget_loss(out: Outputs, inputs: Any) -> Tensor:
    """Σ CE of the forget rows: what the attack lowers, whatever the rows weigh."""
    assert out.logits is not None, "an attacked objective asks for logits"
    forget = inputs["side"][out.rows] == FORGET
    return F.cross_entropy(out.logits[forget], out.targets[forget], reduction="sum")
