"""Shared test set-up: no network, one thread, proofs once, and, where asked for, annotations checked at run time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path += map(str, Path(__file__).parent.glob("*/"))  # tests of one room use worlds of another

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if os.environ.get("RETROGRAD_CHECK_TYPES") == "1":  # `make test-all`: every call of these rooms against its annotations
    from jaxtyping import install_import_hook

    install_import_hook(["retrograd.core", "retrograd.query", "retrograd.settings"], "beartype.beartype")

from torch import nn

from retrograd.core import tree
from retrograd.core.step import State, Training
from retrograd.proofs import first_step
from retrograd.runs.identity import fingerprint

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and two test runs would fight over the cores


def once(function: Callable[..., None]) -> Callable[..., None]:
    """A proof that passed, not repeated for the same function, recipe and parameters within a process.

    It is a third of the time of a tiny run. What is proved once holds for every test that trains the same model; another
    model, loss, optimizer or start is proved anew, and a refusal is never remembered.
    """
    passed: set[str] = set()

    def proved(training: Training, state: State, module: nn.Module | None = None) -> None:
        what = fingerprint(training.recipe, training.engine, module, tree.digest(state.params))
        if what not in passed:
            function(training, state, module)
            passed.add(what)

    return proved


first_step.prove_gradient = once(first_step.prove_gradient)
