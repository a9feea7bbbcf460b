"""Which engine differentiates a language model: `double`, or `blocks` where that does not fit or takes longer.

With G the bytes of a micro-batch's double graph, L layers, x the bytes of one hidden state [B, T, D] and K queries,

    double  G          blocks  (1 + K)(L + 2)·x + G/L

of activations are live. G is measured, not derived: everything that autograd saves for the model's gradient and for the
gradient's graph on one row of 4, 8 and 12 tokens is counted, a + bT + cT² through the three is what a row of T needs,
and the second way back holds cotangents of it besides. Peaks of whole processes were 0.8 to 1.1 of the figure for
`double` and 0.9 to 1.3 for `blocks` (bench/engines.py).

With h multiplications a token in a trained vocabulary head and b in all layers, a step and its pullback take, in units
of a forward pass and where the moments give the gradient back,

    double  (13 + 6(K−1))·h + (12 + 6(K−1))·b          blocks  (11 + 6(K−1))·h + (16 + 8(K−1))·b

so `blocks` takes less where h > (1 + K)·b: small models with large vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import grad

from retrograd.core.engine import Blocks, Double
from retrograd.core.optim import Params
from retrograd.core.step import Engine
from retrograd.lm.blocks import decoder_chain
from retrograd.lm.model import has_plain_head, inner, trainable

__all__ = ["ENGINES", "Choice", "Load", "choose_engine", "graph_bytes"]

ENGINES = ("auto", "double", "blocks")
_LENGTHS = (4, 8, 12)  # tokens of the rows that the graph is measured on
_PENDING = 1.75  # peak of the second way back, in what autograd saves; measured 1.5 to 1.8 by depth, width and length

_Objective = Callable[[Params, Any, Tensor], Tensor]


class Load(NamedTuple):
    """Rows of a micro-batch, tokens of its longest row, queries, and the bytes of activations that fit.

    spared: whether the sweep knows the gradients from the moments.
    """

    rows: int
    length: int
    queries: int
    budget: int
    spared: bool = False


class Choice(NamedTuple):
    """An engine, its name, and why it was chosen, in one line."""

    engine: Engine
    name: str
    why: str


def choose_engine(asked: str, module: nn.Module, objective: _Objective, load: Load | None = None) -> Choice:
    """The engine of a name; for "auto", `double` where its graph fits and it is faster, else `blocks` if possible.

    Raises:
        ValueError: If there is no such engine, or `blocks` is asked for and the model is no chain of layers.
    """
    if asked not in ENGINES:
        raise ValueError(f"unknown engine {asked!r}; the engines are {', '.join(ENGINES)}")
    if asked == "double":
        return Choice(Double(objective), asked, "asked for")
    if asked == "blocks":
        return Choice(Blocks(decoder_chain(module)), asked, "asked for")
    assert load is not None, "auto weighs a load"
    try:
        graph = graph_bytes(module, objective, load.rows, load.length)
    except (ValueError, RuntimeError) as error:
        return Choice(Double(objective), "double", f"what it needs could not be measured: {_told(error)}")
    needs = f"double takes about {_size(graph)} of activations, {_size(max(0, load.budget))} may be used"
    if graph <= load.budget and not (load.spared and _mostly_head(module, load.queries)):
        return Choice(Double(objective), "double", needs)
    if graph <= load.budget:
        needs += ", but most of the work is the vocabulary head, of which blocks does less"
    try:
        chain = decoder_chain(module)
    except ValueError as error:
        return Choice(Double(objective), "double", f"{needs}; but {_told(error)}")
    hidden = _hidden_bytes(module, load)
    layers = max(1, len(chain.links) - 1)
    small = (1 + load.queries) * (layers + 2) * hidden + graph // layers
    return Choice(Blocks(chain), "blocks", f"{needs}; blocks takes about {_size(small)}")


def graph_bytes(module: nn.Module, objective: _Objective, rows: int, length: int) -> int:
    """Bytes of activations that `double` holds at its peak for `rows` rows of `length` tokens."""
    sizes = [_saved_bytes(module, objective, tokens) for tokens in _LENGTHS]
    near, middle, far = sizes
    step = _LENGTHS[1] - _LENGTHS[0]
    bend = (far - 2 * middle + near) / (2 * step**2)
    slope = (middle - near) / step - bend * (_LENGTHS[0] + _LENGTHS[1])
    saved = near + slope * (length - _LENGTHS[0]) + bend * (length**2 - _LENGTHS[0] ** 2)
    return int(_PENDING * max(0.0, saved) * rows)


def _saved_bytes(module: nn.Module, objective: _Objective, tokens: int) -> int:
    """Bytes that autograd holds once a gradient has its graph, on one row; what the module owns is not counted."""
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
        grads = grad(loss, list(live.values()), create_graph=True, materialize_grads=True)
    del loss, grads
    return sum(held.values())


def _mostly_head(module: nn.Module, queries: int) -> bool:
    """Whether a trained vocabulary head outweighs all layers by so much that `blocks` takes less time."""
    if not has_plain_head(module):
        return False
    ends = [inner(module).get_input_embeddings(), inner(module).get_output_embeddings()]
    outside = {id(p) for end in ends for p in end.parameters()}
    body = sum(p.numel() for p in module.parameters() if p.ndim > 1 and id(p) not in outside)
    head = ends[1].weight
    return bool(head.requires_grad) and head.numel() > (1 + queries) * body


def _hidden_bytes(module: nn.Module, load: Load) -> int:
    embedding = inner(module).get_input_embeddings().weight
    return load.rows * load.length * embedding.shape[1] * embedding.element_size()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _told(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
