"""Which engine differentiates a language model: `double`, or `blocks` where that does not fit.

With G the bytes of a micro-batch's double graph, L layers, x the bytes of one hidden state [B, T, D] and K queries,

    double  G          blocks  (1 + K)(L + 2)·x + G/L

of activations are live. G is measured, not derived: everything that autograd saves for the model's gradient and for the
gradient's graph on one row of 4, 8 and 12 tokens is counted, a + bT + cT² through the three is what a row of T needs,
and the second way back holds cotangents of it besides. Peaks of whole processes were 0.9 to 1.0 of the figure for
`double` on rows of one length, where joined rows save a tenth more, and 1.0 for `blocks` where ḡ is given
(bench/engines.py).

With h multiplications a token in a trained vocabulary head and b in all layers, a step and its pullback take, in units
of a forward pass and where the moments give the gradient back,

    double  (10 + 7(K−1))·h + (12 + 6(K−1))·b          blocks  (10 + 6(K−1))·h + (16 + 8(K−1))·b
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import grad

from retrograd.core import tree
from retrograd.core.engine import Blocks, Double
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Engine
from retrograd.lm.chain import VocabularyHead, decoder_chain
from retrograd.lm.layout import Layout
from retrograd.lm.model import trainable
from retrograd.lm.proof import form_of
from retrograd.lm.spans import inner

if TYPE_CHECKING:
    from retrograd.accel.compiled import Compiled

__all__ = [
    "ENGINES", "Choice", "Curve", "Load", "blocks_bytes", "choose_engine", "compiled_engine", "graph_bytes",
    "graph_curve",
]  # fmt: skip

ENGINES = ("auto", "double", "blocks")
_LENGTHS = (4, 8, 12)  # tokens of the rows that the graph is measured on
_PENDING = 2.0  # peak of the second way back, in what autograd saves; measured 1.9 to 2.1 by depth, width and length
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}  # what compiling may change, of the norm of H ḡ

_Objective = Callable[[Params, Any, Tensor], Tensor]


class Load(NamedTuple):
    """What `double` is weighed by.

    Args:
        rows, length: Of a micro-batch, and tokens of its longest row.
        queries: That are carried at once.
        budget: Bytes of activations that fit.
        proofs, free: Bytes that the proofs before the first step hold of tensors as large as the model, and that they
            may; 0 where a step holds more.
    """

    rows: int
    length: int
    queries: int
    budget: int
    proofs: int = 0
    free: int = 0


class Choice(NamedTuple):
    """An engine, its name, and why it was chosen, in one line."""

    engine: Engine
    name: str
    why: str
    compiled: Compiled | None = None


def choose_engine(asked: str, module: nn.Module, objective: _Objective, load: Load | None = None) -> Choice:
    """The engine of a name; for "auto", `double` where its graph fits, else `blocks` if possible.

    Raises:
        ValueError: If there is no such engine, or `blocks` is asked for and the model is no chain of layers, or the
            objective says by `chained = False` that it is another one than the chain's weighted cross-entropy.
    """
    if asked not in ENGINES:
        raise ValueError(f"unknown engine {asked!r}; the engines are {', '.join(ENGINES)}")
    if not getattr(objective, "chained", True):
        if asked == "blocks":
            raise ValueError(
                "engine 'blocks' computes the weighted cross-entropy of a chain of layers, and this objective is "
                "another one: take 'double'"
            )
        return Choice(Double(objective), "double", "its objective is not the cross-entropy that blocks computes")
    if asked == "double":
        return Choice(Double(objective), asked, "asked for")
    apart = _apart(module, load.rows, load.length) if load is not None else ""
    if apart and asked == "auto":
        return Choice(Double(objective), "double", apart)
    if apart:
        raise ValueError(f"--engine blocks needs rows that enter together: {apart}. Take --engine double.")
    if asked == "blocks":
        return Choice(Blocks(decoder_chain(module)), asked, "asked for")
    assert load is not None, "auto weighs a load"
    try:
        graph = graph_bytes(module, objective, load.rows, load.length)
    except (ValueError, RuntimeError) as error:
        return Choice(Double(objective), "double", f"what it needs could not be measured: {_told(error)}")
    needs = f"double takes about {_size(graph)} of activations, {_size(max(0, load.budget))} may be used"
    if load.proofs > load.free:
        needs = (
            f"with double the proofs before the first step hold about {_size(load.proofs)} more than the model on "
            f"every rank, for there they have it whole, and {_size(load.free)} may be used"
        )
    elif graph <= load.budget:
        return Choice(Double(objective), "double", needs)
    try:
        chain = decoder_chain(module)
    except ValueError as error:
        return Choice(Double(objective), "double", f"{needs}; but {_told(error)}")
    hidden = _hidden_bytes(module, load)
    layers = max(1, len(chain.links) - 1)
    small = blocks_bytes(graph, layers, hidden, load.queries)
    return Choice(Blocks(chain), "blocks", f"{needs}; blocks takes about {_size(small)}")


def compiled_engine(
    module: nn.Module, shape: tuple[int, int], proofs: Sequence[Batch], queries: int, packed: bool = False
) -> Choice:
    """The `blocks` engine with the passes over its layers compiled.

    Args:
        shape: Rows and tokens of a large batch, which the code is optimised for.
        proofs: Batches whose gradient and pullback are computed, compiled and eager, and have to agree.
        packed: Whether the batches' rows are packed documents.
    Raises:
        ValueError: If retrograd.accel is not installed, there is no compiler, the model is no chain of layers, no two
            of them are alike, or they cannot be compiled to what they compute.
    """
    try:
        from retrograd.accel.compiled import Compiled, no_compiler
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--compile needs the compiled passes of retrograd.accel, and they are not installed ({error}). Install "
            "the whole package, or leave --compile out."
        ) from error
    reason = no_compiler(next(iter(trainable(module)[0].values())).device)
    if reason is not None:
        raise ValueError(f"--compile cannot be used here: {reason}. Leave --compile out.")
    if apart := _apart(module, *shape):
        raise ValueError(f"--compile needs rows that enter together: {apart}. Leave --compile out.")
    chain = decoder_chain(module, alike=True)
    head = chain.head
    compiled = Compiled(chain.links, head.layout.sizes(*shape, packed) if isinstance(head, VocabularyHead) else shape)
    if not compiled.calls:
        raise ValueError("--compile has nothing to share: no two layers are of one structure. Leave --compile out.")
    for batch in proofs:
        try:
            _prove_equal(module, Blocks(chain, compiled), Blocks(chain), batch, queries)
        except RuntimeError as error:
            raise ValueError(
                f"--compile cannot be used with {type(inner(module)).__name__}: {_told(error)} Leave --compile out."
            ) from error
    return Choice(Blocks(chain, compiled), "blocks", f"asked for by --compile: {compiled.told}", compiled)


def _prove_equal(module: nn.Module, chosen: Engine, eager: Engine, batch: Batch, queries: int) -> None:
    """Refuses a chosen engine whose H ḡ or scores are not those of the other."""
    params = trainable(module)[0]
    weights = torch.ones(int(batch.index.max()) + 1, dtype=batch.scale.dtype, device=batch.scale.device)

    def along(grads: Params) -> Params:
        return {name: torch.stack([g] * max(1, queries)) for name, g in grads.items()}

    def second(engine: Engine) -> tuple[Params, Tensor]:
        grads, pull = engine.linearize(params, [batch], weights, None)
        return pull(along(grads))

    pulled, expected = second(chosen), second(eager)
    for what, compiled, plain in zip(("H ḡ", "scores"), pulled, expected, strict=True):
        difference, size = float(tree.norm(tree.map(torch.sub, compiled, plain))), float(tree.norm(plain))
        if not difference <= _ROUNDING.get(next(iter(params.values())).dtype, 0.1) * size:
            raise ValueError(
                f"--compile changes the results of {type(inner(module)).__name__} beyond rounding: {what} by "
                f"{difference:.2g} of {size:.2g}. Leave --compile out."
            )


def _apart(module: nn.Module, rows: int, length: int) -> str:
    """Why rows of this length enter one after the other; empty where they do not."""
    if rows < 2 or not hasattr(inner(module), "get_output_embeddings"):
        return ""
    layout = Layout(module, form_of(module))
    return layout.why_alone if layout.alone(length) else ""


def graph_bytes(module: nn.Module, objective: _Objective, rows: int, length: int) -> int:
    """Bytes of activations that `double` holds at its peak for `rows` rows of `length` tokens."""
    return graph_curve(module, objective).double(rows, length)


def blocks_bytes(graph: int, layers: int, hidden: int, queries: int) -> int:
    """Bytes of activations that `blocks` holds where `double` holds `graph`; `hidden` those of one hidden state."""
    return (1 + queries) * (layers + 2) * hidden + graph // layers


class Curve(NamedTuple):
    """Bytes that autograd holds for a row of T tokens: constant + slope·T + bend·T²."""

    constant: float
    slope: float
    bend: float

    def at(self, length: int) -> float:
        return max(0.0, self.constant + self.slope * length + self.bend * length**2)

    def double(self, rows: int, length: int) -> int:
        """At the peak of a second way back, if the curve is of a gradient with its graph."""
        return int(_PENDING * self.at(length) * rows)


def graph_curve(module: nn.Module, objective: _Objective, *, twice: bool = True) -> Curve:
    """Of a gradient with its graph; of the loss alone where it is not differentiated twice."""
    near, middle, far = (_saved_bytes(module, objective, tokens, twice) for tokens in _LENGTHS)
    step = _LENGTHS[1] - _LENGTHS[0]
    bend = (far - 2 * middle + near) / (2 * step**2)
    slope = (middle - near) / step - bend * (_LENGTHS[0] + _LENGTHS[1])
    return Curve(near - slope * _LENGTHS[0] - bend * _LENGTHS[0] ** 2, slope, bend)


def _saved_bytes(module: nn.Module, objective: _Objective, tokens: int, twice: bool = True) -> int:
    """Bytes that autograd holds on one row; what the module owns is not counted."""
    params = trainable(module)[0]
    own = {x.untyped_storage().data_ptr() for x in (*params.values(), *module.parameters(), *module.buffers())}
    held: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # the tensor itself would hold its own graph

    first = next(iter(params.values()))
    ids = torch.arange(1, tokens + 1, device=first.device)[None] % len(inner(module).get_input_embeddings().weight)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    live = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    factors = mask.to(torch.promote_types(first.dtype, torch.float32)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.enable_grad():
        loss = objective(live, {"input_ids": ids, "target_mask": mask}, factors)
        grads = grad(loss, list(live.values()), create_graph=True, materialize_grads=True) if twice else ()
    del loss, grads
    return sum(held.values())


def _hidden_bytes(module: nn.Module, load: Load) -> int:
    embedding = inner(module).get_input_embeddings().weight
    return load.rows * load.length * embedding.shape[1] * embedding.element_size()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _told(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
