"""`--compile`: the passes over a layer, compiled once for all layers and lengths, against eager ones; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import kill_after
from test_blocks import build, results, stream
from test_magic import LAYOUTS, command, done, scores, world  # noqa: F401  # fixtures
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from retrograd.accel import compiled as passes
from retrograd.accel import graphs
from retrograd.accel.compiled import Compiled
from retrograd.accel.graphs import compiled_pair
from retrograd.cli import main
from retrograd.core.engine import Blocks
from retrograd.core.engine.passes import Eager, Link, X
from retrograd.core.optim import Params
from retrograd.lm.chain import decoder_chain
from retrograd.lm.engines import compiled_engine
from retrograd.lm.model import trainable
from retrograd.settings.run import DataConfig, MagicConfig, QueryConfig, TrainConfig, check


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["gpt-neox", "llama-gqa"])
def test_layers_of_one_structure_share_a_function(family: str, lora: bool) -> None:
    """Frozen parameters are each layer's own: what is computed through the first layer's function is the same."""
    data, module = stream(), build(family, lora=lora)
    shared = decoder_chain(module, alike=True)
    assert len({link.call for link in shared.links[:-1]}) == 1
    params, found = trainable(module)[0], []
    for chain in (decoder_chain(module), shared):
        found.append(results(Blocks(chain), params, [data[0]], data.weights, 2))
    assert all(torch.equal(found[1][name], x) for name, x in found[0].items())


def test_layers_that_differ_do_not_share() -> None:
    module = build("llama-gqa")
    module.model.layers[1].input_layernorm.variance_epsilon *= 10
    calls = [link.call for link in decoder_chain(module, alike=True).links]
    assert calls[0] is calls[2]
    assert calls[0] is not calls[1]
    assert Compiled(decoder_chain(module, alike=True).links, (5, 9)).calls.isdisjoint({calls[1]})


WIDTH = 6


def mixing(params: Params, x: Tensor, context: Any) -> Tensor:
    """Attention without softmax, under a mask, and a gate: enough for products, broadcasts and second derivatives."""
    mixed = torch.tanh((x @ params["w"]) @ x.transpose(1, 2)) * context["mask"]
    return x + mixed @ x * context["gate"] + params["b"]


def operands(rows: int, length: int, queries: int = 1) -> tuple[Params, Any, Params, Tensor, Tensor]:
    """Point, context, tangents, cotangent and its tangents."""
    draw = torch.Generator().manual_seed(rows * 100 + length)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    point = {"w": random(WIDTH, WIDTH), "b": random(WIDTH), X: random(rows, length, WIDTH)}
    context = {"mask": torch.ones(1, length, length, dtype=torch.float64).tril(), "gate": random(WIDTH), "other": None}
    along = {name: random(queries, *x.shape) for name, x in point.items()}
    return point, context, along, random(rows, length, WIDTH), random(queries, rows, length, WIDTH)


def all_passes(chosen: Any, link: Link, rows: int, length: int, queries: int = 1) -> list[Tensor]:
    point, context, along, bar, bardots = operands(rows, length, queries)
    y, kept = chosen.forward(link, point, context)
    cotangents = chosen.vjp(link, point, context, bar, kept)
    again, dots, kept = chosen.jvp(link, point, context, along)
    back, found = chosen.vjp_along(link, point, context, along, bar, bardots, kept)
    return [y, again, dots, back, *(cotangents[n] for n in point), *(found[n] for n in point)]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))


def links(call: Callable[..., Any] = mixing) -> list[Link]:
    return [Link({"w": "w", "b": "b"}, call)] * 2


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled(links(), (3, 7))


@pytest.fixture
def as_traced(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Its graphs are those that the compiler is given, run as they are: to compile four takes 45 s."""
    monkeypatch.setattr("torch._inductor.standalone_compile", lambda part, given, **options: part)
    return Compiled(links(), (3, 7))


@pytest.mark.parametrize("chosen", ["as_traced", pytest.param("compiled", marks=pytest.mark.slow)])
def test_one_compilation_serves_all_sizes(chosen: str, request: pytest.FixtureRequest) -> None:
    """Two pairs of graphs, whatever the rows and the length; and queries go through the same ones."""
    compiled = request.getfixturevalue(chosen)
    for rows, length, queries in ((3, 7, 1), (5, 9, 1), (2, 30, 3), (9, 2, 1)):
        expected = all_passes(Eager(), links()[0], rows, length, queries)
        found = all_passes(compiled, links()[0], rows, length, queries)
        assert difference(found, expected) < 1e-12
        assert difference([*found[:-1], found[-1] * 1.001], expected) > 1e-4
        again = all_passes(compiled, links()[0], rows, length, queries)
        assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True))
    assert (compiled.graphs, compiled.fixed) == (4, 0)
    assert "4 graphs, " in compiled.told


