"""The one list of methods. Laws run over it, the command takes its names; a method of a user's is one file.

A file with `METHOD = Method(…)` is all that a new method needs: docs/unlearning.md has an example.
"""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

from retrograd.unlearn.activation import (
    checkpoint_transfer,
    circuit_breakers,
    orth_circuit_breakers,
    rmu,
    sequential,
    tuned_lens,
    weighted_ascent_orth,
)
from retrograd.unlearn.likelihood import (
    ce_u,
    dpo,
    grad_ascent,
    grad_diff,
    max_entropy,
    npo,
    satimp,
    simnpo,
    topk_entropy,
    two_phase,
    undial,
    weighted_sft,
    wga,
)
from retrograd.unlearn.method import Method
from retrograd.unlearn.weights import representation_edit, repselect, task_arithmetic

__all__ = ["METHODS", "find_method"]

_FILES = (
    grad_ascent, grad_diff, npo, simnpo, dpo, undial, wga, satimp, ce_u, max_entropy, topk_entropy, weighted_sft,
    two_phase, circuit_breakers, orth_circuit_breakers, rmu, weighted_ascent_orth, sequential, tuned_lens,
    checkpoint_transfer,
    task_arithmetic, representation_edit, repselect,
)  # fmt: skip

METHODS: dict[str, Method] = {file.METHOD.name: file.METHOD for file in _FILES}
"""Every method by name."""


def find_method(name: str) -> Method:
    """A method by name, or the METHOD of a Python file.

    Raises:
        ValueError: If there is no such method, or the file has none.

    >>> find_method("npo").linear
    False
    """
    if name in METHODS:
        return METHODS[name]
    if not name.endswith(".py"):
        raise ValueError(
            f"unknown method {name!r}; the methods are {', '.join(METHODS)}, and a Python file may be given whose "
            "METHOD is one"
        )
    if not Path(name).is_file():
        raise ValueError(f"there is no file {name}")
    path = Path(name).resolve()
    method = _of_file(path, path.read_bytes())
    if not isinstance(method, Method):
        raise ValueError(f"{name} has no METHOD = Method(…), but {type(method).__name__}: see docs/unlearning.md")
    return method


@cache
def _of_file(path: Path, text: bytes) -> Any:
    """The METHOD of a file, run once: run again, its settings would be of another class."""
    return runpy.run_path(str(path)).get("METHOD")
