"""A function and its derivatives as two compiled graphs, early and late, good for all sizes of a batch.

A pass over a link has two parts: what is known on the way forward, and what has to wait for the cotangents. Both are
traced together, once, to a graph of aten operations in which the sizes that vary are symbols (`make_fx`). That happens
below autograd: the graph holds derivatives as plain arithmetic, and what nothing asks for, the parameters' own gradient
among it, is dropped. Then it is cut in two. Long matrix products on the way forward, or their sums, are handed to the
late part; the rest is computed again there. torch's inductor compiles both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from retrograd.core import tree

__all__ = ["Asked", "Pair", "Shape", "compiled_pair"]

Shape = tuple[int | str, ...]  # numbers, and names of the sizes that vary


class Asked(NamedTuple):
    """What to compile: function(early, late) → (early value, late value), on operands of these frames and shapes.

    shapes, like: of the operands' tensors, early ones first; `like` gives dtype and device.
    hints: a number for each size that varies, which the code is optimised for; it is right for all.
    inner: the inner size from which a matrix product is handed on. Scores of attention, large and short products, are
        computed again.
    """

    function: Callable[[Any, Any], tuple[Any, Any]]
    early: tree.Frame
    late: tree.Frame
    shapes: tuple[Shape, ...]
    like: tuple[tuple[torch.dtype, torch.device], ...]
    hints: dict[str, int]
    inner: int

    @property
    def varies(self) -> bool:
        return any(isinstance(size, str) for shape in self.shapes for size in shape)


class Pair(NamedTuple):
    """early: early tensors → (value, results to hand on). late: early and late tensors, results → value."""

    early: Callable[[list[Tensor]], tuple[Any, list[Tensor]]]
    late: Callable[[list[Tensor]], Any]


def compiled_pair(asked: Asked) -> Pair | None:
    """Both parts compiled; None if what came out does not hold for all sizes that are to vary."""
    from torch._inductor import standalone_compile

    traced = _traced(asked)
    if traced is None:
        return None
    graph, (first, second), environment = traced
    cut = _cut(graph, asked.early.count, first.count, asked.inner)
    given = [[node.meta["val"] for node in part.graph.find_nodes(op="placeholder")] for part in cut]
    if not all(_told_apart(operands) for operands in given):
        return None
    with torch.no_grad():
        parts = [standalone_compile(part, each, donate_graph_module=True) for part, each in zip(cut, given)]
    if environment.guards:
        return None

    def early(tensors: list[Tensor]) -> tuple[Any, list[Tensor]]:
        outputs = parts[0](*tensors)
        return first.around(outputs[: first.count]), list(outputs[first.count :])

    return Pair(early, lambda tensors: second.around(parts[1](*tensors)))


def _told_apart(operands: list[Tensor]) -> bool:
    """Whether sizes that are equal by their hints are the same size: inductor takes them for one, without a word."""
    known: dict[int, Any] = {}
    for size in (size for operand in operands for size in operand.shape):
        number, name = (size.node.hint, size.node.expr) if isinstance(size, torch.SymInt) else (size, size)
        if known.setdefault(number, name) != name:
            return False
    return True


def _traced(asked: Asked) -> tuple[fx.GraphModule, list[tree.Frame], Any] | None:
    """(graph, frames of both values, what had to be assumed of the sizes); None if sizes were assumed equal."""
    from torch._subclasses import FakeTensorMode
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment, frames = ShapeEnv(), list[tree.Frame]()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    operands = [_operand(mode, place, asked) for place in range(len(asked.shapes))]

    def flat(*tensors: Tensor) -> list[Tensor]:
        count = asked.early.count
        values = asked.function(asked.early.around(tensors[:count]), asked.late.around(tensors[count:]))
        frames[:] = [tree.frame(value) for value in values]
        return tree.leaves(values)

    try:
        with mode, torch.no_grad():
            graph = _tidied(make_fx(flat, tracing_mode="symbolic")(*operands))
            graph = _parts_joined(_tidied(make_fx(functionalize(graph), tracing_mode="symbolic")(*operands)))
    except RuntimeError:
        if asked.varies:  # a size that was taken for the batch's and is not
            return None
        raise
    return None if environment.guards else (graph, frames, environment)


def _operand(mode: Any, place: int, asked: Asked) -> Tensor:
    """A tensor without data, some of its sizes symbols."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    shape, (dtype, device) = asked.shapes[place], asked.like[place]
    sizes = [asked.hints[size] if isinstance(size, str) else size for size in shape]
    kinds = [DimDynamic.DUCK if isinstance(size, str) else DimDynamic.STATIC for size in shape]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    empty = torch.empty(sizes, dtype=dtype, device=device)
    return mode.from_tensor(empty, source=ConstantSource(f"operand_{place}"), symbolic_context=context)