@pytest.mark.slow
def test_the_bits_do_not_depend_on_what_came_before(compiled: Compiled) -> None:
    """A replay in another process meets other batches first."""
    other = Compiled(links(), (3, 7))
    for rows, length in ((9, 2), (3, 7)):
        pairs = zip(all_passes(other, links()[0], rows, length), all_passes(compiled, links()[0], rows, length))
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.slow
def test_a_length_that_is_the_width_is_compiled_for_itself(compiled: Compiled) -> None:
    """There the gate looks as if it were as long as the rows."""
    graphs = compiled.graphs
    expected = all_passes(Eager(), links()[0], 3, WIDTH)
    assert difference(all_passes(compiled, links()[0], 3, WIDTH), expected) < 1e-12
    assert (compiled.graphs, compiled.fixed) == (graphs + 4, 4)
    assert "4 of them for a single shape" in compiled.told


def two_heads(params: Params, x: Tensor, context: Any) -> Tensor:
    """`mixing` by heads: its products are [2 · rows, length, length]."""
    rows, length = x.shape[:2]
    apart = x.view(rows, length, 2, -1).transpose(1, 2).reshape(2 * rows, length, -1)
    mixed = torch.tanh(apart @ apart.transpose(1, 2)) * context["mask"] @ apart
    joined = mixed.view(rows, 2, length, -1).transpose(1, 2).reshape(x.shape)
    return x + joined @ params["w"] * context["gate"] + params["b"]


HINTS = pytest.mark.parametrize("hints", [None, {"0": 4, "1": 8}], ids=["ours", "length like heads times rows"])


