"""From a configuration to everything a run is made of: rows, model, stream, recipe, query."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retrograd.core import probe, tree
from retrograd.core.engine import Double
from retrograd.core.optim import SGD, AdamW, Muon, Optimizer, Schedule
from retrograd.core.step import Batch, Recipe, State, Training, initial_state, micro_batches
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream
from retrograd.lm.engines import Choice, Load, choose_engine, compiled_engine
from retrograd.lm.model import DTYPES, CausalLM, load_causal_lm, load_tokenizer
from retrograd.query.columns import Queries
from retrograd.query.load import load_rows
from retrograd.query.named import Asked, load_queries
from retrograd.runs.health import Finding, recipe_findings
from retrograd.runs.identity import architecture, fingerprint, held_tensors, identify
from retrograd.runs.machine import deterministic, free_memory
from retrograd.runs.manifest import Manifest
from retrograd.settings.run import MagicConfig, TrainConfig, queries_of

__all__ = ["Loaded", "assemble", "find_device", "optimizer"]


class Loaded(NamedTuple):
    """Everything a run is made of, loaded and checked before the first step.

    engine: which engine differentiates the steps, and why.
    findings: what the recipe alone gives away.
    hashes: what the run is made of, part by part.
    identity: hash of the training: all of them but the queries', and how the rows are visited.
    """

    rows: Rows
    texts: list[str]
    model: CausalLM
    tokenizer: Any
    stream: DataStream
    training: Training
    initial: State
    asked: list[Asked]
    engine: Choice
    findings: list[Finding]
    hashes: dict[str, str]
    identity: str

    @property
    def queries(self) -> Queries:
        """All columns of all queries, in order."""
        return Queries([column for asked in self.asked for column in asked.columns])


def assemble(config: MagicConfig) -> Loaded:
    """Load and check everything a run is made of.

    Raises:
        ValueError: For whatever cannot work, before anything is computed or written.
    """
    device, train = find_device(config.device), config.train
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    model = _load_model(config, device)
    data = config.data
    rows, texts = load_rows(data, tokenizer, model, "data", chunk_length=data.chunk_length, min_chars=data.min_chars)
    stream = DataStream(
        rows,
        train.batch_size,
        epochs=train.epochs,
        shuffle=config.data.shuffle,
        seed=train.seed,
        weight_shape=(len(rows), rows.max_length) if config.attribute == "tokens" else None,
        dtype=torch.promote_types(DTYPES[config.dtype], torch.float32),
        device=device,
    )
    size = train.micro_batch_size or train.batch_size
    asked = load_queries(queries_of(config), model, tokenizer, batch_size=size, like=stream.weights)
    recipe = Recipe(
        optimizer(train, len(stream), _embeddings(model)), train.max_grad_norm, train.micro_batch_size, train.seed,
        train.dropout,
    )  # fmt: skip
    findings = recipe_findings(recipe, train.batch_size, len(rows), config.dtype)
    initial = initial_state(recipe, model.params)
    queries = sum(len(found.columns) for found in asked) + config.sharpness
    shape = (min(size, len(rows)), rows.max_length)
    begun = _begun(config)
    engine = _engine(config, begun, model, shape, queries, recipe, initial, stream)
    training = Training(recipe, engine.engine, stream, stream.weights)
    if begun is None:
        probe.prove(training._replace(engine=Double(model.objective)), initial, model.module, rows=2)
    hashes = {
        "recipe": fingerprint(recipe),
        "rows": rows.digest()[:16],
        "model": fingerprint(initial.params),
        "frozen weights and buffers": fingerprint(held_tensors(model.module)),
        "the model's configuration and code": architecture(model.module),
    }
    visited = (stream.shuffle, stream.seed, stream.batch_size, stream.epochs, config.attribute, config.dtype)
    identity = identify(hashes, *visited, *_unless_double(engine))
    hashes |= {f"query {one.name}": one.digest for one in asked}
    return Loaded(rows, texts, model, tokenizer, stream, training, initial, asked, engine, findings, hashes, identity)


def optimizer(train: TrainConfig, steps: int, exclude: tuple[str, ...] = ()) -> Optimizer:
    """The optimizer of a configuration; `exclude` names the matrices that Muon leaves to AdamW."""
    ratio = train.warmup_ratio if train.warmup_ratio is not None else 0.3 if train.lr_schedule == "one-cycle" else 0.0
    warmup = min(steps - 1, math.ceil(ratio * steps))
    lr = Schedule(train.lr_schedule, train.lr, steps, warmup)
    adam = (train.beta1, train.beta2, train.eps, train.eps_root)
    match train.optimizer:
        case "sgd":
            return SGD(lr, train.momentum, train.nesterov, train.weight_decay)
        case "adamw":
            return AdamW(lr, *adam, train.weight_decay)
        case "muon":
            return Muon(lr, train.momentum or 0.95, True, train.weight_decay, 5, *adam, exclude)
    raise ValueError(f"unknown optimizer {train.optimizer!r}; the optimizers are sgd, adamw, muon")


def _begun(config: MagicConfig) -> dict[str, Any] | None:
    """What a run that was begun records of its engine."""
    nowhere = config.overwrite or not isinstance(config.run, Path)  # a configuration without its folder
    begun = {} if nowhere else Manifest(config.run / "manifest.json").values
    if "identity" not in begun:
        return None
    recorded = begun.get("engine", {"used": "double", "why": "asked for"})
    if recorded.get("matmul", "torch") != "torch":
        raise ValueError(
            f"{config.run} was begun by an earlier version with --matmul {recorded['matmul']}, which is gone: matrices "
            "are multiplied by torch's library alone, whose bits differ, so it cannot be replayed. Use another folder, "
            "or --overwrite to start afresh."
        )
    return recorded


def _engine(
    config: MagicConfig, recorded: dict[str, Any] | None, model: CausalLM, batch: tuple[int, int], queries: int,
    recipe: Recipe, initial: State, stream: DataStream,
) -> Choice:  # fmt: skip
    """The engine asked for or, for a run that was begun, the one it was begun with: its replay takes no other."""
    if recorded and config.engine not in ("auto", recorded["used"]):
        raise ValueError(
            f"{config.run} was begun with --engine {recorded['used']}, now it is {config.engine}: replay has to take "
            "the engine that training took. Leave --engine out, use another folder, or --overwrite to start afresh."
        )
    if recorded and recorded.get("compiled", False) != config.compile:
        raise ValueError(
            f"{config.run} was begun with{'' if recorded.get('compiled') else 'out'} --compile: replay has to take "
            "what training took. Ask for the same, use another folder, or --overwrite to start afresh."
        )
    if config.compile:
        proofs = [] if recorded else _proofs(stream, config.train.micro_batch_size)
        choice = compiled_engine(model.module, batch, proofs, queries, stream.rows.packed)
        return choice._replace(why=recorded["why"]) if recorded else choice
    asked = recorded["used"] if recorded else config.engine
    if config.train.dropout:
        if asked == "blocks":
            raise ValueError(
                "--engine blocks draws dropout layer by layer, retraining draws it model by model: with "
                "--train.dropout take --engine double"
            )
        asked = "double"
    # g, and of each query ḡ, Hḡ, λ and the next λ
    owed = tree.nbytes(model.params) * (1 + 2 * queries) + 2 * queries * tree.nbytes(initial)
    load = Load(*batch, queries, _free(next(iter(model.params.values())).device) - owed)
    choice = choose_engine(asked, model.module, model.objective, load)
    return choice._replace(why=recorded["why"]) if recorded else choice


def _proofs(stream: DataStream, size: int | None) -> list[Batch]:
    """The run's first and last micro-batch: what is compiled is compared with eager on them."""
    return [micro_batches(stream[0], size)[0], micro_batches(stream[len(stream) - 1], size)[-1]]


