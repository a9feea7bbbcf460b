"""Sizes of GPT-NeoX models, and what a step of each takes by arithmetic: floating-point operations and bytes.

With L layers of width D, V words, B rows of T tokens, and a product of m×k by k×n counted as 2mkn operations:

    body = 2·12·L·D²·B·T + 4·L·B·T²·D       (matrices; attention scores and their use, whole squares: no causal saving)
    head = 2·V·D·B·(T−1)                    forward = body + head
    gradient                                3·forward
    gradient and its pullback, needed       9·forward: what reverse over reverse takes at least
    the same of SGD, done by `double`       9·body + 9·head
    the same of SGD, done by `blocks`       12·body + 8·head − 20·L·D²·B·T: a layer's last products take fewer pullbacks

SGD's pullback needs no gradient, for its update is linear in it. Elementwise work is not counted. tests/test_bench_gpu.py counts the products of a real step and finds these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["COPIES", "SHAPES", "TOYS", "Costs", "Shape", "extrapolated", "needed_bytes"]

COPIES = {"plain": 2, "train": 4, "double": 6, "blocks": 7}
"""Sets of parameters that live at once: the model's own; with plain training, gradients; with a step, the state before
and after; with a pullback, the state, λ, g, ḡ and H ḡ. `blocks` is proved against `double` before, which takes one more."""

_SPARE = 3 << 29  # of the library's own buffers: 1.5 GiB


class Shape(NamedTuple):
    """A model, and a batch of `rows` rows of `length` tokens."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    rows: int = 4
    length: int = 104

    @property
    def parameters(self) -> int:
        inside = 12 * self.width**2 + 13 * self.width
        return self.layers * inside + 2 * self.vocabulary * self.width + 2 * self.width

    @property
    def body(self) -> int:
        """Operations of a forward pass through the layers; a row's last token predicts nothing."""
        tokens, square = self.rows * (self.length - 1), self.rows * (self.length - 1) ** 2
        return 24 * self.layers * self.width**2 * tokens + 4 * self.layers * square * self.width

    @property
    def head(self) -> int:
        """Operations of the vocabulary projection."""
        return 2 * self.vocabulary * self.width * self.rows * (self.length - 1)

    def operations(self, what: str) -> int:
        """Operations that a step needs: "plain", "train" or "gradient"; for a pullback, the engine's name."""
        return (3 if what in ("plain", "train", "gradient") else 9) * (self.body + self.head)

    def done(self, what: str) -> int:
        """Operations that a step does, repeats included."""
        if what == "blocks":
            saved = 20 * self.layers * self.width**2 * self.rows * (self.length - 1)
            return 12 * self.body + 8 * self.head - saved
        return 9 * (self.body + self.head) if what == "double" else self.operations(what)

    def sizes(self) -> dict[str, int]:
        """As `tools.gpt_neox` takes them."""
        return {name: getattr(self, name) for name in ("layers", "width", "heads", "vocabulary", "length")}


SHAPES = {
    "160M": Shape(12, 768, 12, 50_304),
    "1.4B": Shape(24, 2048, 16, 50_304),
    "6.9B": Shape(32, 4096, 32, 50_432),
}  # fmt: skip
TOYS = {
    "160M": Shape(2, 32, 2, 256, 2, 24), "1.4B": Shape(3, 48, 2, 256, 2, 24), "6.9B": Shape(3, 64, 2, 256, 2, 24),
}  # fmt: skip


def needed_bytes(shape: Shape, what: str, entry_bytes: int, graph_bytes: int) -> int:
    """Device memory that a measurement is expected to take.

    Args:
        what: "plain", "train", "double" or "blocks".
        entry_bytes: Of one parameter.
        graph_bytes: What `double` holds for this batch, by `lm.engines.graph_bytes`.
    """
    share = {"double": 1.0, "blocks": 2 / shape.layers}.get(what, 0.5)
    return int(COPIES[what] * shape.parameters * entry_bytes + share * graph_bytes + _SPARE)


class Costs(NamedTuple):
    """Seconds of one training step, its digest, one pullback, and of a state's way into a slot and back.

    waited: of `put`, what passes before the next step can begin; the rest of the copy goes on beside the computation.
    """

    step: float
    digest: float
    pullback: float
    waited: float
    put: float
    get: float


def extrapolated(plan: Sequence[Any], steps: int, costs: Costs) -> dict[str, float]:
    """Seconds of a run of `steps` steps by a replay plan, from the seconds of its parts.

    The plan is walked action by action, with one copy under way at most, as the product has it; state 0 is never
    copied. The query, one gradient, is left out, and restores are not read ahead.
    """
    from retrograd.core import plan as plans

    now = copied = trained = 0.0
    for action in plan:
        match action:
            case plans.Advance(start, stop):
                now += (stop - start) * (costs.step + costs.digest)
            case plans.Turn():
                now = trained = max(now + costs.step + costs.digest, copied)
            case plans.Snapshot(t) if t > 0:
                now = max(now, copied) + costs.waited
                copied = now + costs.put - costs.waited
            case plans.Restore(t) if t > 0:
                now += costs.get
            case plans.Reverse():
                now += costs.pullback
    cost = plans.check(plan, steps)
    return {"train": trained, "reverse": now - trained, "whole": now, "slots": cost.slots, "replays": cost.replays}