@HINTS
def test_sizes_taken_for_one_are_not_compiled(hints: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        """Whether something was compiled for all sizes."""

    def asked(what: Any) -> Any:
        raise Asked(compiled_pair(what) is not None)

    monkeypatch.setattr("torch._inductor.standalone_compile", lambda *_, **options: None)
    monkeypatch.setattr(passes, "compiled_pair", asked)
    chosen = Compiled(links(two_heads), (4, 8))
    if hints:
        monkeypatch.setattr(chosen, "_hints", lambda shapes: hints)
    with pytest.raises(Asked) as told:
        chosen.forward(links(two_heads)[0], *operands(3, 5)[:2])
    assert told.value.args == (hints is None,)


@pytest.mark.slow
@HINTS
def test_a_length_like_heads_times_rows(hints: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are equal where a graph is traced are never taken for one: it serves one shape then."""
    chosen = Compiled(links(two_heads), (4, 8))
    if hints:
        monkeypatch.setattr(chosen, "_hints", lambda shapes: hints)
    for rows, length in ((4, 8), (3, 5)):
        expected = all_passes(Eager(), links(two_heads)[0], rows, length)
        assert difference(all_passes(chosen, links(two_heads)[0], rows, length), expected) < 1e-12
    assert (chosen.graphs, chosen.fixed) == ((8, 8) if hints else (4, 0))


@pytest.mark.parametrize("sizes", [(4, 28, 8), (8, 888, 126), (1, 2, 3), (64, 57_288, 1023)])
def test_no_product_of_hints_is_a_hint(sizes: tuple[int, ...]) -> None:
    static = (16, 128, 512, 1022, 50_304)
    hints = Compiled([], sizes)._hints([static, ("0", "1")])
    assert all(0 <= hints[str(place)] - size < 100 for place, size in enumerate(sizes))
    numbers = [*hints.values(), *static]
    products = {a * b + c for a in hints.values() for b in range(1, 200) for c in (-1, 0, 1) if (b, c) != (1, 0)}
    assert len(set(numbers)) == len(numbers)
    assert products.isdisjoint(hints.values())
    assert all(size + near not in static for size in hints.values() for near in (-1, 1))


def three_heads(params: Params, x: Tensor, context: Any) -> Tensor:
    rows, length = x.shape[:2]
    apart = x.view(rows, length, 3, -1).transpose(1, 2).reshape(3 * rows, length, -1)
    mixed = torch.tanh(apart @ apart.transpose(1, 2)) @ apart
    joined = mixed.view(rows, 3, length, -1).transpose(1, 2).reshape(x.shape)
    return x + torch.tanh(torch.nn.functional.linear(joined, params["w"], params["b"]))


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "length"), [(3, 7), (30, 40)])
def test_what_is_kept(rows: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mixed and mapped, a tensor each, and the tangents of both, whose two products are added up; no scores."""
    outputs: list[list[Tensor]] = []

    def told(part: Any, *_: Any, **options: Any) -> None:
        outputs.append([node.meta["val"] for node in part.graph.output_node().args[0]])

    monkeypatch.setattr("torch._inductor.standalone_compile", told)
    point, context, along, *_ = operands(rows, length)
    chosen, link = Compiled(links(three_heads), (3, 7)), links(three_heads)[0]
    for early in (lambda: chosen.forward(link, point, context), lambda: chosen.jvp(link, point, context, along)):
        with pytest.raises(TypeError, match="not callable"):
            early()
    (_, *kept), _, (_, _, *seconds), _ = outputs
    mixed, mapped = (3 * 11, 13, WIDTH // 3), (11 * 13, WIDTH)
    for found, times in ((kept, 1), (seconds, 2)):
        assert [
            tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in x.shape) for x in found
        ] == ([mixed, mapped] * times)


@pytest.mark.parametrize(
    ("one", "other", "joins"),
    [
        ((1, 0, 4, 1), (1, 4, 2**63 - 1, 1), True),
        ((-1, 4, 6, 1), (1, 0, 4, 1), True),
        ((1, 0, 4, 1), (1, 3, 6, 1), False),
        ((1, 0, 3, 1), (1, 4, 6, 1), False),
        ((1, 1, 4, 1), (1, 4, 6, 1), False),
        ((1, 0, 4, 1), (1, 4, 5, 1), False),
        ((1, 0, 4, 1), (1, 0, 4, 1), False),
        ((0, 0, 3, 1), (1, 3, 6, 1), False),
        ((1, 0, 6, 2), (1, 1, 6, 2), False),
    ],
)
def test_two_parts_of_a_range_are_joined(one: tuple[int, ...], other: tuple[int, ...], joins: bool) -> None:
    """Only where each place has exactly one of the two."""
    back, whole = torch.ops.aten.slice_backward.default, [6, 6]

    def summed(x: Tensor, y: Tensor) -> Tensor:
        return back(x, whole, *one) + back(y, whole, *other)

    inside = [torch.ops.aten.slice(torch.randn(6, 6), *part) for part in (one, other)]
    graph = graphs._parts_joined(make_fx(summed)(*inside))
    assert torch.equal(graph(*inside), summed(*inside))
    targets = {node.target for node in graph.graph.nodes}
    assert (torch.ops.aten.cat.default in targets) is joins
    assert (back in targets) is not joins


def test_ever_new_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_MOST", 0)
    with pytest.raises(ValueError, match="0 graphs were compiled and batches go on needing others"):
        Compiled(links(), (3, 7)).forward(links()[0], *operands(3, 7)[:2])


_AGREES = """
import torch
from test_blocks import TOLERANCE, build, error, results, stream
from retrograd.core.engine import Blocks
from retrograd.core.step import micro_batches
from retrograd.lm.chain import decoder_chain
from retrograd.lm.engines import compiled_engine
from retrograd.lm.model import trainable

torch.set_num_threads(1)
dtype = torch.{dtype}
data, module = stream(dtype, packed={packed}), build("{family}", dtype, lora={lora})
params = trainable(module)[0]
choice = compiled_engine(module, (5, 9), [data[0]], {queries}, {packed})
assert choice.compiled.graphs == 4, choice.why
whole = data[0]
mask = whole.inputs["target_mask"].clone()
mask[:, 4:] = False
even = whole._replace(inputs={{**whole.inputs, "target_mask": mask}})
for size, batch in ((None, whole), (3, whole), (2, whole), (None, even), (2, even)):
    batches = micro_batches(batch, size)
    expected = results(Blocks(decoder_chain(module)), params, batches, data.weights, {queries})
    found, again = (results(choice.engine, params, batches, data.weights, {queries}) for _ in range(2))
    print(size, error(found, expected), choice.compiled.told)
    assert error(found, expected) < TOLERANCE[dtype]
    assert error({{**found, "scores": found["scores"] * 1.001}}, expected) > TOLERANCE[dtype]
    assert all(torch.equal(again[name], x) for name, x in found.items())
assert choice.compiled.fixed == 0, choice.compiled.told
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "queries", "lora", "packed"),
    [
        ("gpt-neox", "float64", 1, False, False),
        ("gpt-neox", "float32", 1, False, False),
        ("llama-gqa", "float64", 3, True, False),
        ("llama-gqa", "float64", 1, False, True),
    ],
)
def test_compiled_layers_equal_eager_ones(family: str, dtype: str, queries: int, lora: bool, packed: bool) -> None:
    """One compilation for three layers and, but for single rows, all batches. A process of its own for each."""
    code = _AGREES.format(family=family, dtype=dtype, queries=queries, lora=lora, packed=packed)
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@pytest.mark.parametrize(
    ("cxx", "told"), [("no-such-compiler", "none of no-such-compiler is found"), ("", "CXX is empty")]
)
def test_no_compiler_is_refused(cxx: str, told: str) -> None:
    from torch._inductor import config

    message = rf"--compile cannot be used here: .* C\+\+ compiler, and {told}; install"
    with config.patch({"cpp.cxx": (None, cxx)}), pytest.raises(ValueError, match=message):
        compiled_engine(build("gpt-neox"), (5, 9), [], 1)


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "needs triton on a GPU" in (passes.no_compiler(torch.device("cuda")) or "")


def test_a_single_layer_is_refused() -> None:
    module = build("gpt-neox", num_hidden_layers=1)
    with pytest.raises(ValueError, match="no two layers are of one structure"):
        compiled_engine(module, (5, 9), [], 1)


def test_a_layer_that_looks_at_its_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("gpt-neox")
    kind, data = type(module.gpt_neox.layers[0].mlp), stream()
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: plain(self, x) if float(x.detach().sum()) < 1e9 else x)
    with pytest.raises(ValueError, match="--compile cannot be used with GPTNeoXForCausalLM: "):
        compiled_engine(module, (5, 9), [data[0]], 1)


@pytest.mark.slow
def test_other_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Eager):
        """A compiler that is wrong by 0.1 %."""

        told = ""

        def __init__(self, links: list[Link], sizes: tuple[int, int]) -> None:
            self.calls = {link.call for link in links}

        def vjp_along(self, *arguments: Any) -> tuple[Tensor, Params]:
            back, found = super().vjp_along(*arguments)
            return back, {name: x * 1.001 for name, x in found.items()}

    monkeypatch.setattr(passes, "Compiled", Wrong)
    with pytest.raises(ValueError, match=r"changes the results of GPTNeoXForCausalLM beyond rounding: H ḡ by .* of "):
        compiled_engine(build("gpt-neox"), (5, 9), [stream()[0]], 2)
    monkeypatch.setattr(Wrong, "vjp_along", Eager.vjp_along)
    assert compiled_engine(build("gpt-neox"), (5, 9), [stream()[0]], 2).name == "blocks"


@pytest.mark.parametrize("changes", [{"engine": "double"}, {"train": TrainConfig(dropout=True)}], ids=str)
def test_what_excludes_it(changes: dict) -> None:
    given = MagicConfig(run=Path("r"), model="m", data=DataConfig("d"), query=QueryConfig("q"), compile=True, **changes)
    with pytest.raises(ValueError, match=r"--compile .*--engine|--compile takes"):
        check(given)


def test_a_run_goes_on_as_it_was_begun(world: Path, done: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """Replay has to take the steps that training took."""
    assert main(command(world, done, "--compile")) == 2
    assert "was begun without --compile: replay has to take what" in capsys.readouterr().err
    manifest = json.loads((done / "manifest.json").read_text())
    manifest["arithmetic"] |= {"engine": "blocks", "compiled": True}
    (done / "manifest.json").write_text(json.dumps(manifest))
    assert main(command(world, done)) == 2
    assert "was begun with --compile: replay has to take what" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:  # noqa: F811
    """A compiled run in float64 over batches of several lengths."""
    assert main(command(world, world / "compiled", "--dtype", "float64", "--compile")) == 0
    return world / "compiled"


@pytest.mark.slow
def test_a_whole_run_equals_eager(world: Path, finished: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    assert main(command(world, world / "eager", "--dtype", "float64", "--engine", "blocks")) == 0
    expected, found = scores(world / "eager"), scores(finished)
    assert float((found - expected).norm() / expected.norm()) < 1e-10
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["arithmetic"]["compiled"]
    assert manifest["compiled"]["fixed"] == 0
    assert manifest["compiled"]["graphs"] in (4, 8)  # batches with and without padding
    capsys.readouterr()
    assert main(command(world, finished, "--dtype", "float64", "--compile")) == 0
    assert "is done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "step", "layout"), [("train", 4, 2), ("reverse", 6, 0)])
def test_killed_and_resumed_to_the_same_bits(
    world: Path,  # noqa: F811
    finished: Path,
    tmp_path: Path,
    phase: str,
    step: int,
    layout: int,
) -> None:
    """Another process, another replay plan: the graphs come from the disk, and do the same."""
    arguments = command(world, tmp_path / "run", "--dtype", "float64", "--compile", *LAYOUTS[layout])
    kill_after(arguments, tmp_path / "run", phase, step, patience=900, fresh=True)
    assert not (tmp_path / "run/scores.pt").exists()
    assert main(arguments) == 0
    assert (tmp_path / "run/scores.pt").read_bytes() == (finished / "scores.pt").read_bytes()
