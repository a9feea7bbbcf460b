"""Optimizers and schedules for recipes.

>>> adamw(lr=1e-4, eps_root=1e-8)
AdamW(lr=0.0001, beta1=0.9, beta2=0.999, eps=1e-08, eps_root=1e-08, weight_decay=0.0)
"""

from retrograd.core.optim import SGD, AdamW, Muon, Pair, Schedule

__all__ = ["AdamW", "Muon", "Pair", "SGD", "Schedule", "adamw", "muon", "sgd"]

sgd, adamw, muon = SGD, AdamW, Muon
