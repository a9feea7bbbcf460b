"""Health of a run, read from its journal and its recipe: what would make its scores mean little, and the lever to pull.

Every finding names the step, the cause and the lever. Cheap and always on; a run without findings is not thereby proved
good (`retrograd validate` does that).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrograd.core.optim import SGD, Adam, AdamW, Muon
from retrograd.core.step import Recipe

__all__ = ["Finding", "curvature_limit", "recipe_findings", "sweep_findings"]

SWALLOWED = 0.05  # share of updates lost to rounding
DRIFT = 1.5  # decades between the mean |score| of different steps
GROWTH = 1.0  # decades by which the parameters' cotangent grows on its way back
SMALL_BATCH = 8  # rows
SPIKE = 0.2  # rise of the loss over the median of the steps before
BEFORE, LEVEL, AFTER = 16, 5, 8  # steps whose spread counts, whose median counts, and within which a spike is over


@dataclass(frozen=True)
class Finding:
    """Something to know before acting on the scores. step: where it shows, if anywhere."""

    kind: str
    step: int | None
    text: str

    def __str__(self) -> str:
        return self.text


def recipe_findings(recipe: Recipe, batch_size: int, rows: int, dtype: str) -> list[Finding]:
    """What the recipe alone gives away, before the first step."""
    root = recipe.optimizer.eps_root if isinstance(recipe.optimizer, (Adam, AdamW, Muon)) else math.inf
    checks = {
        "bfloat16": dtype == "bfloat16",
        "tf32": dtype == "tf32",
        "eps_root": root < 1e-8,
        "dropout": recipe.stochastic,
        "batch": batch_size < min(SMALL_BATCH, rows),
    }
    return [Finding(kind, None, _TOLD[kind].format(root=root, rows=batch_size)) for kind in checks if checks[kind]]


_TOLD = {
    "bfloat16": "bfloat16 parameters swallow small updates (at |w| = 0.02 neighbours are 1e-4 apart): scores are "
    "mostly noise; a cosine of -0.42 with float32 was measured elsewhere. Use --dtype float32 for scores you act on.",
    "tf32": "products of TF32 round their factors to 11 bits (relative 5e-4, in training and on the way back alike): "
    "scores are those of a training so rounded, and small ones may be noise. `retrograd verify` says what is exact of "
    "them; leave --tf32 out for scores you act on.",
    "eps_root": "--train.eps_root {root:g} leaves the update rough where gradients are near 0: scores are finite but "
    "predict retraining badly (LDS 0.86 at 1e-6, 0.17 at 1e-8 and about 0 at 1e-10 were measured elsewhere). Raise it "
    "to 1e-6.",
    "dropout": "dropout is active: its draws are replayed exactly, in validation too, yet scores predict retraining "
    "badly under it (LDS 0.97 without, about 0 with it, elsewhere). Leave --train.dropout off.",
    "batch": "{rows} rows in a step make training rough; larger batches predict better (LDS 0.17 with 64, 0.95 with "
    "256, elsewhere). Raise --train.batch_size, and the learning rate with it.",
}


def sweep_findings(train: Sequence[dict[str, Any]], reverse: Sequence[dict[str, Any]], recipe: Recipe) -> list[Finding]:
    """What the journal of a finished sweep shows."""
    checks = (_swallowed(train), _spike(train), _growth(reverse), _drift(reverse), _curvature(reverse, recipe))
    return [finding for finding in checks if finding is not None]


def curvature_limit(recipe: Recipe) -> float | None:
    """Where lr·λ_max of the (preconditioned) Hessian makes a quadratic unstable.

    2 for gradient descent, 2(1 + μ) with momentum, 2(1 + β₁)/(1 − β₁) for Adam. Cohen et al., arXiv:2207.14484.
    """
    optimizer = recipe.optimizer
    if isinstance(optimizer, SGD):
        return 2 * (1 + optimizer.momentum)
    return 2 * (1 + optimizer.beta1) / (1 - optimizer.beta1) if isinstance(optimizer, (Adam, AdamW)) else None


def _swallowed(train: Sequence[dict[str, Any]]) -> Finding | None:
    counted = [(entry["swallowed"], entry["step"]) for entry in train if "swallowed" in entry and entry["lr"] > 0]
    share, step = max(counted, default=(0.0, 0))
    if share <= SWALLOWED:
        return None
    text = (
        f"step {step}: {share:.0%} of the parameters with a gradient did not move, their updates rounded to nothing; "
        "retraining rounds differently, so scores are noisy. Raise the learning rate, or use --dtype float64."
    )
    return Finding("swallowed", step, text)


def _spike(train: Sequence[dict[str, Any]]) -> Finding | None:
    """The largest rise of the loss that is over soon: by a fifth of what it was, and beyond six spreads of it."""
    train = [entry for entry in train if "loss" in entry]
    losses = [entry["loss"] for entry in train]
    worst: tuple[float, int, float] | None = None
    for place in range(4, len(losses) - 1):
        before = losses[max(0, place - BEFORE) : place]
        usual = statistics.median(before[-LEVEL:])
        moves = statistics.median(abs(b - a) for a, b in itertools.pairwise(before))
        spread = 1.0484 * moves  # σ, where batches differ like a normal; by moves, for losses fall
        rise = losses[place] - usual
        over = min(losses[place + 1 : place + 1 + AFTER]) < usual + rise / 2
        if over and rise > max(SPIKE * abs(usual), 6 * spread) and (worst is None or rise > worst[0]):
            worst = (rise, place, usual)
    if worst is None:
        return None
    _, place, usual = worst
    step = train[place]["step"]
    text = (
        f"step {step}: the training loss jumps to {losses[place]:.3g} from a median of {usual:.3g} in the steps before "
        "and comes back: around such a step small changes of the data change much, and scores of what was read before "
        "it predict little. Lower --train.lr, warm up longer (--train.warmup_ratio), or clip (--train.max_grad_norm)."
    )
    return Finding("spike", step, text)


def _growth(reverse: Sequence[dict[str, Any]]) -> Finding | None:
    norms = [max(entry["cotangent_norm"]) for entry in reverse]
    if len(norms) < 3 or min(norms) <= 0:
        return None
    end = max(norms[-max(1, len(norms) // 10) :])
    top = max(range(len(norms)), key=norms.__getitem__)
    if math.log10(norms[top] / end) <= GROWTH:
        return None
    step = reverse[top]["step"]
    text = (
        f"the cotangent grew {norms[top] / end:,.0f}-fold on its way back, most by step {step}: small changes of early "
        "data are amplified, and the derivative reaches less far than a whole example. Lower the learning rate, raise "
        "--train.eps_root, or take fewer steps."
    )
    return Finding("growth", step, text)


def _drift(reverse: Sequence[dict[str, Any]]) -> Finding | None:
    sizes = [sum(entry["mean_abs_score"]) / len(entry["mean_abs_score"]) for entry in reverse]
    width = max(1, len(sizes) // 10)
    starts = range(0, len(sizes) - width + 1, width)
    means = [(sum(sizes[k : k + width]) / width, reverse[k]["step"]) for k in starts]
    means = [(mean, step) for mean, step in means if mean > 0]
    (low, low_step), (high, high_step) = min(means, default=(1.0, 0)), max(means, default=(1.0, 0))
    if math.log10(high / low) <= DRIFT:
        return None
    text = (
        f"mean |score| is {high / low:,.0f} times larger around step {high_step} than around step {low_step}: ranking "
        "documents then mostly ranks the steps they were seen at. Compare within a step, train each row in several "
        "epochs, or lower the learning rate."
    )
    return Finding("drift", high_step, text)


def _curvature(reverse: Sequence[dict[str, Any]], recipe: Recipe) -> Finding | None:
    limit = curvature_limit(recipe)
    seen = [(entry["lr_times_sharpness"], entry["step"]) for entry in reverse if "lr_times_sharpness" in entry]
    value, step = max(seen, default=(0.0, 0))
    if limit is None or value <= limit:
        return None
    text = (
        f"step {step}: lr·λ_max is {value:.2f}, above {limit:.3g}, where this optimizer is unstable on a quadratic; "
        "cotangents grow geometrically there. Lower the learning rate or warm up longer."
    )
    return Finding("curvature", step, text)
