"""`retrograd verify`: an independent certificate for a finished run.

    inputs      data, model, recipe and queries have the hashes of the manifest
    files       score files and states have the bits that were written
    replay      training again gives every state's digest
    query       value and gradient at the replayed final state are those on disk
    objective   losses are those of the model's own plain forward pass, at its weights and at large values
    adjoint     ⟨τ, v⟩ = ⟨∇φ, θ̇_T⟩, the right side without a reverse sweep
    retraining  ⟨τ, v⟩ = dφ(w + hv)/dh, at the run's own precision
    float64     the same two for the first steps of the run in float64

Each line is passed, failed or not checked, and an error inside one leaves the others standing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from torch import Tensor

from retrograd.core import check, tree
from retrograd.core.optim import Params
from retrograd.core.slots import digest_of
from retrograd.core.step import Batch, NonFiniteError, State, Stream, Training
from retrograd.core.sweep import metagradient
from retrograd.lm.model import CausalLM
from retrograd.lm.proof import prove
from retrograd.proofs.slopes import extrapolated_slope
from retrograd.query.columns import Queries
from retrograd.query.proof import prove_answers
from retrograd.runs.files import write_json
from retrograd.runs.kinds import assemble
from retrograd.runs.manifest import Manifest
from retrograd.runs.progress import Bars
from retrograd.runs.run_folder import Opened, holding, load_run, refuse_stored_code, with_queries
from retrograd.runs.setup import Loaded
from retrograd.runs.states.budget import free_on
from retrograd.runs.states.relay import parted
from retrograd.settings.commands import VerifyConfig
from retrograd.settings.run import AttributedConfig
from retrograd.trust.certificate import Check, attempt, certified, compare, missing, record, table, told
from retrograd.trust.evidence import (
    digests,
    input_check,
    query_check,
    score_checks,
    state_checks,
    stored_scores,
)

__all__ = ["verify"]

ADJOINT = {torch.float64: 1e-9, torch.float32: 3e-4}
RETRAINED = {torch.float64: 1e-6, torch.float32: 5e-3}
COARSE = "arithmetic of fewer bits than float32 rounds away what this check would see"
AT_ONCE = 4  # aligned directions that the adjoint identity carries
SHORT_COLUMNS = 4  # query columns of the shortened run


def verify(config: VerifyConfig, console: Console | None = None) -> int:
    """Check a finished run, print the certificate and write it to RUN/verify.json.

    Returns:
        0 if the run is certified, or partly: nothing failed, and what is missing is named. 3 for partly with --strict.
        1 if anything failed.
    Raises:
        ValueError: If there is no finished run, it names code that is not trusted, or a setting cannot work.
    """
    console, start = console or Console(), time.monotonic()
    if min(config.steps, config.directions) < 0:
        raise ValueError(f"--steps {config.steps} and --directions {config.directions} have to be 0 or more")
    with holding(config.run, shared=not parted(config.run / "checkpoints")) as run:
        return _verify(config, *run, console, start)


def _verify(
    config: VerifyConfig, settings: AttributedConfig, manifest: Manifest, console: Console, start: float
) -> int:
    refuse_stored_code(settings, config.trust_code)
    checks = list(_checks(config, settings, manifest))
    verdict, absent = certified(checks), missing(checks)
    failed = list(dict.fromkeys(check.name for check in checks if check.verdict == "failed"))
    write_json(config.run / "verify.json", {
        "verdict": verdict, "failed": failed, "missing": absent, "seconds": round(time.monotonic() - start, 3),
        "seed": config.seed, "checks": record(checks),
    })  # fmt: skip
    console.print(table(checks, f"Certificate of {config.run}"))
    if failed:
        console.print(f"FAILED: {', '.join(failed)}. Do not act on these scores.", style="bold red")
    if absent:
        partly = "" if failed else "PARTLY CERTIFIED: nothing failed, but not all was checked. "
        console.print(f"{partly}Missing: {', '.join(absent)}.", style="yellow")
    if verdict == "certified":
        console.print("CERTIFIED: every check passed.", style="green")
    return 1 if failed else 3 if absent and config.strict else 0


def _checks(config: VerifyConfig, settings: AttributedConfig, manifest: Manifest) -> Iterator[Check]:
    """All checks, in the order of their cost."""
    yield from attempt("scores file", lambda: score_checks(config.run, manifest))
    try:
        run = load_run(settings, manifest, trust_code=config.trust_code)
    except (ValueError, OSError) as error:
        yield Check("inputs", "failed", f"what the run is made of cannot be loaded: {told(error)}")
        yield from _left_out("the inputs cannot be loaded")
        return
    inputs = input_check(run)
    yield inputs
    yield from attempt("states", lambda: _states(run))
    if inputs.verdict == "failed":
        yield from _left_out("the inputs are not the run's")
        return
    yield from attempt("objective", lambda: [_objective_check(run.loaded.model, run.loaded.rows.max_length)])
    scores = None
    try:
        scores = stored_scores(run)
    except Exception as error:
        yield Check("scores", "failed", f"the scores cannot be used: {told(error)}")
    with Bars(len(run.loaded.stream)) as bars:
        yield from _replayed(config, run, scores, bars)
        if scores is None:
            yield Check("retraining", "not checked", "the scores cannot be used")
        else:
            yield from attempt("retraining", lambda: _retrained(config, run, scores, bars))
        yield from attempt("float64", lambda: _shortened(config, run, bars))


def _states(run: Opened) -> Iterator[Check]:
    """The states on disk, whole again where a query by several processes was stopped."""
    run.loaded.settle(run.folder / "checkpoints")
    yield from state_checks(run)


def _left_out(reason: str) -> Iterator[Check]:
    for name in ("objective", "replay", "query", "adjoint", "retraining", "float64"):
        yield Check(name, "not checked", reason)


def _objective_check(model: CausalLM, longest: int) -> Check:
    """The proof of the objective, once more and with a text as long as the run's longest row."""
    try:
        proof = prove(model, longest=longest)
        prove_answers(model, again=True)
    except ValueError as error:
        return Check("objective", "failed", told(error))
    words = (
        f"losses of random texts of {proof.lengths[0]} to {proof.lengths[-1]} tokens, as rows and packed, letters, "
        "answers and continuations are those of the model's own forward pass, one text at a time, also with weights "
        f"scaled to logits of ±{proof.logits:.3g} before any cap; the largest difference in nats"
    )
    return Check("objective", "passed", words, proof.error, proof.tolerance)


