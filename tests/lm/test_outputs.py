"""Logits and hidden states where targets are predicted, against transformers, over the families."""

from __future__ import annotations

import pytest
import torch
from tiny import configurations
from unlearning import RETAIN, language_model

from retrograd.data.rows import pad
from retrograd.data.stream import token_rows
from retrograd.lm.outputs import decoder_blocks, outputs_of


@pytest.mark.parametrize("family", configurations())
def test_outputs_are_those_of_transformers_without_padding(family: str) -> None:
    """act(l) is hidden_states[l + 1], but for the last, whose final norm it does not have."""
    lm = language_model(family)
    inputs = pad(token_rows(RETAIN), range(3))
    found = outputs_of(lm, (0, 1))(lm.params, inputs)
    with torch.no_grad():
        each = [lm.module(input_ids=torch.tensor([row]), output_hidden_states=True) for row in RETAIN]
    place = 0
    for row, whole in zip(RETAIN, each):
        part = slice(place, place + len(row) - 1)
        close = {"rtol": 1e-6, "atol": 1e-6}  # casts to float32 inside the plain model
        torch.testing.assert_close(found.logits[part], whole.logits[0, :-1], **close)
        torch.testing.assert_close(found.states[0][part], whole.hidden_states[1][0, :-1], **close)
        assert found.targets[part].tolist() == row[1:]
        assert found.columns[part].tolist() == list(range(1, len(row)))
        place += len(row) - 1
    assert place == len(found.targets)
    last = torch.cat([whole.hidden_states[2][0, :-1] for whole in each])
    assert float((found.states[1] - last).norm()) > 1e-3


def test_a_block_that_is_absent_is_refused() -> None:
    lm = language_model()
    assert len(decoder_blocks(lm.module)) == 2
    with pytest.raises(ValueError, match=r"there is no block 2: .* has 2, numbered 0 to 1"):
        outputs_of(lm, (2,))
    with pytest.raises(ValueError, match="has no adapters to turn off"):
        outputs_of(lm)(lm.params, pad(token_rows(RETAIN), range(3)), False)
    with pytest.raises(ValueError, match="no list of blocks of one type"):
        decoder_blocks(torch.nn.Linear(2, 2))
