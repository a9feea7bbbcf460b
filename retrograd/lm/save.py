"""A causal language model as a folder that `from_pretrained` reads, with parameters that are not the module's own.

What was written is read back before it counts, and has to be the model it was made from, bit for bit. Merged adapters
are another way to compute the same function, so there the logits have to agree up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.core.optim import Params
from retrograd.durable import remove, rename, temporary_name
from retrograd.lm.adapters import merged
from retrograd.lm.checkpoint import load_module
from retrograd.lm.model import trainable

__all__ = ["save_causal_lm"]


def save_causal_lm(
    folder: Path,
    module: nn.Module,
    tokenizer: Any,
    params: Params | None = None,
    more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write model and tokenizer, in a way that a kill leaves the whole folder, the one before, or none.

    Adapters are merged into a copy of the model, so that the folder stands for itself. Where they sit on one of two
    tied weights (embedding and head), the copy has them apart: together they would change both.

    Args:
        folder: A folder that is there already is replaced.
        params: Leaves by the names of `trainable`, instead of the module's own, which are left as they are.
        more: Writes further files into the folder before it is there.
    Raises:
        ValueError: If the folder does not read back as the model, with what differs; nothing is replaced then.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    temporary, old = temporary_name(folder), temporary_name(folder)
    whole, state = _whole(module, params)
    state = whole.state_dict() if state is None else state
    try:
        whole.save_pretrained(temporary, state_dict=dict(state))  # which it empties
        tokenizer.save_pretrained(temporary)
        _check_saved(folder, temporary, state)
        more(temporary)
        if folder.exists():
            folder.rename(old)
        rename(temporary, folder)
    finally:
        remove(temporary)
    remove(old)


def _whole(module: nn.Module, params: Params | None) -> tuple[Any, dict[str, Any] | None]:
    """A Hugging Face model, and the tensors to save for it if they are not its own."""
    readers = trainable(module)[1] if params is not None else {}
    trained = {name: params[leaf].detach() for name, leaf in readers.items()} if params is not None else {}
    if not hasattr(module, "merge_and_unload"):
        return module, {**module.state_dict(), **trained} if trained else None
    adapted: Any = copy.deepcopy(module).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in trained:
                parameter.copy_(trained[name])
    return merged(adapted), None


def _check_saved(folder: Path, written: Path, expected: dict[str, Tensor]) -> None:
    """Refuse what does not read back as what was measured, bit for bit."""
    dtype = next(x.dtype for x in expected.values() if x.is_floating_point())
    read = load_module(str(written), dtype).state_dict()
    wrong = sorted(expected.keys() ^ read.keys())
    wrong += [name for name in expected.keys() & read.keys() if not _same_bits(expected[name], read[name])]
    if wrong:
        raise ValueError(
            f"the model saved for {folder} does not read back as the one measured: {len(wrong)} of {len(expected)} "
            f"tensors differ, {wrong[0]} first. `transformers` saves this architecture otherwise than it is; leave "
            "saving out, and keep the run's own states."
        )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal bytes, so that NaN equals itself and 0 is not −0."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    a, b = (x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (first, second))
    return torch.equal(a, b)
