"""What is checked before the first step of unlearning, and after the last.

Each of these has cost somebody a result: a reference equal to the model, an orthogonality of one row, weights of the
wrong sign, a module that never trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import Batch, micro_batches
from retrograd.data.pairs import ALTERNATIVE, FORGET, RETAIN, PairStream
from retrograd.unlearn.method import Method, Unlearning
from retrograd.unlearn.settings import Settings

__all__ = [
    "check_attributable",
    "check_changed",
    "check_reference",
    "check_shards",
    "check_start",
    "check_stream",
    "check_weights",
    "flags",
    "forget_rows",
]

_SAME = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the norm; half precision: 2e-2
_BESIDE = 1e-5  # what starts beside the reference is at least as far from it, of the norm


def check_attributable(method: Method, settings: Settings | None = None) -> None:
    """A run can be attributed where each update is a gradient of the objective.

    Args:
        settings: The method's defaults if not given.
    Raises:
        ValueError: If the method says that it is not.
    """
    if why := method.refusal(settings):
        raise ValueError(
            f"runs of {method.name} cannot be attributed: {why}. Scores through it would be wrong. "
            "Leave --attribute out, or take another method"
        )


def check_shards(method: Method, shards: int) -> None:
    """Logical shards change no result where micro-batches add up.

    Raises:
        ValueError: If the method compares rows of one micro-batch, and shards would part them.
    """
    if shards > 1 and not method.additive:
        raise ValueError(
            f"{method.name} compares the forget rows of one micro-batch, and {shards} logical shards would part them: "
            "the objective would be another one. Run it in one process, without torchrun and --shards"
        )


def check_weights(method: Method, weights: Tensor) -> None:
    """Weights are finite, and at least 0 for a method that takes no signs.

    Raises:
        ValueError: If not, with the numbers.
    """
    if not torch.isfinite(weights).all():
        raise ValueError(f"{int((~torch.isfinite(weights)).sum())} of {weights.numel()} weights are NaN or infinite")
    negative = weights < 0
    if negative.any() and not method.signed:
        raise ValueError(
            f"{int(negative.sum())} of {weights.numel()} weights are negative, the least {float(weights.min()):.4g}, "
            f"and {method.name} takes none: w is a token's share of its forget term, at least 0. Take clipped or "
            "ranked weights, or a method in which w multiplies a token's cross-entropy (grad_ascent, grad_diff, "
            "weighted_sft)"
        )


def check_stream(objective: Unlearning, stream: PairStream, micro_batch_size: int | None = None) -> None:
    """Rows, weights and micro-batches are what the method needs.

    Raises:
        ValueError: If weights are negative where they may not be; the forget weights are all 0; retain or alternative
            rows are missing; a micro-batch has too few forget rows or takes a pair apart; or the objective is no
            gradient's.
    """
    method, settings = objective.method, objective.settings
    check_weights(method, stream.token_weights)
    for side, name in ((FORGET, "forget"), (RETAIN, "retain")):
        if stream.sizes[side] and not _targets_of(stream, side).any():
            raise ValueError(
                f"all {stream.sizes[side]} {name} rows have weight 0 at every valid target: the {name} set is empty "
                "after selection. Loosen the rule, or leave the weights out"
            )
    if settings.retain > 0 and not stream.sizes[RETAIN]:
        raise ValueError(
            f"{method.name} has a retain coefficient of {settings.retain} and there are no retain rows: give some, or "
            "retain = 0"
        )
    if method.alternatives and not stream.sizes[ALTERNATIVE]:
        raise ValueError(f"{method.name} needs an alternative row for each of {stream.sizes[FORGET]} forget rows")
    if stream.sizes[ALTERNATIVE] and not method.alternatives:
        raise ValueError(f"{method.name} takes no alternative rows, and {stream.sizes[ALTERNATIVE]} were given")
    size = micro_batch_size
    if size is not None and size < stream.batch_size and size % stream.unit:
        raise ValueError(
            f"a micro-batch of {size} rows takes pairs apart: a batch is {stream.units} units of {stream.unit} rows; "
            f"give a multiple of {stream.unit}"
        )
    fewest = min(forget_rows(stream[0], size))
    if fewest < method.least_rows and not settings.as_run:
        raise ValueError(
            f"{method.name} compares the forget rows of one micro-batch and needs at least {method.least_rows}; some "
            f"have {fewest}. Give a micro-batch of {method.least_rows * stream.unit} rows or more, or a larger batch"
        )


def forget_rows(batch: Batch, micro_batch_size: int | None) -> list[int]:
    """Forget rows of each micro-batch; n of them are n(n − 1)/2 pairs."""
    return [int((part.inputs["side"] == FORGET).sum()) for part in micro_batches(batch, micro_batch_size)]


def check_reference(objective: Unlearning, params: Params, batch: Batch) -> None:
    """Before any perturbation the reference says what the model says.

    Args:
        params: What the reference was made from.
        batch: Some batch of the stream.
    Raises:
        ValueError: If it differs beyond rounding, so that it is another model's.
    """
    far = _apart(objective, params, batch)
    close = _SAME.get(next(iter(params.values())).dtype, 2e-2)
    if far is not None and not far <= close:
        raise ValueError(
            f"the reference of {objective.method.name} differs from the model it is to be the start of by {far:.2g} of "
            "the norm of its outputs: it is another model, or its adapters are not where they should be"
        )


def check_start(objective: Unlearning, params: Params, batch: Batch) -> None:
    """A method without a slope at its reference does not start there.

    Raises:
        ValueError: If the model is equal to the reference for a method with `perturb` above 0.
    """
    if not objective.method.perturb:
        return
    far = _apart(objective, params, batch)
    assert far is not None, "a method on states has a reference"
    if not far >= _BESIDE:
        raise ValueError(
            f"the reference of {objective.method.name} is equal to the current model (they differ by {far:.2g} of the "
            f"norm of the hidden states), where its loss has no slope: start from perturbed(params, "
            f"{objective.method.perturb}, seed), and make the reference before that"
        )


def check_changed(before: Params, after: Params, expected: Iterable[str] | None = None) -> None:
    """Every parameter that was to change has; in half precision, whose updates round to nothing, some have.

    Args:
        expected: Names; all if not given.
    Raises:
        ValueError: If one is the same to the bit, with their names. In half precision that warns, unless all are.
    """
    names = list(before) if expected is None else list(expected)
    if absent := [name for name in names if name not in before]:
        raise ValueError(f"{len(absent)} parameters that were to change are not trained at all, such as {absent[0]}")
    still = [name for name in names if torch.equal(before[name], after[name])]
    if still:
        words = (
            f"{len(still)} of {len(names)} parameters that were to change did not: {', '.join(still[:5])}"
            f"{' …' if len(still) > 5 else ''}. No gradient reaches them, or updates round to nothing"
        )
        half = all(before[name].dtype in (torch.bfloat16, torch.float16) for name in still)
        if not half or len(still) == len(names):
            raise ValueError(words)
        warnings.warn(f"{words}, as they do in half precision: take --dtype float32", stacklevel=2)


def flags(objective: Unlearning) -> list[str]:
    """What a result has to carry: the historical faults that were permitted."""
    settings, method = objective.settings, objective.method
    if not settings.as_run:
        return []
    fault = method.fault or "the retain term kl is a sum over tokens divided by rows"
    return [f"{method.name} as run: {fault}"]


def _apart(objective: Unlearning, params: Params, batch: Batch) -> float | None:
    """‖now − reference‖/‖reference‖ of all outputs together; None without a reference."""
    if objective.reference is None:
        return None
    with torch.no_grad():
        now = objective.outputs(params, batch.inputs)
        then = objective.outputs(objective.reference.params, batch.inputs, objective.reference.adapters)
    of_now, of_then = ((x.logits, x.states) for x in (now, then))
    return float(tree.norm(tree.map(torch.sub, of_now, of_then)) / tree.norm(of_then))


def _targets_of(stream: PairStream, side: int) -> Tensor:
    """The weights at the valid targets of one side, [targets]."""
    weights, start = stream.side_weights(side), stream.offsets[side]
    masks = stream.rows.target_mask[start : start + stream.sizes[side]]
    return torch.cat([weights[row, : len(m)][torch.from_numpy(m).to(weights.device)] for row, m in enumerate(masks)])
