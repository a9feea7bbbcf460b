"""Parameters in pieces: the bits of whole ones, for every number of processes and shapes that do not divide."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from peak import Peak
from ranks import on_ranks
from test_split import SHARDS, World, apart, everything, world_of
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from retrograd.core import tree
from retrograd.core.engine import Blocks
from retrograd.core.optim import AdamW, Cotangent, Muon, Params, clip, clip_pullback
from retrograd.core.slots import digest_of
from retrograd.core.step import Recipe, State, Training, initial_state, micro_batches
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream
from retrograd.lm.chain import decoder_chain
from retrograd.lm.engines import Load
from retrograd.lm.model import CausalLM, causal_objective, trainable
from retrograd.parallel.group import ALONE, Group, RankError
from retrograd.parallel.pieces import PieceLedger, Pieces, parameter_of
from retrograd.parallel.shard import Ahead, ByBlock, Sharded, release
from retrograd.parallel.split import Split
from retrograd.proofs import first_step
from retrograd.proofs.memory import FULL, Sizes, held_in_pieces, held_whole
from retrograd.proofs.slopes import Draws, Slopes, scaled
from retrograd.query import together
from retrograd.query.columns import contrast, query_columns
from retrograd.runs import setup
from retrograd.runs.first_step import prove_by_block, prove_first_step
from retrograd.runs.shares import in_pieces

ALL = 15  # rows
SHAPES = {"matrix": (7, 3), "few": (2, 5), "vector": (11,), "scalar": (), "cube": (13, 2, 2)}


def tensors(seed: int, *lead: int) -> Params:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn((*lead, *shape), generator=draw) for name, shape in SHAPES.items()}


def there_and_back(group: Group, replicas: int) -> list[Any]:
    """All that is computed over leaves, from pieces."""
    lying = Pieces(tensors(0), SHARDS, group, replicas)
    params, bars, grads = lying.own(tensors(0)), lying.own(tensors(1, 2)), lying.own(tensors(2))
    recipe = lying.recipe_of(Recipe(AdamW(0.1, spared=("vector",), weight_decay=0.5), pieces=SHARDS))
    state = initial_state(recipe, params)
    with tree.lying(lying):
        clipped, pulled = clip(grads, 0.1), clip_pullback(grads, 0.1, bars)
        after = State(1, *recipe.optimizer.update(params, state.moments, clipped, 0))
        numbers = [tree.norm(params), tree.norm(bars, 1), tree.dot(params, grads), torch.tensor(tree.nonfinite(params))]
        digest = PieceLedger({}, lying).digest(after)
    return [lying.whole(params), lying.whole(bars), lying.whole(clipped), lying.whole(pulled), numbers, digest]


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (3, 1), (6, 3), (3, 3)])
def test_pieces_have_the_bits_of_whole_leaves(ranks: int, replicas: int) -> None:
    params, bars, grads = tensors(0), tensors(1, 2), tensors(2)
    clipped, pulled = clip(grads, 0.1, SHARDS), clip_pullback(grads, 0.1, bars, SHARDS)
    optimizer = AdamW(0.1, spared=("vector",), weight_decay=0.5)
    after = State(1, *optimizer.update(params, optimizer.init(params), clipped, 0))
    for found in on_ranks(ranks, there_and_back, replicas):
        assert tree.digest(found[:4]) == tree.digest([params, bars, clipped, pulled])
        assert found[-1] == digest_of(after, SHARDS)
        norm, norms, dot, bad = found[4]
        assert float(norm) == pytest.approx(float(tree.norm(params)))
        assert norms.tolist() == pytest.approx(tree.norm(bars, 1).tolist())
        assert float(dot) == pytest.approx(float(tree.dot(params, grads)))
        assert bad == 0
    moved = {**after.params, "few": after.params["few"].flip(0)}
    assert digest_of(after._replace(params=moved), SHARDS) != digest_of(after, SHARDS)


def test_replicas_that_part_are_named() -> None:
    def digest(group: Group) -> str:
        lying = Pieces(tensors(0), SHARDS, group, 2)
        own = lying.own(tensors(0))
        if group.rank == 1:
            own["few@0"][0, 0] += 1
        try:
            return PieceLedger({}, lying).digest(State(7, own, {}))
        except RankError as error:
            return str(error)

    first, second = on_ranks(2, digest)
    assert first == second
    assert "at step 7 replica 1 (rank 1) has a state of digest" in first


MATRICES = {"wide": (7, 11), "tall": (9, 4), "few": (2, 5), "spared": (3, 3), "left": (6, 6), "long": (25, 30)}
MUON = Muon(lambda t: 0.1 / (t + 1), weight_decay=0.5, exclude=("left",), spared=("spared", "vector"))


def more_tensors(seed: int, dtype: torch.dtype, *lead: int) -> Params:
    draw = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, **MATRICES}
    return {name: torch.randn((*lead, *shape), generator=draw, dtype=dtype) for name, shape in shapes.items()}


def orthogonalised(group: Group | None, dtype: torch.dtype, nesterov: bool, replicas: int = 1) -> list[Any]:
    """Two updates by Muon and the pullback of the second for two queries, whole or in pieces; and what is counted whole."""
    params, *grads = (more_tensors(seed, dtype) for seed in range(3))
    bars = [more_tensors(seed, dtype, 2) for seed in (3, 4, 5, 6)]
    how = None if group is None else Pieces(params, SHARDS, group, replicas)
    recipe = Recipe(replace(MUON, nesterov=nesterov), pieces=SHARDS)
    if how is not None:
        recipe = how.recipe_of(recipe)
        params, grads, bars = how.own(params), [how.own(g) for g in grads], [how.own(bar) for bar in bars]
    optimizer = recipe.optimizer
    with nullcontext() if how is None else tree.lying(how):
        before = optimizer.update(params, optimizer.init(params), grads[0], 0)
        after = optimizer.update(*before, grads[1], 1)
        moments = {kind: {name: bar[name] for name in before[1][kind]} for kind, bar in zip(before[1], bars)}
        pulled = optimizer.pullback(*before, grads[1], 1, Cotangent(bars[3], moments))
    trees = [after[0], *after[1].values(), pulled.bars, pulled.cotangent.params, *pulled.cotangent.moments.values()]
    if how is not None:
        trees = [how.some(one, dict.fromkeys(map(parameter_of, one))) for one in trees]
    return [tree.named(trees), pulled.recipe]


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (3, 1), (6, 3)])
def test_muon_in_pieces_has_the_bits_of_whole_matrices(ranks: int, replicas: int) -> None:
    for dtype, nesterov in ((torch.float32, True), (torch.float64, False)):
        expected, numbers = orthogonalised(None, dtype, nesterov)
        for found, own in on_ranks(ranks, orthogonalised, dtype, nesterov, replicas):
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
            assert found.keys() == expected.keys()
            for name, slope in numbers.items():
                assert own[name].tolist() == pytest.approx(slope.tolist(), rel=1e-5)


def most_of_muon(group: Group) -> list[float]:
    """The most bytes at once of an update by Muon and its pullback, of 12 matrices; in units of one."""
    params = {f"matrix {place}": torch.randn(240, 240) for place in range(12)}
    lying, seen = Pieces(params, group.world, group), list[int]()
    own, bars = lying.own(params), lying.own({name: x[None] for name, x in params.items()})
    optimizer, size = Muon(0.1), next(iter(params.values())).nbytes
    moments = optimizer.init(own)
    with tree.lying(lying), Peak() as counted:
        watched = partial(counted.during, told=seen.append)
        watched(optimizer.update)(own, moments, own, 0)
        watched(optimizer.pullback)(own, moments, own, 0, Cotangent(bars, {**moments, "momentum": bars}))
    return [most / size for most in seen]


def test_muon_in_pieces_has_one_matrix_whole() -> None:
    for update, pullback in on_ranks(4, most_of_muon):  # gloo may hold what was exchanged a little longer
        assert update < 12 / 4 * 2 + 10, "a quarter of the next parameters and momenta, and one matrix on its way"
        assert pullback < 12 / 4 * 3 + 20, "a quarter of three cotangents, and one matrix after every iteration"


def some_rows(kind: str, rows: int) -> World:
    """With few rows many shards have none."""
    world = world_of(kind)
    return world if rows == ALL else world._replace(batches=micro_batches(world.batches[0], rows)[:1])


def gathered(group: Group, kind: str, rows: int, replicas: int) -> dict[str, Any]:
    world = some_rows(kind, rows)
    lying = Pieces(world.params, SHARDS, group, replicas)
    own = World(world.engine, lying.own(world.params), world.batches, world.weights, lying.own(world.bars))
    half = (ByBlock if isinstance(world.engine, Blocks) else Sharded)(
        world.engine, SHARDS, group, lying=lying, first=own.params
    )
    found = everything(half, own)
    for name, value in found.items():
        if isinstance(value, dict):
            found[name] = lying.whole(value)
        elif isinstance(value, tuple):
            found[name] = (lying.whole(value[0]), value[1])
    return found


@pytest.mark.parametrize(
    ("kind", "ranks", "rows", "replicas"),
    [
        ("blocks", 3, 2, 1),
        ("blocks", 6, 2, 3),
        *(
            pytest.param(kind, ranks, ALL, replicas, marks=pytest.mark.slow)
            for kind, ranks, replicas in (("double", 3, 1), ("blocks", 2, 1), ("double", 6, 3), ("blocks", 2, 2))
        ),
    ],
)
def test_an_engine_over_pieces_has_the_bits_of_one_over_whole_parameters(
    kind: str, ranks: int, rows: int, replicas: int
) -> None:
    world = some_rows(kind, rows)
    alone = everything(Split(world.engine, SHARDS, ALONE), world)
    assert apart(alone, everything(world.engine, world)) < 1e-12
    for found in on_ranks(ranks, gathered, kind, rows, replicas):
        assert tree.digest(found) == tree.digest(alone)


def test_the_next_place_is_begun_when_one_has_arrived() -> None:
    told = list[str]()

    class Lying:
        def coming(self, own: Params, names: list[str]) -> Any:
            told.append(f"begun {names[0]}")
            return lambda: told.append(f"arrived {names[0]}") or {name: own[name] for name in names}

    own = {name: torch.ones(()) for name in "abc"}
    read = Ahead(Lying(), own, [["a"], ["b", "c"], ["a"]])  # type: ignore[arg-type]
    assert read([]) == {}
    assert [list(read(names)) for names in (["a"], ["b", "c"], ["a"])] == [["a"], ["b", "c"], ["a"]]
    assert told == ["begun a", "arrived a", "begun b", "arrived b", "begun a", "arrived a"]
    with pytest.raises(AssertionError, match="in one order"):
        Ahead(Lying(), own, [["a"], ["b"]])(["b"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_rank_whose_pieces_do_not_come_is_named() -> None:
    def waits(group: Group) -> str:
        if group.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 has stopped") as told:
            group.sharing(torch.ones(3))()
        return str(told.value)

    assert on_ranks(2, waits, patience=20)[1] == -signal.SIGKILL


@cache
def deep(width: int = 48, layers: int = 12) -> tuple[CausalLM, Blocks]:
    """A model of so many layers, and their chain."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=width, n_layer=layers, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    module = AutoModelForCausalLM.from_config(config).eval()
    return CausalLM(module, trainable(module)[0], *causal_objective(module)), Blocks(decoder_chain(module))