def _free(device: torch.device) -> int:
    """Bytes that steps may take: all of a GPU's, half of the host's, for the other half is for states."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() // 2


def _unless_double(engine: Choice) -> tuple[str, ...]:
    """The engine as part of the run's identity: another one may round otherwise. Runs of before have none."""
    compiled = ("compiled",) if engine.compiled else ()
    return () if engine.name == "double" else (engine.name, *compiled)


def _load_model(config: MagicConfig, device: torch.device) -> CausalLM:
    adapters = None
    if config.lora.rank:
        from peft import LoraConfig

        adapters = LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
            target_modules=list(config.lora.target_modules) or None, task_type="CAUSAL_LM",
        )  # fmt: skip
    return load_causal_lm(
        config.model, dtype=config.dtype, device=device, lora=adapters, seed=config.train.seed,
        dropout=config.train.dropout,
    )  # fmt: skip


def _embeddings(model: CausalLM) -> tuple[str, ...]:
    """Names of the input and output embeddings, which Muon leaves to AdamW."""
    ends = [m for m in (model.module.get_input_embeddings(), model.module.get_output_embeddings()) if m is not None]  # type: ignore[operator]
    weights = {end.weight.untyped_storage().data_ptr() for end in ends if hasattr(end, "weight")}
    return tuple(name for name, leaf in model.params.items() if leaf.untyped_storage().data_ptr() in weights)


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: If it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    deterministic(device)
    return device
