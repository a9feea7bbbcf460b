"""From settings to everything a training is made of: model, rows, stream, recipe, objective, and what is asked of it.

`Setup` is a training ready for its first step, with all that it is made of; `set_up` proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from retrograd.core import tree
from retrograd.core.engine import Blocks
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Objective, Recipe, State, Training, initial_state, micro_batches
from retrograd.data.pairs import PairStream, Part
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream
from retrograd.lm.engines import Choice, Load, choose_engine, compiled_engine
from retrograd.lm.load import load_model
from retrograd.lm.model import (
    DTYPES,
    CausalLM,
    load_tokenizer,
    only_trained,
)
from retrograd.parallel.group import here
from retrograd.parallel.shard import Sharded
from retrograd.proofs.memory import Sizes, held_whole
from retrograd.query.columns import Queries
from retrograd.query.load import load_rows
from retrograd.query.named import Asked
from retrograd.query.together import answering
from retrograd.runs.arithmetic import Arithmetic, begun_with, deterministic, precise
from retrograd.runs.first_step import prove_by_block, prove_first_step
from retrograd.runs.health import Finding, recipe_findings
from retrograd.runs.identity import architecture, fingerprint, held_tensors, identify
from retrograd.runs.recipe import recipe_of
from retrograd.runs.shares import in_pieces, logical_shards, prove_while_whole, refuse_unequal, shared
from retrograd.runs.states.budget import free_on
from retrograd.runs.trajectory import Ready
from retrograd.settings.train import RecipeConfig, TrainConfig

__all__ = [
    "Differentiated", "Loaded", "Setup", "Sources", "attributed", "differentiated", "find_device", "load_recipe",
    "owed_bytes", "set_up", "set_up_recipe", "visits",
]  # fmt: skip


_BEGUN = "as the run was begun"  # why an engine


@dataclass(frozen=True, eq=False)
class Setup(Ready):
    """A training, loaded and checked before its first step.

    objective: (params, inputs, coefficients) → scalar, what every step descends.
    engine: which engine differentiates the steps, and why.
    arithmetic: what its bits depend on besides.
    findings: what the recipe alone gives away of scores.
    hashes: what the run is made of, part by part.
    identity: hash of the training: all of them but the queries', and how the rows are visited.
    """

    model: CausalLM
    tokenizer: Any
    stream: DataStream | PairStream
    objective: Objective
    engine: Choice
    arithmetic: Arithmetic
    findings: list[Finding]
    hashes: dict[str, str]

    @property
    def rows(self) -> Rows:
        """What is trained on, of all sides."""
        rows: Rows = self.stream.rows
        return rows


@dataclass(frozen=True, eq=False)
class Loaded(Setup):
    """Everything an attributed run is made of: a training on rows, and what is asked of it.

    texts: an excerpt of each document.
    asked: the queries by name.
    parts: the data sets that the rows are from, where there are several sides.
    after: what parameters become before they are asked, such as by an attack; they are asked as they are when None.
    """

    texts: list[str]
    asked: list[Asked]
    parts: Sequence[Part] = ()
    after: Callable[[Params], Params] | None = None

    @property
    def doing(self) -> dict[str, Callable[..., Any]]:
        """As `Ready.doing`, and a part of what is asked."""
        engine = self.training.engine
        return {**super().doing, **answering(here(), self.asked, engine.lying if isinstance(engine, Sharded) else None)}

    @property
    def queries(self) -> Queries:
        """All columns of all queries, in order."""
        return Queries([column for asked in self.asked for column in asked.columns])


class Differentiated(NamedTuple):
    """How steps are differentiated: what was asked for, or what a run that was begun took.

    Args:
        engine: "auto", "double" or "blocks".
        compile: Compile the passes of `blocks`.
        queries: Cotangents that the way back carries at once; 0 for a training that is not attributed.
        run: Folder of the run, for what is said of it.
        begun: The arithmetic of a run that was begun: its replay takes no other.
        shards: Logical shards; as many as there are processes when None.
        parallel: How several processes share: "shard", or else every one computes with the whole parameters it is sent.
        replicas: Copies of the pieces.
    """

    engine: Literal["auto", "double", "blocks"] = "auto"
    compile: bool = False
    queries: int = 0
    run: Path | None = None
    begun: Arithmetic | None = None
    shards: int | None = 1
    parallel: str = "replicate"
    replicas: int = 1


def attributed(setup: Setup, texts: list[str], asked: list[Asked], parts: Sequence[Part] = ()) -> Loaded:
    """A training with what is asked of it, the last three as `Loaded` has them."""
    given = {field.name: getattr(setup, field.name) for field in fields(Setup)}
    given["hashes"] = setup.hashes | {f"query {one.name}": one.digest for one in asked}
    return Loaded(**given, texts=texts, asked=asked, parts=parts)


def set_up_recipe(config: RecipeConfig) -> Setup:
    """Load and check a training on rows, without a query.

    Raises:
        ValueError: As `assemble`.
    """
    model, tokenizer, stream, _ = load_recipe(config)
    how = differentiated(config, 0)
    return set_up(model, tokenizer, stream, config.train, how, visited=visits(stream, "examples", config.dtype))


def load_recipe(
    config: RecipeConfig, *, per_token: bool = False, sources: Sources | None = None
) -> tuple[CausalLM, Any, DataStream, list[str]]:
    """Model, tokenizer, stream and an excerpt of each document."""
    sources = sources or Sources()
    device, train, data = find_device(config.device, tf32=config.tf32), config.train, config.data
    tokenizer = sources.tokenizer(config.tokenizer or config.model)
    model = sources.model(config.model, config.dtype, device, config.lora, train)
    prove_while_whole(config, model)
    given: dict[str, Any] = {"chunk_length": data.chunk_length, "min_chars": data.min_chars}
    rows, texts = sources.rows(data, tokenizer, model, "data", **given)
    stream = DataStream(
        rows,
        train.batch_size,
        epochs=train.epochs,
        shuffle=data.shuffle,
        seed=train.seed,
        weight_shape=(len(rows), rows.max_length) if per_token else None,
        dtype=torch.promote_types(DTYPES[config.dtype], torch.float32),
        device=device,
    )
    return model, tokenizer, stream, texts


def visits(stream: DataStream, attribute: str, dtype: str) -> tuple[Any, ...]:
    """How the rows of a run are visited and weighted, for its identity."""
    return (stream.shuffle, stream.seed, stream.batch_size, stream.epochs, attribute, dtype)


def set_up(
    model: CausalLM,
    tokenizer: Any,
    stream: DataStream | PairStream,
    train: TrainConfig,
    how: Differentiated = Differentiated(),
    *,
    visited: tuple[Any, ...],
    objective: Objective | None = None,
    start: Params | None = None,
) -> Setup:
    """A training of a model on a stream by a recipe, its first step tried.

    Args:
        how: How steps are differentiated.
        visited: For the identity: how rows are visited, and what else the training is made of besides recipe, rows,
            model and engine.
        objective: (params, inputs, coefficients) → scalar; the weighted next-token cross-entropy when None.
        start: Parameters to start from; the model's own when None.
    Raises:
        ValueError: If the engine cannot work, the first step is no function or, where a query is to come, it is not
            differentiated right.
    """
    group = here()
    how = how._replace(begun=group.agreed(how.begun))  # another rank may have looked later
    if how.begun is not None:
        how.begun.apply()
    shards = logical_shards(how.shards, how.begun, group, how.run, how.replicas)
    size = train.micro_batch_size or stream.batch_size
    recipe = recipe_of(train, model, len(stream), shards)
    dtype = next(model.module.parameters()).dtype
    tf32 = torch.get_float32_matmul_precision() != "highest" and dtype == torch.float32
    kind = (stream.batch_size, len(stream.rows), "tf32" if tf32 else str(dtype).removeprefix("torch."))
    findings = recipe_findings(recipe, *kind) if how.queries else []
    initial = initial_state(recipe, model.params if start is None else start)
    shape = (-(-min(size, len(stream.rows)) // group.world), stream.rows.max_length)
    loss: Objective = model.objective if objective is None else objective
    if group.rank:  # what fits differs by rank
        how = how._replace(engine=group.agreed(how.engine))
    engine = _engine(how, model, loss, shape, train, initial, stream)
    if not group.rank:
        group.agreed(engine.name)
    arithmetic = Arithmetic.here(
        dtype, torch.device(stream.device), engine.name, compiled=engine.compiled is not None, shards=shards
    )
    training = Training(recipe, engine.engine, stream, stream.weights)
    hashes = _hashes(recipe, stream.rows, initial, model.module)
    divided, attributed = _divided(how), how.queries > 0
    by_block = divided and objective is None and isinstance(engine.engine, Blocks)
    if how.begun is None and not by_block:
        prove_first_step(training, initial, model, objective, attributed=attributed)
    refuse_unequal(group, hashes, arithmetic)
    # an unlearning is held against the parameters it starts from, at its end
    given = (engine.engine, shards, group, stream)
    divide = partial(in_pieces, *given, model, initial, how.replicas, keep=objective is not None)
    if how.begun is None and by_block:
        training = prove_by_block(training, initial, model, divide, attributed=attributed)
    else:
        training = training._replace(engine=divide() if divided else shared(*given))
    identity = identify(hashes, *visited, arithmetic.chosen)
    made = (model, tokenizer, stream, loss, engine, arithmetic, findings, hashes)
    return Setup(training, initial, identity, *made)


def _hashes(recipe: Recipe, rows: Rows, initial: State, module: nn.Module) -> dict[str, str]:
    return {
        "recipe": fingerprint(recipe),
        "rows": rows.digest()[:16],
        "model": fingerprint(initial.params),
        "frozen weights and buffers": fingerprint(held_tensors(module)),
        "the model's configuration and code": architecture(module),
    }


def differentiated(config: RecipeConfig, queries: int) -> Differentiated:
    """How the steps of a run are, by its settings."""
    asked = (config.engine, config.compile, queries, config.run)
    return Differentiated(*asked, _begun(config), config.shards, config.parallel, config.replicas)


def _begun(config: RecipeConfig) -> Arithmetic | None:
    nowhere = config.overwrite or not isinstance(config.run, Path)  # a configuration without its folder
    return None if nowhere else begun_with(config.run)


def _engine(
    how: Differentiated, model: CausalLM, objective: Objective, batch: tuple[int, int], train: TrainConfig,
    initial: State, stream: DataStream | PairStream,
) -> Choice:  # fmt: skip
    """The engine asked for or, for a run that was begun, the one it was begun with: its replay takes no other."""
    begun = how.begun
    if begun and how.engine not in ("auto", begun.engine):
        raise ValueError(
            f"{how.run} was begun with --engine {begun.engine}, now it is {how.engine}: replay has to take "
            "the engine that training took. Leave --engine out, use another folder, or --overwrite to start afresh."
        )
    if begun and begun.compiled != how.compile:
        raise ValueError(
            f"{how.run} was begun with{'' if begun.compiled else 'out'} --compile: replay has to take "
            "what training took. Ask for the same, use another folder, or --overwrite to start afresh."
        )
    if how.compile:
        proofs = [] if begun else _proofs(stream, train.micro_batch_size)
        choice = compiled_engine(model.module, batch, proofs, how.queries, stream.rows.packed)
        return choice._replace(why=_BEGUN) if begun else choice
    asked = begun.engine if begun else how.engine
    if train.dropout:
        if asked == "blocks":
            raise ValueError(
                "--engine blocks draws dropout layer by layer, retraining draws it model by model: with "
                "--train.dropout take --engine double"
            )
        asked = "double"
    choice = choose_engine(asked, model.module, objective, _load(how, batch, model, initial))
    return choice._replace(why=_BEGUN) if begun else choice


def _load(how: Differentiated, batch: tuple[int, int], model: CausalLM, initial: State) -> Load:
    """What `double` would take here. Where parameters are divided, a pass and the proofs have them whole."""
    params, k = tree.nbytes(model.params), how.queries
    owed, free = owed_bytes(params, tree.nbytes(initial), k), _free(next(iter(model.params.values())).device)
    if not _divided(how):
        return Load(*batch, k, free - owed)
    passed = owed * how.replicas // here().world + params * (1 + (2 * k or 1))
    whole = list(model.module.parameters())
    frozen = sum(x.nbytes for x in whole) - params
    sizes = Sizes(params, frozen, whole[0].element_size(), sum(x.numel() for x in whole))
    return Load(*batch, k, free - passed, held_whole(sizes) if k else 0, free)


def _divided(how: Differentiated) -> bool:
    return how.parallel == "shard" and here().world > 1


def owed_bytes(params: int, state: int, queries: int) -> int:
    """Bytes that a step and its pullback take besides state and activations: g, and of each query ḡ, Hḡ, λ, next λ."""
    return params * (1 + 2 * queries) + 2 * queries * state


def _proofs(stream: DataStream | PairStream, size: int | None) -> list[Batch]:
    """The run's first and last micro-batch: what is compiled is compared with eager on them."""
    return [micro_batches(stream[0], size)[0], micro_batches(stream[len(stream) - 1], size)[-1]]


def _free(device: torch.device) -> int:
    """Bytes that steps may take: all of a GPU's, half of the host's, for the other half is for states."""
    return free_on(device) // (1 if device.type == "cuda" else 2)


class Sources(NamedTuple):
    """Where the parts of a training come from; `plan` has a model without weights in place of a loaded one."""

    tokenizer: Callable[[str], Any] = load_tokenizer
    model: Callable[..., CausalLM] = load_model
    rows: Callable[..., tuple[Rows, list[str]]] = load_rows
    narrow: Callable[[CausalLM, Collection[str]], CausalLM] = only_trained


def find_device(name: str, *, tf32: bool = False) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Args:
        tf32: Let float32 products round their factors.
    Raises:
        ValueError: If it cannot be used here, or has no TF32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in name and here().world > 1:
        raise ValueError(f"--device {name} would be the device of every rank: give cuda, and each takes its own")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    deterministic(device)
    precise(device, tf32=tf32)
    return device