def most(group: Group) -> list[float]:
    """The most bytes beyond the pieces in a gradient and in a pullback by block, and whole, in units of the model's."""
    model, engine = deep()
    params, stream, seen = model.params, DataStream([[1, 2, 3, 4], [5, 6, 7]], batch_size=2), list[int]()
    lying = Pieces(params, 2, group)
    own, bars = lying.own(params), lying.own({name: theta[None] for name, theta in params.items()})
    with Peak() as counted:
        for kind in (ByBlock, Sharded):
            half, place = kind(engine, 2, group, lying=lying, first=own), ([stream[0]], stream.weights, None)
            counted.during(half.gradient, seen.append)(own, *place)
            counted.during(half.pullback, seen.append)(own, *place, bars)
    return [size / tree.nbytes(params) for size in seen]


@pytest.mark.slow
def test_a_pass_by_block_never_has_the_whole_model() -> None:
    deep()  # once for all ranks
    for *by_block, gradient, pullback in on_ranks(2, most):
        assert gradient > 2, "parameters and their gradient"
        assert pullback > 3, "parameters, ḡ and H ḡ"
        assert max(by_block) < 1.1, "half of the gradient or of H ḡ, one layer of 12 and the next"


def proved(group: Group, width: int, layers: int, wrong: str = "") -> tuple[list[float], str]:
    """The most bytes in the proof of a chain, and beyond the pieces in that of a first step; in units of the model's.

    And what is said of a model that is proved wrong.
    """
    model, engine = deep(width, layers)
    stream = DataStream([[1, 2, 3, 4], [5, 6, 7]], batch_size=2)
    training = Training(Recipe(AdamW(1e-3)), engine, stream, stream.weights)
    initial, seen, size = initial_state(training.recipe, model.params), list[int](), tree.nbytes(model.params)
    given = (engine, 2, group, stream, model, initial)
    plain, mutants = GPT2MLP.forward, {
        "detached": lambda self, x: (y := plain(self, x)) / y.detach().norm(dim=-1, keepdim=True),
        "mixed rows": lambda self, x: (y := plain(self, x)) / y.norm(),
        "random": lambda self, x: plain(self, x) * (1 + 1e-3 * torch.randn(())),
    }  # fmt: skip
    GPT2MLP.forward = mutants.get(wrong, plain)
    if not wrong:
        first_step.FULL = -1  # at float32, as a large model
    divide = partial(in_pieces, *given)
    if wrong:
        Slopes.leaves = lambda self, along: list(along)[:1]  # many gradients, and many more messages between ranks
        with pytest.raises(ValueError) as refused:
            prove_by_block(training, initial, model, divide, attributed=True)
        return [], str(refused.value)
    with Peak() as counted:
        counted.during(decoder_chain, seen.append)(model.module)
        counted.during(prove_by_block, seen.append)(training, initial, model, divide, attributed=True)
    return [most / size for most in seen], ""