def _tidied(graph: fx.GraphModule) -> fx.GraphModule:
    """Without what nothing asks for, nothing twice, each size read where it is known first.

    A size read off a tensor that nobody needs would keep the tensor.
    """
    from torch._functorch.compile_utils import fx_graph_cse

    sizes: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            node.replace_all_uses_with(sizes.setdefault(size.node.expr, node))
    graph.graph.eliminate_dead_code()
    return fx.GraphModule(graph, fx_graph_cse(graph.graph))


def _parts_joined(graph: fx.GraphModule) -> fx.GraphModule:
    """Two parts of one range, each filled up with zeros, joined instead of added.

    So come the derivatives of rotary embeddings, a dozen in a layer. As sums they compile to code that asks for each
    number which part it belongs to.
    """
    aten = torch.ops.aten
    for node in graph.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        parts = sorted((part for x in node.args if (part := _part(x))), key=lambda part: part[:3])
        if len(parts) != 2 or node.kwargs:
            continue
        (dim, start, middle, whole, first), (other_dim, after, end, _, second) = parts
        if dim == other_dim and start == 0 and middle == after and end == whole:
            with graph.graph.inserting_before(node):
                joined = graph.graph.call_function(aten.cat.default, ([first, second], dim))
            joined.meta = dict(node.meta)
            node.replace_all_uses_with(joined)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _part(node: Any) -> tuple[int, int, int, int, fx.Node] | None:
    """(dimension, start, end, its size, what is there) of a node that is zero outside a range of fixed place."""
    if getattr(node, "target", None) is not torch.ops.aten.slice_backward.default:
        return None
    inside, sizes, dim, start, end, step = node.args
    whole = sizes[dim]
    if step != 1 or not all(isinstance(number, int) for number in (start, end, whole)):
        return None
    return dim % len(sizes), start, min(end, whole), whole, inside


def _cut(graph: fx.GraphModule, operands: int, count: int, inner: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The part that needs the first operands only, and the rest, which gets matrix products of the first.

    Args:
        operands: How many are early.
        count: How many values are.
        inner: As in `Asked`.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    values = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
    late = set(placeholders[operands:])
    for node in graph.graph.nodes:
        if any(origin in late for origin in node.all_input_nodes):
            late.add(node)
    assert late.isdisjoint(values[:count]), "what is known on the way forward depends on cotangents"

    def handed(node: fx.Node) -> bool:
        return node not in late and _is_product(node, inner)

    needed = _origins(values[count:], handed)
    kept = [node for node in graph.graph.nodes if node in needed and handed(node)]
    first = _subgraph(graph, placeholders[:operands], [*values[:count], *kept])
    return first, _subgraph(graph, [*placeholders, *kept], values[count:])


def _is_product(node: fx.Node, inner: int) -> bool:
    """Whether a node is a matrix product over `inner` or more, or a sum of such and of biases."""
    aten = torch.ops.aten
    if node.target is aten.add.Tensor:
        terms = [_viewed(x) for x in node.all_input_nodes]
        wide = [term for term in terms if term.target is not aten.expand.default]
        return bool(wide) and all(_is_product(term, inner) for term in wide)
    if node.target not in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default):
        return False
    left: Any = node.args[-2]
    return _number(left.meta["val"].shape[-1]) >= inner


def _viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    aten = torch.ops.aten
    views = (aten.view, aten._unsafe_view, aten.t, aten.transpose, aten.permute)
    while getattr(node.target, "overloadpacket", None) in views:
        node = node.all_input_nodes[0]
    return node


def _number(size: Any) -> int:
    """By the hints: an `int` of a symbol would fix it."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _origins(values: Iterable[fx.Node], given: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """All that values are computed from, back to what is given."""
    origins, open_ = set[fx.Node](), list(values)
    while open_:
        node = open_.pop()
        if node not in origins:
            origins.add(node)
            open_.extend([] if given(node) else node.all_input_nodes)
    return origins


def _subgraph(graph: fx.GraphModule, given: list[fx.Node], values: list[fx.Node]) -> fx.GraphModule:
    """A graph from given nodes, as operands in this order, to values."""
    part, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        twins[node] = part.placeholder(f"operand_{len(twins)}")
        twins[node].meta = dict(node.meta)
    needed = _origins(values, lambda node: node in twins)
    for node in graph.graph.nodes:
        if node in needed and node not in twins:
            twins[node] = part.node_copy(node, lambda origin: twins[origin])
    part.output([twins[node] for node in values])
    return fx.GraphModule(graph, part)
