"""Shared test set-up: no network, one thread, proofs once, little collecting of garbage, and, where asked for, annotations
checked at run time."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

sys.path += map(str, Path(__file__).parent.glob("*/"))  # tests of one room use worlds of another

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if os.environ.get("RETROGRAD_CHECK_TYPES") == "1":  # `make test-all`: every call of these rooms against its annotations
    from jaxtyping import install_import_hook

    install_import_hook(["retrograd.core", "retrograd.query", "retrograd.settings"], "beartype.beartype")

from torch import nn
from tyro import _docstrings as tyro_docstrings

from retrograd.core import tree
from retrograd.core.step import State, Training
from retrograd.lm import proof
from retrograd.lm.layout import Form
from retrograd.proofs import first_step
from retrograd.query import proof as answers
from retrograd.runs import session
from retrograd.runs.identity import architecture, fingerprint

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and two test runs would fight over the cores


def once(function: Callable[..., None]) -> Callable[..., None]:
    """A proof that passed, not repeated for the same function, recipe and parameters within a process.

    It is a third of the time of a tiny run. What is proved once holds for every test that trains the same model; another
    model, loss, optimizer or start is proved anew, and a refusal is never remembered.
    """
    passed: set[str] = set()

    def proved(training: Training, state: State, module: nn.Module | None = None) -> None:
        what = fingerprint((training.recipe, training.engine, module, tree.digest(state.params)))
        if what not in passed:
            function(training, state, module)
            passed.add(what)

    return proved


first_step.prove_gradient = once(first_step.prove_gradient)


def kind_of(module: nn.Module) -> str:
    """What of a module its proofs are about: a model that is trained or loaded again is not proved anew.

    That is a quarter of the time where models are evaluated. Refusals are never remembered, and tests of the proofs
    themselves have `proved_anew`.
    """
    held = {name: (x.dtype, x.device, x.shape, x.requires_grad) for name, x in module.named_parameters()}
    return fingerprint(architecture(module), held)


class Forms(WeakKeyDictionary[nn.Module, Form]):
    """Forms of modules, found again by their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.known = dict[str, Form]()

    def __contains__(self, module: object) -> bool:
        assert isinstance(module, nn.Module)
        if not super().__contains__(module) and (form := self.known.get(kind_of(module))) is not None:
            super().__setitem__(module, form)
        return super().__contains__(module)

    def __setitem__(self, module: nn.Module, form: Form) -> None:
        super().__setitem__(module, form)
        self.known[kind_of(module)] = form


class Proved(set[str]):
    """Modules whose answers hold, found again by their kind."""

    def __contains__(self, module: object) -> bool:
        assert isinstance(module, nn.Module)
        return super().__contains__(kind_of(module))

    def add(self, module: Any) -> None:
        super().add(kind_of(module))


proof._FORMS = Forms()
answers._PROVED = Proved()


@pytest.fixture
def proved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_FORMS", WeakKeyDictionary())
    monkeypatch.setattr(answers, "_PROVED", WeakSet())


# what the settings' sources say of them, read once and not for every command line
tyro_docstrings._ClassTokenization.make = cache(tyro_docstrings._ClassTokenization.make.__wrapped__)  # type: ignore[attr-defined]
tyro_docstrings.get_callable_description = cache(tyro_docstrings.get_callable_description.__wrapped__)  # type: ignore[attr-defined]

# as the command line has it: a collection looks at the million objects of the libraries
gc.set_threshold(10_000)
session._settled = contextlib.nullcontext


LONG = [
    "blocks",
    "queries",
    "magic",
    "exactness",
    "verify",
    "job",
    "compile",
    "on_the_way",
    "submit",
    "validate",
    "lm",
    "evaluate",
    "proof",
    "metrics",
    "unlearn_attributed",
    "lab",
    "durable",
    "unlearn",
    "experiment",
    "select_runs",
    "chain",
    "attack",
    "report",
    "browser",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: two processes that take a file each then end together."""
    first = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
