"""How much of each document a model knows by heart, and what membership inference looks at.

With y_1 … y_n the valid targets of a document, predicted from the true tokens before them, and ℓ_k = −log p(y_k):

    right         (1/n) Σ_k [argmax p = y_k]                        exact memorisation
    extraction    1 − (1/n)·min{k: every target after the first k is the argmax}          extraction strength
    nats          (1/n) Σ_k ℓ_k
    bytes         of the document's text, compressed by zlib
    min_k         mean of the largest fifth of ℓ_k                                          Min-K %
    min_k_plus    mean of the largest fifth of (ℓ_k − mean ℓ)/sd ℓ, both over p             Min-K %++

Sources: Tirumala et al. 2205.10770 and Carlini et al. 2202.07646 as open-unlearning has them; extraction strength of
Wang et al. 2406.09179 (0 where not even the last target is found); Carlini et al. 2012.07805 (zlib); Shi et al.
2310.16789 (Min-K %); Zhang et al. 2404.02936 (Min-K %++).
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.data.rows import Rows, pad
from retrograd.lm.model import CausalLM, evaluating
from retrograd.lm.outputs import outputs_of

__all__ = ["Memory", "by_heart", "extraction", "largest"]

SHARE = 0.2  # of the targets: Min-K %


class Memory(NamedTuple):
    """By document, [n] each; see above. documents: places in the data set."""

    nats: list[float]
    targets: list[int]
    right: list[float]
    extraction: list[float]
    min_k: list[float]
    min_k_plus: list[float]
    bytes: list[int]
    documents: list[int]


@torch.no_grad()
def by_heart(lm: CausalLM, params: Params, rows: Rows, tokenizer: Any) -> Memory:
    """What a model knows of each row, read one by one."""
    outputs, device = outputs_of(lm), next(iter(params.values())).device
    memory = Memory([], [], [], [], [], [], [], [int(row[-1]) for row in rows.doc_ids])
    with evaluating(lm.module):
        for row, ids in enumerate(rows.input_ids):
            out = outputs(params, {name: value.to(device) for name, value in pad(rows, [row]).items()})
            assert out.logits is not None, "they were asked for"
            logp = out.logits.double().log_softmax(-1)
            loss, hit = -logp.gather(1, out.targets[:, None])[:, 0], logp.argmax(-1) == out.targets
            mean = -(logp.exp() * logp).sum(-1)
            spread = ((logp.exp() * logp.square()).sum(-1) - mean.square()).clamp_min(0).sqrt()
            memory.nats.append(float(loss.mean()))
            memory.targets.append(len(loss))
            memory.right.append(float(hit.double().mean()))
            memory.extraction.append(extraction(hit) if bool(torch.isfinite(loss).all()) else math.nan)
            memory.min_k.append(largest(loss))
            memory.min_k_plus.append(largest((loss - mean) / spread.clamp_min(1e-12)))
            memory.bytes.append(len(zlib.compress(tokenizer.decode(ids).encode())))
    return memory


def extraction(hit: Tensor) -> float:
    """Extraction strength of one document.

    Args:
        hit: Whether the likeliest token is the target, [n] bool.

    >>> extraction(torch.tensor([False, True, False, True, True]))
    0.4
    """
    wrong = (~hit).nonzero()
    needed = int(wrong[-1]) + 1 if len(wrong) else 0
    return (len(hit) - needed) / len(hit)


def largest(values: Tensor) -> float:
    """Mean of the largest fifth of [n] values, at least one.

    >>> largest(torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0]))
    5.0
    """
    return float(values.topk(max(1, int(SHARE * len(values)))).values.mean())
