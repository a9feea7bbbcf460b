"""Laws that every unlearning method obeys, on a tiny float64 model of their own: for the list, and for a user's file.

    gradient   ∇_θ F and ∂F/∂c agree with central differences: fails for a loss with a `detach`
    ones       weights of one give the bits of no weights, every time
    zero       a row whose weights are all 0 has no say: other tokens in it change nothing
    padding    more padding, of another token, changes nothing
    order      the units of a batch may come in any order, and the slopes of the weights move with them
    parts      micro-batches add up to the batch, where the method says so
    length     rows twice as long with the same token losses have the same F, where the method says so
    linear     F is linear in the coefficients, where the method says so

F stands alone in them: the retain term is left out, or a small F would hide behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import Batch, coefficients, micro_batches
from retrograd.data.pairs import FORGET, PairStream
from retrograd.lm.model import CausalLM, causal_objective, trainable
from retrograd.unlearn.method import Method, Unlearning
from retrograd.unlearn.reference import perturbed, reference_of
from retrograd.unlearn.settings import Settings

__all__ = ["LAWS", "broken_laws"]

_CLOSE = 1e-11
_VOCABULARY = 22


@dataclass(frozen=True, eq=False)
class _Case:
    """A method on a batch of four forget and four retain rows, away from its reference."""

    method: Method
    settings: Settings
    objective: Unlearning
    params: Params
    stream: PairStream

    @property
    def batch(self) -> Batch:
        return self.stream[1]

    @property
    def drawn(self) -> Tensor:
        """Coefficients of data weights from 0.3 to 1.3."""
        return coefficients(self.batch, 0.3 + torch.rand(self.stream.weights.shape, generator=_draw(4), dtype=_TYPE))


def broken_laws(method: Method, settings: Settings | None = None, names: Sequence[str] = ()) -> list[str]:
    """The laws that a method breaks, each with its numbers; none if all is well.

    Args:
        settings: The method's defaults if not given; the retain coefficient is left out.
        names: Of the laws to try; all when empty.

    >>> from retrograd.unlearn.methods import METHODS
    >>> broken_laws(METHODS["wga"])
    []
    """
    settings = replace(settings or method.defaults, retain=0.0)
    lm = _model(False)
    rows = [_rows(count, seed) for count, seed in ((9, 1), (7, 2), (9, 3))]
    stream = PairStream(
        rows[0], rows[1], rows[2] if method.alternatives else None, forget_batch=4, retain_batch=4, dtype=_TYPE
    )
    case = _Case(method, settings, *_started(method, settings, lm, stream), stream)
    broken = {name: LAWS[name](case) for name in names or LAWS}
    return [f"{method.name} breaks the law of {name}: {why}" for name, why in broken.items() if why is not None]


def _gradient(case: _Case) -> str | None:
    params, inputs, c = case.params, case.batch.inputs, case.drawn
    _, slopes, by_weight = _slopes(case, inputs, c)
    along = {name: torch.randn(p.shape, generator=_draw(5), dtype=_TYPE) for name, p in params.items()}
    push = torch.rand(c.shape, generator=_draw(6), dtype=_TYPE) * case.batch.scale

    def value(h: float, k: float) -> Tensor:
        return case.objective({name: p + h * along[name] for name, p in params.items()}, inputs, c + k * push)

    h = 1e-5
    pairs = {
        "parameters": (tree.dot(slopes, along), (value(h, 0.0) - value(-h, 0.0)) / (2 * h)),
        "weights": (torch.sum(by_weight * push), (value(0.0, h) - value(0.0, -h)) / (2 * h)),
    }
    for name, (computed, measured) in pairs.items():
        if not float((computed - measured).abs()) <= 1e-6 * float(measured.abs()):
            return (
                f"along one direction of the {name} it is {float(computed):.9g}, by differences {float(measured):.9g}"
            )
    return None


def _ones(case: _Case) -> str | None:
    inputs = case.batch.inputs
    weighted = _slopes(case, inputs, coefficients(case.batch, case.stream.weights))[:2]
    unweighted = _slopes(case, inputs, inputs["scale"])[:2]
    if tree.digest(weighted) == tree.digest(unweighted):
        return None
    return f"weights of one give {float(weighted[0]):.17g}, no weights {float(unweighted[0]):.17g}"


def _zero(case: _Case) -> str | None:
    inputs, c = dict(case.batch.inputs), case.drawn
    silent = torch.zeros(len(c), dtype=torch.bool)
    silent[(inputs["side"] == FORGET).nonzero()[1]] = True
    c = c.masked_fill(silent[:, None], 0.0)
    before = _slopes(case, inputs, c)[:2]
    inputs["input_ids"] = torch.where(silent[:, None], inputs["input_ids"].flip(0) % 19 + 2, inputs["input_ids"])
    return _differ("other tokens in a row of weight 0", _slopes(case, inputs, c)[:2], before)


def _padding(case: _Case) -> str | None:
    inputs, c = dict(case.batch.inputs), case.drawn
    for name, value in (("input_ids", 5), ("target_mask", False), ("scale", 0.0)):
        inputs[name] = F.pad(inputs[name], (0, 3), value=value)
    plain, padded = _slopes(case, case.batch.inputs, c), _slopes(case, inputs, F.pad(c, (0, 3)))
    return _differ("three columns of padding", (*padded[:2], padded[2][:, : c.shape[1]]), plain)


def _order(case: _Case) -> str | None:
    c = case.drawn
    order = torch.arange(len(c)).view(case.stream.units, -1).flip(0).flatten()
    straight = _slopes(case, case.batch.inputs, c)
    reordered = _slopes(case, tree.map(lambda x: x[order], case.batch.inputs), c[order])
    return _differ("units in another order", reordered, (*straight[:2], straight[2][order]))


def _parts(case: _Case) -> str | None:
    if not case.method.additive:
        return None
    weights = torch.rand(case.stream.weights.shape, generator=_draw(7), dtype=_TYPE)
    parts = micro_batches(case.batch, 2 * case.stream.unit)
    each = [_slopes(case, part.inputs, coefficients(part, weights))[:2] for part in parts]
    whole = _slopes(case, case.batch.inputs, coefficients(case.batch, weights))[:2]
    return _differ(f"{len(parts)} micro-batches", tree.map(lambda *x: sum(x), *each), whole)


def _length(case: _Case) -> str | None:
    """Of a model whose predictions see no context, rows a b a and a b a b a have the same mean losses."""
    if not case.method.token_mean:
        return None
    lm, values = _model(True), []
    sides: tuple[tuple[tuple[int, int], ...], ...] = (((3, 4), (5, 9)), ((6, 7), (8, 2)), ((10, 11), (12, 13)))
    for repeats in (1, 2):
        rows = [[[a, b] * repeats + [a] for a, b in side] for side in sides]
        other = rows[2] if case.method.alternatives else None
        stream = PairStream(rows[0], rows[1], other, forget_batch=2, retain_batch=2, epochs=2, dtype=_TYPE)
        objective, params = _started(case.method, case.settings, lm, stream)
        params = {name: lm.params[name] if "attention.dense" in name else p for name, p in params.items()}
        values.append(objective(params, stream[1].inputs, stream[1].scale))
    return _differ("rows twice as long", *values[::-1])


def _linear(case: _Case) -> str | None:
    if not case.method.linear:
        return None
    ones, drawn = coefficients(case.batch, case.stream.weights), case.drawn
    values = [case.objective(case.params, case.batch.inputs, c) for c in (ones, drawn, 2 * ones - 3 * drawn)]
    return _differ("a combination of two weightings", values[2], 2 * values[0] - 3 * values[1])


LAWS: dict[str, Callable[[_Case], str | None]] = {
    "gradient": _gradient,
    "ones": _ones,
    "zero": _zero,
    "padding": _padding,
    "order": _order,
    "parts": _parts,
    "length": _length,
    "linear": _linear,
}
"""Each law by name: case → what is wrong, or None."""

_TYPE = torch.float64


def _differ(what: str, measured: Any, expected: Any) -> str | None:
    change, size = float(tree.norm(tree.map(torch.sub, measured, expected))), float(tree.norm(expected))
    return None if change <= _CLOSE * size else f"{what}: values and gradients change by {change:.3g} of {size:.3g}"


def _slopes(case: _Case, inputs: Any, c: Tensor) -> tuple[Tensor, Params, Tensor]:
    """F, its gradient, and its slope in the coefficients."""
    live = {name: p.detach().requires_grad_() for name, p in case.params.items()}
    c = c.detach().requires_grad_()
    value = case.objective(live, inputs, c)
    *grads, slopes = torch.autograd.grad(value, [*live.values(), c], materialize_grads=True)
    return value.detach(), dict(zip(live, grads)), slopes


def _started(method: Method, settings: Settings, lm: CausalLM, stream: PairStream) -> tuple[Unlearning, Params]:
    reference = reference_of(lm)
    fitted = method.fitted_to(lm, reference, stream, settings)
    return method.objective(lm, reference, settings, fitted), perturbed(lm.params, 0.1, 3)


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows(count: int, seed: int) -> list[list[int]]:
    draw = _draw(seed)
    sizes = torch.randint(3, 7, (count,), generator=draw).tolist()
    return [torch.randint(2, _VOCABULARY, (size,), generator=draw).tolist() for size in sizes]


@cache
def _model(blind: bool) -> CausalLM:
    """A GPT-NeoX of two blocks; `blind` takes away what attention adds, so that a prediction sees one token."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=_VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=_TYPE).eval()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                # larger than at initialisation, or all predictions would be alike
                parameter.add_(0.15 * torch.randn_like(parameter))
                if blind and "attention.dense" in name:
                    parameter.zero_()
    return CausalLM(module, trainable(module)[0], *causal_objective(module))