class _Ledger:
    """Compares replayed states with the digests of the run, and shows how far the replay is."""

    def __init__(self, run: Opened, move: Callable[[int], None]) -> None:
        self.expected, self.move = digests(run), move
        self.pieces = run.loaded.training.recipe.pieces
        self.same: set[int] = set()
        self.drifted: list[int] = []

    def __call__(self, state: State) -> None:
        digest = digest_of(state, self.pieces)
        if self.expected.get(state.step) == digest:
            self.same.add(state.step)
        else:
            self.drifted.append(state.step)
        self.move(state.step)

    def check(self, steps: int) -> Check:
        if self.drifted:
            first = self.drifted[0]
            known = "has another digest" if first in self.expected else "has no digest on disk"
            words = (
                f"state {first} {known}, {len(self.drifted)} of {steps} states in all: the arithmetic is not "
                "the run's (another machine, thread count or library), or the digests were changed"
            )
            return Check("replay", "failed", words)
        return Check("replay", "passed", f"training again gave all {steps} states bit for bit")


def _replayed(config: VerifyConfig, run: Opened, scores: Tensor | None, bars: Bars) -> Iterator[Check]:
    """Replay, query and adjoint identity, from one pass through training."""
    training, params = run.loaded.training, run.loaded.initial.params
    ledger = _Ledger(run, lambda step: bars.move("replay", step))
    adjoint = [Check("adjoint", "not checked", "the scores cannot be used" if scores is None else COARSE)]
    final, pushed, groups = None, None, []
    if scores is not None and _dtype(params) in ADJOINT:
        directions = _adjoint_directions(scores, training.weights, config.seed)
        groups = _groups(directions, run.loaded.initial)
        try:
            final, pushed = check.forward_tangent(training, params, groups[0], ledger)
        except Exception as error:
            adjoint = [Check("adjoint", "not checked", f"the forward tangent stopped with {told(error)}")]
    if final is None:
        ledger = _Ledger(run, lambda step: bars.move("replay", step))
        try:
            final = check.train(training, params, observe=ledger)
        except NonFiniteError as error:
            yield Check("replay", "failed", f"training again diverged, and the run had not: {told(error)}")
            return
    yield ledger.check(len(training.stream))
    values, gradient = run.loaded.queries(final.params)
    yield from attempt("query", lambda: [query_check(run, values, gradient)])
    if scores is not None and pushed is not None:
        first, others = _slopes(pushed, gradient), groups[1:]
        del pushed
        if others:
            bars.move("tangent", 1, total=len(groups), unit="passes")

        def compared() -> list[Check]:
            slopes = [first]
            for group in others:
                slopes.append(_slopes(check.forward_tangent(training, params, group)[1], gradient))
                bars.move("tangent", len(slopes))
            return _adjoint("adjoint", scores, directions, torch.cat(slopes), _dtype(gradient))

        adjoint = attempt("adjoint", compared)
    yield from adjoint


