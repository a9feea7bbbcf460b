"""Optimizers, one file each, behind one protocol; the learning rate's schedules; clipping."""

from retrograd.core.optim.adam import Adam
from retrograd.core.optim.adamw import AdamW
from retrograd.core.optim.clip import clip, clip_pullback
from retrograd.core.optim.foreign import Pair
from retrograd.core.optim.muon import Muon
from retrograd.core.optim.protocol import Cotangent, LearningRate, Moments, Optimizer, Params, Updated, rate
from retrograd.core.optim.schedule import SCHEDULES, Schedule
from retrograd.core.optim.sgd import SGD

__all__ = [
    "ELEMENTWISE",
    "SCHEDULES",
    "SGD",
    "Adam",
    "AdamW",
    "Cotangent",
    "LearningRate",
    "Moments",
    "Muon",
    "Optimizer",
    "Pair",
    "Params",
    "Schedule",
    "Updated",
    "clip",
    "clip_pullback",
    "rate",
]

ELEMENTWISE = (SGD, Adam, AdamW)
"""Optimizers whose update is elementwise: little work, and the same bits wherever its inputs lie."""
