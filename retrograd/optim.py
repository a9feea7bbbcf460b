"""Optimizers and schedules for recipes, and the parameters that weight decay may spare.

>>> adamw(lr=1e-4, eps_root=1e-8)
AdamW(lr=0.0001, beta1=0.9, beta2=0.999, eps=1e-08, eps_root=1e-08, weight_decay=0.0, spared=())
"""

from retrograd.core.optim import SGD, Adam, AdamW, Muon, Pair, Schedule
from retrograd.lm.model import norms_and_biases

__all__ = [
    "Adam", "AdamW", "Muon", "Pair", "SGD", "Schedule", "adam", "adamw", "muon", "norms_and_biases", "sgd",
]  # fmt: skip

sgd, adam, adamw, muon = SGD, Adam, AdamW, Muon
