"""Whether token rows fit a model, before an index error deep in it says so, or says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrograd.data.rows import Rows

__all__ = ["check_rows"]


def check_rows(rows: Rows, model: Any) -> None:
    """Refuse rows that a Hugging Face language model cannot read; other modules have no such limits.

    Raises:
        ValueError: If a token id is not in the vocabulary, or a row is longer than the model's context.
    """
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        return
    table = getattr(model.get_input_embeddings(), "weight", None)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(rows.input_ids):
        wrong = np.flatnonzero((ids < 0) | (ids >= (np.inf if table is None else len(table))))
        if len(wrong):
            size = "" if table is None else f" of {len(table)}"
            raise ValueError(
                f"row {number} has token id {ids[wrong[0]]} at position {wrong[0]}, outside the vocabulary{size}: rows "
                "and model do not match. Tokenise with the model's own tokenizer; padding is not part of a row"
            )
        if context is not None and len(ids) > context:
            raise ValueError(
                f"row {number} has {len(ids)} tokens, more than the model's context of {context}: cut it, or pack the "
                "documents into rows of that length"
            )