def _groups(directions: Tensor, initial: State) -> list[Tensor]:
    """Directions that the forward tangent carries at once: as many as fit in half of its device's free memory.

    A direction takes a tangent of the state and one of the gradient, and a step four states besides its activations.
    """
    state = tree.nbytes((initial.params, initial.moments))
    free = free_on(next(iter(initial.params.values())).device)
    fit = (free // 2 - 4 * state) // (state + tree.nbytes(initial.params))
    return list(directions.split(max(1, fit)))


def _slopes(pushed: Params, gradient: Params) -> Tensor:
    """⟨∇φ_k, θ̇_d⟩ in float64, [D, K]. The tangents are given up."""
    return torch.stack([_inner(pushed.pop(name), slope) for name, slope in gradient.items()]).sum(0)


def _adjoint_directions(scores: Tensor, weights: Tensor, seed: int) -> Tensor:
    """Directions aligned with the scores, a plain random one, and a mixture that shows the tangent's rounding."""
    draw = torch.Generator().manual_seed(seed)
    aligned = _aligned(scores, min(len(scores), AT_ONCE), draw)
    plain = torch.randn(aligned.shape[1:], generator=draw, dtype=torch.float64)
    return torch.cat([aligned, plain[None], (0.6 * aligned[0] + 0.7 * plain)[None]]).to(weights)


def _adjoint(name: str, scores: Tensor, directions: Tensor, slopes: Tensor, dtype: torch.dtype) -> list[Check]:
    """⟨τ, v⟩ against ⟨∇φ, θ̇⟩, [D, K]; the last direction is a mixture of the first and the one before it.

    A tangent is linear in its direction, so what the mixture's differs by from the mixed tangents is rounding alone.
    """
    noise = (slopes[-1] - 0.6 * slopes[0] - 0.7 * slopes[-2]).abs()
    predicted, scale = _predicted(scores, directions[:-1])
    what = f"scores against a forward tangent along {len(directions) - 1} directions"
    return compare(name, what, predicted, slopes[:-1], noise.expand_as(predicted), scale, ADJOINT[dtype])


def _retrained(config: VerifyConfig, run: Opened, scores: Tensor, bars: Bars) -> list[Check]:
    """Central differences at the run's own precision."""
    if not config.directions:
        return [Check("retraining", "not checked", "left out by --directions 0")]
    if _dtype(run.loaded.initial.params) not in RETRAINED:
        return [Check("retraining", "not checked", COARSE)]
    training, taken = run.loaded.training, 0

    def show(state: State) -> None:
        nonlocal taken
        taken += 1
        steps = len(training.stream)
        bars.move("retrain", taken, f"run {-(-taken // steps)}", 18 * config.directions * steps)

    precision = run.loaded.initial.params
    return _differences(
        "retraining", training, precision, run.loaded.queries, scores, config.directions, config.seed + 1, show
    )


def _differences(
    name: str, training: Training, params: Params, queries: Queries, scores: Tensor, count: int, seed: int,
    observe: Callable[[State], None] = lambda state: None,
) -> list[Check]:  # fmt: skip
    """⟨τ, v⟩ against dφ(w + hv)/dh for `count` directions."""
    draw = torch.Generator().manual_seed(seed)
    dtype = _dtype(params)
    tolerance = RETRAINED[dtype]
    groups = min(len(scores), count)
    directions = torch.stack([_aligned(scores, groups, draw)[i % groups] for i in range(count)]).to(training.weights)
    predicted, scale = _predicted(scores, directions)
    measured = []
    for direction, size, slope in zip(directions, scale, predicted):

        def values(h: float, direction: Tensor = direction) -> Tensor:
            final = check.train(training, params, training.weights + h * direction, observe)
            return queries.values(final.params).cpu()

        eps = torch.finfo(dtype).eps
        measured.append(extrapolated_slope(values, _sizes(dtype), eps, size * tolerance / 2, slope))
    slopes, noises = torch.stack([m.slope for m in measured]), torch.stack([m.uncertainty for m in measured])
    what = f"scores against {sum(m.trainings for m in measured)} retrainings along {count} directions"
    return compare(name, what, predicted, slopes, noises, scale, tolerance)


def _sizes(dtype: torch.dtype) -> list[float]:
    if dtype == torch.float64:
        return [1e-2 / 4**i for i in range(7)]
    return [0.16 / 2**i for i in range(9)]


@dataclasses.dataclass(frozen=True)
class _First:
    """The first steps of a stream."""

    stream: Stream
    steps: int

    def __len__(self) -> int:
        return min(self.steps, len(self.stream))

    def __getitem__(self, step: int) -> Batch:
        return self.stream[step]


def _shortened(config: VerifyConfig, run: Opened, bars: Bars) -> list[Check]:
    """The first steps of the run in float64: the sweep against a forward tangent and against retraining."""
    if not config.steps:
        return [Check("float64", "not checked", "left out by --steps 0")]
    loaded = _in_float64(run)
    training = loaded.training._replace(stream=_First(loaded.training.stream, config.steps))
    queries = Queries(loaded.queries.columns[:SHORT_COLUMNS])
    params, taken = loaded.initial.params, 0

    def show(state: State) -> None:
        nonlocal taken
        taken += 1
        bars.move("float64", taken, total=15 * max(1, config.directions) * len(training.stream))

    _, scores = metagradient(training, params, queries)
    directions = _adjoint_directions(scores, training.weights, config.seed)
    slopes = []
    for group in _groups(directions, loaded.initial):
        final, pushed = check.forward_tangent(training, params, group, show)
        slopes.append(_slopes(pushed, queries(final.params)[1]))
    checks = _adjoint("float64 adjoint", scores, directions, torch.cat(slopes), torch.float64)
    seed, count = config.seed + 1, max(1, config.directions)
    return checks + _differences("float64 retraining", training, params, queries, scores, count, seed, show)


def _in_float64(run: Opened) -> Loaded:
    loaded = assemble(dataclasses.replace(with_queries(run.config), dtype="float64"))
    kinds = {leaf.dtype for leaf in tree.leaves((loaded.initial, loaded.training.weights)) if leaf.is_floating_point()}
    if kinds != {torch.float64}:
        raise TypeError(f"the model or the optimizer cannot be cast to float64, it has {sorted(map(str, kinds))}")
    return loaded


def _aligned(scores: Tensor, groups: int, draw: torch.Generator) -> Tensor:
    """Directions of random magnitude with the signs of the scores, so that nothing in ⟨τ, v⟩ cancels, [groups, …].

    Group i has the signs of the sum of the columns i, i + groups, …, each of unit norm.
    """
    flat = scores.flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    sums = torch.stack([unit[group::groups].sum(0) for group in range(groups)])
    magnitudes = torch.randn(sums.shape, generator=draw, dtype=torch.float64).abs()
    return torch.where(sums < 0, -magnitudes, magnitudes).view(groups, *scores.shape[1:])


def _predicted(scores: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """⟨τ_k, v_d⟩ and what its error is relative to, the larger of |⟨τ, v⟩| and ‖τ‖ · rms(v), [D, K] each."""
    taus, vs = scores.double().flatten(1), directions.double().cpu().flatten(1)
    slopes = vs @ taus.T
    size = vs.square().mean(1).sqrt()[:, None] * taus.norm(dim=1)
    return slopes, torch.maximum(slopes.abs(), size)


def _dtype(params: Params) -> torch.dtype:
    return next(iter(params.values())).dtype


def _inner(tangents: Tensor, gradients: Tensor) -> Tensor:
    """⟨θ̇_d, g_k⟩ in float64, [D, K]."""
    return (tangents.flatten(1).double() @ gradients.flatten(1).double().T).cpu()
