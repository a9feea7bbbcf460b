"""Masks of tokens that need no scores: the words of a list, and the tokens where a model's state is like at them.

keywords     [the token is part of a keyword]
activation   [cos(h_l, mean of h_l over the keywords' tokens) ≥ threshold]       h_l: output of block l at the token
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrograd.data.rows import Rows
from retrograd.lm.model import CausalLM, causal_logits
from retrograd.lm.outputs import decoder_blocks, recorded
from retrograd.select.places import Places

__all__ = ["activation_tokens"]


@torch.no_grad()
def activation_tokens(lm: CausalLM, rows: Rows, places: Places, hits: Tensor, depth: float, threshold: float) -> Tensor:
    """1 for each real token at which the state is like at the hits, else 0, [n].

    Args:
        hits: 1 for each real token that is part of a keyword, [n].
        depth: Of the block, as a share.
    Raises:
        ValueError: If the depth is no share, or no token is like that.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it is a share of the depth: 0 is the first block, 1 the last")
    states = _states(lm, rows, places, depth)
    mean = states[hits > 0].mean(0)
    alike = (torch.nn.functional.cosine_similarity(states, mean[None], dim=-1) >= threshold).double()
    if not alike.any():
        raise ValueError(
            f"no token's state has a cosine of {threshold} with the mean state of {int(hits.sum())} keyword tokens: "
            "lower the threshold, or take another depth"
        )
    return alike


def _states(lm: CausalLM, rows: Rows, places: Places, depth: float) -> Tensor:
    """h_l at each real token itself, [n, D] float32."""
    layers = decoder_blocks(lm.module)
    block = layers[int(depth * (len(layers) - 1) + 0.5)]
    logits, device = causal_logits(lm), next(iter(lm.params.values())).device
    parts = []
    for number, ids in enumerate(rows.input_ids):
        row = torch.from_numpy(ids)[None].to(device)
        last = torch.tensor([row.shape[1] - 1], device=device)
        with recorded({0: block}) as seen:
            logits(lm.params, row, torch.zeros_like(last), last)
        parts.append(seen[0][0][0, places.column[places.row == number].to(device)].float().cpu())
    return torch.cat(parts)