@pytest.mark.slow
def test_proofs_hold_pieces_and_one_block() -> None:
    deep(256, 12)
    for (chain, step), error in on_ranks(2, proved, 256, 12):
        assert not error
        assert chain < 0.8, "three eighths and the graph of the trial"
        assert step < 3.6, "half of parameters, gradient, ḡ, H ḡ, direction, moved parameters and their gradient"


def proofs_peak(group: Group, full: int) -> int:
    """The most bytes that a proof of the first step holds besides the whole model: with `double` on one rank alone."""
    model, engine = deep(256, 12)
    first_step.FULL = full
    stream, seen = DataStream([[1, 2, 3, 4], [5, 6, 7]], batch_size=2), list[int]()
    training = Training(Recipe(AdamW(1e-3)), engine, stream, stream.weights)
    initial = initial_state(training.recipe, model.params)
    divide = partial(in_pieces, engine, 2, group, stream, model, initial)
    with Peak() as counted:
        watched = partial(counted.during, told=seen.append)
        if group.world == 1:
            watched(prove_first_step)(training, initial, model, None, attributed=True)
        else:
            watched(prove_by_block)(training, initial, model, divide, attributed=True)
    return seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("full", [FULL, -1], ids=["float64", "float32"])
def test_proofs_hold_what_is_counted(full: int) -> None:
    params = deep(256, 12)[0].params
    layer = sum(x.nbytes for name, x in params.items() if ".h.0." in name)
    sizes = Sizes(tree.nbytes(params), 0, 4, FULL if full == FULL else FULL + 1)
    (whole,) = on_ranks(1, proofs_peak, full)
    assert 0.95 < whole / held_whole(sizes) < 1.05
    for found in on_ranks(2, proofs_peak, full):
        assert 0.95 < found / (tree.nbytes(params) // 2 + held_in_pieces(sizes, 2, layer)) < 1.05


REFUSED = {
    "detached": "by differences and", "random": "gives two results", "mixed rows": "it would train another function",
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [pytest.param(*one, marks=[pytest.mark.slow] if one[0] == "detached" else []) for one in REFUSED.items()],
)
def test_what_one_process_refuses_is_refused_in_pieces(wrong: str, message: str) -> None:
    deep(16, 2)
    for _, error in on_ranks(2, proved, 16, 2, wrong):
        assert message in error


def proved_where_float64_fails(group: Group, fails: list[int], replicas: int) -> list[torch.dtype]:
    """The dtypes that a first step is proved in, where the loss of some ranks takes no float64."""
    model, engine = deep(16, 2)
    stream = DataStream([[1, 2, 3, 4], [5, 6, 7]], batch_size=2)
    training = Training(Recipe(AdamW(1e-3)), engine, stream, stream.weights)
    initial, seen = initial_state(training.recipe, model.params), list[torch.dtype]()
    plain, compare = GPT2MLP.forward, first_step._compare_gradient

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64 and group.rank in fails:
            raise TypeError("this kernel takes float32")
        return plain(self, x)

    def noted(engine: Any, params: Params, *given: Any) -> None:
        seen.append(next(iter(params.values())).dtype)
        compare(engine, params, *given)

    GPT2MLP.forward, first_step._compare_gradient = forward, noted
    given = (engine, group.world, group, stream, model, initial, replicas)
    divide = partial(in_pieces, *given)
    prove_by_block(training, initial, model, divide, attributed=True)
    return seen


@pytest.mark.parametrize(
    ("ranks", "fails", "replicas"),
    [(2, [1], 1), (3, [0, 1, 2], 1), (2, [1], 2)],
    ids=["one rank", "all, one has no rows", "one replica"],
)
def test_ranks_prove_in_one_dtype(ranks: int, fails: list[int], replicas: int) -> None:
    deep(16, 2)
    assert on_ranks(ranks, proved_where_float64_fails, fails, replicas) == [[torch.float32]] * ranks


def weighed(group: Group, parallel: str, replicas: int = 1) -> Load:
    model, _ = deep(16, 2)
    setup._free = lambda device: 1 << 30
    initial = initial_state(Recipe(AdamW(1e-3)), model.params)
    return setup._load(setup.Differentiated(queries=2, parallel=parallel, replicas=replicas), (1, 8), model, initial)


def test_auto_weighs_double_by_what_it_has_whole_where_parameters_are_divided() -> None:
    size, held = tree.nbytes(deep(16, 2)[0].params), 5 + 4 * 3  # g, and of two queries ḡ and H ḡ, and λ twice
    for load in on_ranks(2, weighed, "replicate"):
        assert load == Load(1, 8, 2, (1 << 30) - held * size)
    for replicas in (1, 2):
        for load in on_ranks(2, weighed, "shard", replicas):
            passed = held * size * replicas // 2 + 5 * size
            assert load == Load(1, 8, 2, (1 << 30) - passed, 2 * 6 * size, 1 << 30)


def directions(group: Group) -> Params:
    """Two random directions of every piece here."""
    lying = Pieces(tensors(0), SHARDS, group)
    own, draw, found = lying.own({**tensors(0), "few": torch.zeros(2, 5)}), Draws(), {}
    with tree.lying(lying):
        for turn in range(2):
            found |= {f"{name} {turn}": x for name, x in scaled(own, 0.02, draw).items()}
    return found


def test_every_piece_has_a_direction_of_its_own_that_no_number_of_processes_changes() -> None:
    two, three = ({name: x for found in on_ranks(n, directions) for name, x in found.items()} for n in (2, 3))
    assert two.keys() == three.keys()
    for name, x in two.items():
        assert torch.allclose(x, three[name], rtol=1e-5), name
    shaped = [x.flatten() / x.norm() for x in two.values() if x.shape == two["matrix@0 0"].shape]
    assert len(shaped) == 6
    assert max(float(abs(x @ y)) for place, x in enumerate(shaped) for y in shaped[:place]) < 0.999


def asked(group: Group, replicas: int) -> tuple[float, Any]:
    """The most bytes of a query beyond the parameters, in units of the model's; its values and gradient, leaf by leaf."""
    model, _ = deep(256, 12)
    rows = [np.array(row) for row in ([1, 2, 3, 4], [5, 6, 7], [8, 9])]
    masks, owners = [np.arange(len(x)) > 0 for x in rows], [np.full(len(x), k) for k, x in enumerate(rows)]
    columns = query_columns(model.objective, Rows(rows, masks, owners, 3, {}), "mean", batch_size=1)
    lying, seen = Pieces(model.params, 2, group, replicas) if replicas else None, list[int]()
    with Peak() as counted:
        ask = counted.during(together._answered, seen.append)
        values, found = ask(group, [*columns, *contrast("x", columns, columns)], model.params, lying)
    gathered = found if lying is None else dict(zip(lying.shapes, together._gathered(lying, found), strict=True))
    return seen[0] / tree.nbytes(model.params), (values, tree.digest({name: gathered[name] for name in model.params}))


@pytest.mark.slow
def test_a_query_in_pieces_has_the_bits_of_a_whole_one_and_never_its_gradient() -> None:
    most, alone = asked(ALONE, 0)
    assert most > 3, "two columns, and a part's gradient"
    for replicas in (1, 2):
        for rank, (most, found) in enumerate(on_ranks(2, asked, replicas)):
            assert found[1] == alone[1]
            assert rank or torch.equal(found[0], alone[0])
            assert replicas > 1 or most < 2, (
                "half of two columns, and of one once more while it is gathered; an eighth of a part's"
            )


def test_what_is_let_go_of_takes_no_memory_and_keeps_its_ties() -> None:
    whole = torch.randn(100, 10)
    tied, other = whole.view(100, 10), torch.nn.Parameter(torch.randn(3))
    release(whole, tied, other)
    assert whole.untyped_storage().data_ptr() == tied.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert (whole.shape, whole.untyped_storage().nbytes(), other.shape) == ((100, 10), 4, (3,))
