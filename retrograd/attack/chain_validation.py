"""Do scores through unlearning and attack predict? Both are trained again without random sets of forget tokens, and the
forget loss after the attack is held against the prediction −Σ τ.

    validation.jsonl     a line for each set, in the folder of the scores; asking for more sets adds lines
    validation.json      Spearman's correlation over sets (LDS) by query, with a bootstrap interval of the mean
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from retrograd.attack.finetune import After, set_up_phase
from retrograd.core.optim import Params
from retrograd.data.pairs import FORGET, PairStream
from retrograd.query.columns import Queries
from retrograd.runs.files import append_line, read_lines, write_json
from retrograd.runs.phases import Begin, trained
from retrograd.runs.setup import Loaded
from retrograd.runs.states.budget import Replay
from retrograd.settings.attack import PhaseConfig
from retrograd.trust.left_out import agreement, mean_lds, predicted, random_subset, without

__all__ = ["begins", "forget_places", "retrained", "validate_chain"]

_LEAST = Replay(plan="binomial", slots=1)  # nothing is reversed


def forget_places(stream: PairStream) -> np.ndarray:
    """Flat places of the forget rows' targets in the stream's weights, ascending."""
    longest = stream.weights.shape[1]
    return np.concatenate([
        row * longest + np.flatnonzero(stream.rows.target_mask[row]) for row in range(stream.sizes[FORGET])
    ])  # fmt: skip


def retrained(loaded: Loaded, runs: Sequence[PhaseConfig], weights: Tensor) -> Params:
    """Parameters after unlearning at other data weights and the same attack."""
    unlearned = loaded.trajectory(_LEAST, weights=weights, identity="left out").train().params
    return trained(begins(loaded, runs), unlearned)


def begins(loaded: Loaded, runs: Sequence[PhaseConfig]) -> list[Begin]:
    """The phases of an attack, each to begin with what is there before it."""
    queries = sum(len(query.columns) for query in loaded.asked)

    def begin(run: PhaseConfig) -> Begin:
        return lambda params: set_up_phase(run, After(loaded.model, loaded.tokenizer, params, queries))[0]

    return [begin(run) for run in runs]


def validate_chain(
    loaded: Loaded,
    runs: Sequence[PhaseConfig],
    scores: Tensor,
    values: Tensor,
    sets: int,
    fraction: float,
    folder: Path,
    tell: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Measure what is not measured yet, and say how well the scores predict it.

    Args:
        loaded: The unlearning, with its queries.
        runs: Phases of the attack.
        scores: [K, rows, length].
        values: Query values after unlearning and attack, [K] nats.
        sets: Random sets of forget tokens, one retraining each.
        fraction: Share of the forget tokens that a set leaves out.
        tell: Told how many sets are done.
    """
    stream = loaded.stream
    assert isinstance(stream, PairStream), "an unlearning has forget and retain rows"
    places, path = forget_places(stream), folder / "validation.jsonl"
    lines = {(line["set"], line["fraction"]): line for line in map(json.loads, read_lines(path))}
    queries = Queries([column for query in loaded.asked for column in query.columns])
    wanted = []
    for number in range(sets):
        if (number, fraction) not in lines:
            left_out = random_subset(places, fraction, 0, number)
            measured = (
                queries.values(retrained(loaded, runs, without(stream.weights, left_out))).double() - values.cpu()
            )
            expected = predicted(scores, stream.weights, left_out)
            line = {"set": number, "fraction": fraction, "tokens": len(left_out), "predicted": expected.tolist(),
                    "measured": measured.tolist()}  # fmt: skip
            append_line(path, json.dumps(line))
            lines[number, fraction] = line
        wanted.append(lines[number, fraction])
        tell(number + 1)
    prediction, measurement = (np.array([line[key] for line in wanted]) for key in ("predicted", "measured"))
    mean, low, high = mean_lds(prediction, measurement)
    each = [agreement(prediction[:, k], measurement[:, k])._asdict() for k in range(prediction.shape[1])]
    names = [column.name for query in loaded.asked for column in query.columns]
    result = {"sets": sets, "fraction": fraction, "lds": mean, "interval": [low, high],
              "queries": dict(zip(names, each))}  # fmt: skip
    write_json(folder / "validation.json", result)
    return result
