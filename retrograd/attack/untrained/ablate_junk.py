"""Ablation of junk directions: what the model puts into its hidden states on forget texts and not on others.

Methods that steer activations add one large direction on forget texts. The attacker finds it by the mean difference
of the embedding stream on forget and benign texts and takes it out of every matrix that writes there. The next
direction is found among what is left. Source of the attack on RMU: Arditi & Chughtai, Unlearning via RMU is mostly
shallow (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrograd.attack.untrained.contract import Altered, Given, Untraining
from retrograd.core.optim import Params
from retrograd.data.rows import Rows, pad
from retrograd.lm.model import CausalLM, bound_model

__all__ = ["UNTRAINING"]

_ROWS = 64  # of each side


def _alter(given: Given, strength: float) -> Altered:
    params = dict(given.lm.params)
    for _ in range(int(strength)):
        forget, benign = (_mean_state(given.lm, params, given.rows[key]) for key in ("forget", "benign"))
        direction = forget - benign
        unit = direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
        for name, leaf in _writers(given.lm, params).items():
            # rows of a Linear's weight are its outputs
            whole = leaf.double()
            params[name] = (whole - unit[:, None] * (unit @ whole)).to(leaf.dtype)
    return Altered(params)


def _writers(lm: CausalLM, params: Params) -> dict[str, Tensor]:
    """Matrices inside the blocks whose outputs are of the hidden size and whose inputs are not the vocabulary."""
    width = lm.module.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
    ends = [m for m in (lm.module.get_input_embeddings(), lm.module.get_output_embeddings()) if m is not None]  # type: ignore[operator]
    vocabulary = {end.weight.untyped_storage().data_ptr() for end in ends}
    own = {name: leaf for name, leaf in lm.params.items() if leaf.untyped_storage().data_ptr() not in vocabulary}
    return {name: params[name] for name, leaf in own.items() if leaf.ndim == 2 and leaf.shape[0] == width}


def _mean_state(lm: CausalLM, params: Params, rows: Rows) -> Tensor:
    """Mean over real tokens of the hidden state before the last block, [width] float64."""
    batch = pad(rows, list(range(min(_ROWS, len(rows)))))
    device = next(iter(params.values())).device
    real = torch.arange(batch["input_ids"].shape[1]) < batch["lengths"][:, None]
    with torch.no_grad():
        out = bound_model(lm.module)(params)(
            input_ids=batch["input_ids"].to(device), attention_mask=real.long().to(device), output_hidden_states=True,
            use_cache=False,
        )  # fmt: skip
    return out.hidden_states[-2][real.to(device)].double().mean(0)


UNTRAINING = Untraining(
    name="ablate_junk",
    formula="(1 − u·uᵀ)·W, u the unit mean difference of hidden states on forget and benign texts, s times over",
    strengths=(1, 2, 4),
    alter=_alter,
    reads=("forget", "benign"),
    whole=True,
)
