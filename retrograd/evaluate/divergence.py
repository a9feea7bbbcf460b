"""How far a model's predictions are from another's on held-out rows.

KL = Σ over targets of KL(p_other ‖ p) / targets, nats per token; each document's part is kept, for intervals
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from retrograd.data.rows import Rows, pad
from retrograd.lm.model import CausalLM
from retrograd.lm.outputs import Outputs, outputs_of
from retrograd.lm.spans import text_config

__all__ = ["Divergence", "divergence"]


class Divergence(NamedTuple):
    """KL from the other model, summed over the targets of each document, nats [n]; and its targets, [n]."""

    nats: list[float]
    targets: list[int]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return sum(self.nats) / sum(self.targets)


def divergence(lm: CausalLM, base: CausalLM, rows: Rows, batch_size: int = 16) -> Divergence:
    """KL(p_base ‖ p) summed over each row's targets.

    Args:
        lm, base: Of one vocabulary.
    Raises:
        ValueError: If they are not.
    """
    own, other = (text_config(model.module).vocab_size for model in (lm, base))
    if own != other:  # before the one reads ids of the other
        raise ValueError(
            f"the model has a vocabulary of {own} tokens and the one it is compared with one of {other}: a divergence "
            "needs two models of one vocabulary"
        )
    now, then = outputs_of(lm), outputs_of(base)
    device = next(iter(lm.params.values())).device
    totals, targets = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            index = range(start, min(start + batch_size, len(rows)))
            inputs = {name: value.to(device) for name, value in pad(rows, index).items()}
            here, there = now(lm.params, inputs), then(base.params, inputs)
            p, q = _log_softmax(there), _log_softmax(here)
            row_of = start + here.rows.cpu()
            totals.index_add_(0, row_of, torch.sum(p.exp() * (p - q), -1).cpu())
            targets.index_add_(0, row_of, torch.ones_like(row_of))
    return Divergence(totals.tolist(), targets.tolist())


def _log_softmax(outputs: Outputs) -> torch.Tensor:
    assert outputs.logits is not None, "they were asked for"
    return outputs.logits.double().log_softmax(-1)
