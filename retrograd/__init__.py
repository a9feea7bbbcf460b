"""retrograd: which training data made this model do that, and what happens if we act on the answer?

Public names load on first use: importing the package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrograd.core.sweep import metagradient
    from retrograd.data.stream import DataStream
    from retrograd.lm.loss import weighted_causal_lm_ce
    from retrograd.trainer import BackwardState, Trainer, TrainerState, Validation

__all__ = [
    "BackwardState",
    "DataStream",
    "Trainer",
    "TrainerState",
    "Validation",
    "metagradient",
    "weighted_causal_lm_ce",
]

_HOMES = {
    "BackwardState": "retrograd.trainer",
    "DataStream": "retrograd.data.stream",
    "Trainer": "retrograd.trainer",
    "TrainerState": "retrograd.trainer",
    "Validation": "retrograd.trainer",
    "metagradient": "retrograd.core.sweep",
    "weighted_causal_lm_ce": "retrograd.lm.loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'retrograd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
