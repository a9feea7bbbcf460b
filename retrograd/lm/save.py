"""A causal language model as a folder that `from_pretrained` reads, with parameters that are not the module's own."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retrograd.core.optim import Params
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

    Adapters are merged into a copy of the model, so that the folder stands for itself.

    Args:
        folder: A folder that is there already is replaced.
        params: Leaves by the names of `trainable`, instead of the module's own, which are left as they are.
        more: Writes further files into the folder before it is there.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    for path in (temporary, old):
        shutil.rmtree(path, ignore_errors=True)
    whole, state = _whole(module, params)
    whole.save_pretrained(temporary, state_dict=state)
    tokenizer.save_pretrained(temporary)
    more(temporary)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _whole(module: nn.Module, params: Params | None) -> tuple[Any, dict[str, Any] | None]:
    """A Hugging Face model, and the tensors to save for it if they are not its own."""
    readers = trainable(module)[1] if params is not None else {}
    found = {name: params[leaf].detach() for name, leaf in readers.items()} if params is not None else {}
    if not hasattr(module, "merge_and_unload"):
        return module, {**module.state_dict(), **found} if found else None
    merged: Any = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if name in found:
                parameter.copy_(found[name])
    return merged.merge_and_unload(), None
